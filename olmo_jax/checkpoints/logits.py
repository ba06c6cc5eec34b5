"""The logits of a checkpoint, with one layer of it in memory at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints.weights import Weights, pieces
from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.config.parameters import nested
from olmo_jax.nn import rope
from olmo_jax.nn.layers import rms_norm
from olmo_jax.nn.stack import slots_of
from olmo_jax.nn.transformer import Block


def logits(weights: Weights, tokens: np.ndarray, as_dtype: str | None = None) -> np.ndarray:
    """fp32 logits `[batch, seq, vocab_size]` of `tokens [batch, seq]`.

    Args:
      weights: any checkpoint.
      tokens: int.
      as_dtype: round the parameters to this first.
    """
    c = weights.model

    def read(name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        values = weights.read(f"params/{name}", index)
        values = values if as_dtype is None else values.astype(as_dtype, copy=False)
        return values.astype(np.float32, copy=False)

    table = [read("embed", (slice(int(t), int(t) + 1), slice(None)))[0] for t in tokens.flat]
    x = jnp.asarray(np.stack(table).reshape(*tokens.shape, c.d_model))
    kinds, tables = rope.kinds(c), rope.tables(c, jnp.arange(tokens.shape[1])[None])
    for kind, slots in zip(c.layer_kinds, slots_of(c), strict=True):
        params = {}
        for path, n in slots.items():
            shape = weights.leaves[f"params/layers/{path}"].shape[1:]
            index = (slice(n, n + 1), *(slice(0, length) for length in shape))
            params[path] = read(f"layers/{path}", index)[0]
        block = _block(c, "moe/router" in params)
        x = block(nested(params), x, jnp.int32(kinds.index(kind)), tables)
    return _head(weights, np.asarray(x), read)


@functools.lru_cache(maxsize=2)  # compiled once for a checkpoint and its copy
def _block(config: ModelConfig, has_experts: bool) -> Callable[..., jax.Array]:
    block = Block(config, ComputeConfig(dtype="float32", remat="none"), has_experts)
    return jax.jit(
        lambda params, x, kind, tables: block.apply({"params": params}, x, kind, tables, None)[0]
    )


def _head(weights: Weights, x: np.ndarray, read: Callable[..., np.ndarray]) -> np.ndarray:
    """The last norm and the head, a piece of the table at a time."""
    c = weights.model
    if c.norm == "rms":
        x = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(read("final_norm")), c.norm_eps))
    else:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
    out = np.zeros((*x.shape[:-1], c.vocab_rows), np.float32)
    name = "embed" if c.tie_embeddings else "lm_head"
    for index in pieces(weights, f"params/{name}"):
        part = read(name, index)
        if c.tie_embeddings:
            out[..., index[0]] += x[..., index[1]] @ part.T
        else:
            out[..., index[1]] += x[..., index[0]] @ part
    return out[..., : c.vocab_size]
