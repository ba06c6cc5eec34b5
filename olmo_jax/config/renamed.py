"""Options that have another name now."""

from collections.abc import Mapping
from typing import Any

# By their old names; docs/changes.md lists them too.
RENAMED = {"data.threads": "data.n_threads"}


def modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an older version wrote, as dicts of dicts, under the names of today."""
    values = {name: dict(part) if isinstance(part, Mapping) else part
              for name, part in values.items()}  # fmt: skip
    for old, new in RENAMED.items():
        part, name = old.split(".")
        group = values.get(part)
        if isinstance(group, dict) and name in group:
            to, new_name = new.split(".")
            values.setdefault(to, {})[new_name] = group.pop(name)
    return values
