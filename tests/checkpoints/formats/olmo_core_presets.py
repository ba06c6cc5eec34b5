"""Prints the configs of OLMo-core's presets as JSON, as its checkpoints have them.

Run by the tests with that package installed: `olmo_core_presets.py VOCAB NAME...`; a name that
ends in `_long` has the YaRN of Olmo 3's long-context stage.
"""

import json
import sys

from olmo_core.nn.rope import YaRNRoPEScalingConfig
from olmo_core.nn.transformer import TransformerConfig

YARN = YaRNRoPEScalingConfig(factor=8, beta_fast=32, beta_slow=1, old_context_len=8192)


def main(vocab_size: int, names: list[str]) -> None:
    """Print {name: config.json}."""
    configs = {}
    for name in names:
        config = getattr(TransformerConfig, name.removesuffix("_long"))(vocab_size=vocab_size)
        config = config.with_rope_scaling(YARN) if name.endswith("_long") else config
        configs[name] = {"model": config.as_config_dict()}
    print(json.dumps(configs))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
