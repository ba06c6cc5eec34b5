"""OLMo in JAX: every generation in one sharded, tested codebase for TPU and GPU."""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "presets":
        from olmo_jax.config import presets

        return presets
    # These need JAX; printing help does not, and JAX costs a second to import.
    if name == "load":
        from olmo_jax.checkpoints.load import load

        return load
    if name == "logits":
        from olmo_jax.nn.transformer import logits

        return logits
    raise AttributeError(f"module 'olmo_jax' has no attribute {name!r}")
