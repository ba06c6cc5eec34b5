"""The rotary embedding of Hugging Face's `config.json`, in every form that it had, and back.

transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`, for Olmo 3 with a
set for each kind of layer. 5 reads the older forms too, some of them as another model than 4 did:
sliding layers get a theta of 500,000 where their own set names none. What is not the same model to
all versions is refused. Source: transformers 5.24, models/olmo3/configuration_olmo3.py and
modeling_rope_utils.py.
"""

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from olmo_jax.checkpoints.formats.fields import number
from olmo_jax.config.model import ModelConfig, yarn_attention

ConfigValues = dict[str, Any]

KINDS = {"full_attention": "full", "sliding_attention": "sliding"}
KEYS = frozenset(
    "rope_type rope_theta factor original_max_position_embeddings attention_factor beta_fast"
    " beta_slow mscale mscale_all_dim truncate partial_rotary_factor".split()
)
# transformers 5 takes it where none is said.
THETA = {"Olmo": 1e4, "Olmo2": 1e4, "Olmo3": 5e5, "Olmoe": 1e4, "FlexOlmo": 5e5}


def read(rest: ConfigValues, fields: ConfigValues, name: str, problems: list[str]) -> ConfigValues:
    """The options of the rotary embedding, as fields of ModelConfig.

    Args:
      rest: the config.json; what is read is taken out.
      fields: of ModelConfig that are known already.
      name: the family.
      problems: takes what is wrong.
    """
    before = len(problems)
    theta = rest.pop("rope_theta", None)
    if theta is not None:
        number("rope_theta", theta, float, problems)
    raw = [rest.get(key) for key in ("rope_parameters", "rope_scaling")]
    new, old = (_group(key, rest, problems) for key in ("rope_parameters", "rope_scaling"))
    if name == "Olmo3" and _type(old) != "default" and "rope_type" not in (raw[1] or {}):
        problems.append(
            f"rope_scaling has type={old['rope_type']}, which transformers 5 passes over in Olmo 3:"
            " write rope_type"
        )
    if name == "Olmo3" and None not in raw and not new.get("full_attention"):
        problems.append("rope_scaling beside rope_parameters needs full_attention in these")
    if len(problems) > before:
        return {}
    if name == "Olmo3":
        kinds = set(fields.get("layer_types", ()))  # none: said already
        full, used, named = _of_olmo3(theta, new, old, kinds, problems)
    else:
        full, used, named = _of_one_kind(theta, new, old, name, problems)
    if not named:
        problems.append("rope_theta is missing")
    elif len(named) > 1:
        found = ", ".join(str(t) for t in sorted(named))
        problems.append(f"rope_theta is at once {found}; one for all layers is known here")
    elif len(problems) == before and used and used != named:
        problems.append(
            f"rope_theta={max(named)} goes to some layers only in transformers 5, which takes"
            f" {THETA[name]} for the others, and to all in older ones: write it in rope_parameters"
            + (", under full_attention and sliding_attention" if name == "Olmo3" else "")
        )
    yarn = _read_yarn(full, fields["max_seq_len"], problems)
    return yarn | {"rope_theta": float(max(named, default=0.0))}


def _group(key: str, rest: ConfigValues, problems: list[str]) -> ConfigValues:
    """A group of options without those that are null, the kind under its newer name."""
    values = rest.pop(key, None)
    if not isinstance(values, Mapping | None):
        problems.append(f"{key}={reprlib.repr(values)}: need a group of options")
        return {}
    found = {k: v for k, v in (values or {}).items() if v is not None}
    if "type" in found:
        found = {"rope_type": found.pop("type")} | found
    if "rope_theta" in found:
        number(f"{key}.rope_theta", found["rope_theta"], float, problems)
    inner = {k: _group(k, found, problems) for k in [*found] if isinstance(found[k], Mapping)}
    return found | inner


def _of_one_kind(
    theta: float | None, new: ConfigValues, old: ConfigValues, name: str, problems: list[str]
) -> tuple[ConfigValues, set[float], set[float]]:
    """The set of all layers, the theta that transformers takes, and those that are named."""
    if any(isinstance(value, Mapping) for value in new.values()):
        problems.append(
            f"rope_parameters={reprlib.repr(new)}: {name}ForCausalLM has one set for all layers"
        )
    if old:  # transformers passes over the other one
        _refuse_other(new, old, problems)
    taken = old or new
    named = {t for t in (theta, new.get("rope_theta"), old.get("rope_theta")) if t is not None}
    return taken, {taken.get("rope_theta", theta or THETA[name])}, named


def _of_olmo3(
    theta: float | None,
    new: ConfigValues,
    old: ConfigValues,
    kinds: Collection[str],
    problems: list[str],
) -> tuple[ConfigValues, set[float], set[float]]:
    """The set of full layers, the thetas that transformers 5 takes, and those that are named."""
    flat = {key: value for key, value in new.items() if key not in KINDS}
    sets = [new.get(kind, {}) for kind in KINDS]
    if not all(isinstance(group, Mapping) for group in sets) or (flat and len(flat) < len(new)):
        problems.append(f"rope_parameters={reprlib.repr(new)}: need one set for each kind of layer")
        return {}, set(), {THETA["Olmo3"]}
    if not flat.items() <= {"rope_type": "default", "rope_theta": 5e5}.items():
        # transformers reads a flat one as no YaRN and its own theta, and says nothing.
        problems.append(
            f"rope_parameters={reprlib.repr(new)}: Olmo3ForCausalLM needs one set under"
            " full_attention and one under sliding_attention"
        )
        return {}, set(), {THETA["Olmo3"]}
    full, sliding = map(dict, sets)
    if new and old:  # transformers 5 merges them, older ones have the second alone
        _refuse_other(full, old, problems)
    full |= old
    if "sliding" in kinds and _type(sliding) != "default":
        problems.append(f"rope_parameters: sliding_attention is {sliding}, need rope_type default")
    taken = {
        "full": full.get("rope_theta", theta or THETA["Olmo3"]),
        "sliding": sliding.get("rope_theta", THETA["Olmo3"]),
    }
    thetas = (theta, flat.get("rope_theta"), full.get("rope_theta"), sliding.get("rope_theta"))
    return full, {taken[kind] for kind in kinds}, {t for t in thetas if t is not None}


def _refuse_other(new: ConfigValues, old: ConfigValues, problems: list[str]) -> None:
    """Refuse options of `rope_parameters` that `rope_scaling` has not, or has otherwise."""
    problems += [
        f"rope_scaling has {key}={old.get(key)}, rope_parameters {value}"
        for key, value in new.items()
        if key != "rope_theta" and old.get(key) != value
    ]


def _type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", "default")


def _read_yarn(rope: Mapping[str, Any], max_seq_len: int, problems: list[str]) -> ConfigValues:
    before, kind = len(problems), _type(rope)
    if unknown := rope.keys() - KEYS:
        problems.append(f"rotary embedding: unknown {', '.join(sorted(unknown))}")
    if rope.get("partial_rotary_factor", 1) != 1:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']}, need 1.0")
    if kind == "default":
        return {"yarn_factor": None}
    if kind != "yarn":
        problems.append(f"rope_type={kind!r}; known: default, yarn")
        return {}
    if "factor" not in rope:
        problems.append("YaRN has no factor")
        return {}
    if rope.get("truncate", True) is not True:
        problems.append(f"YaRN with truncate={rope['truncate']} is not known here")
    if "attention_factor" not in rope and (rope.get("mscale") or rope.get("mscale_all_dim")):
        problems.append("YaRN with mscale is not known here: write its attention_factor")

    def value(key: str, default: Any, of: type) -> Any:
        return number(f"YaRN's {key}", rope[key], of, problems) if key in rope else default

    fields = {
        "yarn_factor": value("factor", None, float),
        "yarn_original_len": value("original_max_position_embeddings", max_seq_len, int),
        "yarn_beta_fast": value("beta_fast", 32.0, float),
        "yarn_beta_slow": value("beta_slow", 1.0, float),
        "yarn_attention_factor": value("attention_factor", None, float),
    }
    if len(problems) == before and not fields["yarn_factor"] >= 1:  # nobody stretches backwards
        problems.append(f"YaRN's factor={fields['yarn_factor']} is below 1")
    return fields


def write(model: ModelConfig) -> ConfigValues:
    """The set of the full layers, in the form of transformers 5."""
    if model.yarn_factor is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": model.rope_theta,
        "factor": model.yarn_factor,
        "original_max_position_embeddings": model.yarn_original_len,
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow,
        "attention_factor": model.yarn_attention_factor or yarn_attention(model.yarn_factor),
    }
