"""Rotary position embedding on half-split heads, plain and YaRN.

Source: arXiv 2104.09864; YaRN arXiv 2309.00071, as in OLMo-core nn/rope.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.config.model import ModelConfig, yarn_attention

Table = tuple[jax.Array, jax.Array]


def frequencies(config: ModelConfig, kind: str) -> tuple[np.ndarray, float]:
    """Inverse frequencies `[head_dim / 2]` (radians per position) and the factor on cos and sin.

    YaRN applies to full layers only. Computed in float64: a bf16 or even fp32 power would be
    wrong by whole radians at 65,536 positions.
    """
    dim, theta = config.head_dim, config.rope_theta
    inverse = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if kind != "full" or config.yarn_factor is None:
        return inverse, 1.0

    def correction_dim(rotations: float) -> float:
        turns = config.yarn_original_len / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(config.yarn_beta_fast)), 0)
    high = min(math.ceil(correction_dim(config.yarn_beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = config.yarn_attention_factor or yarn_attention(config.yarn_factor)
    return inverse * (1.0 - ramp + ramp / config.yarn_factor), factor


def table(config: ModelConfig, kind: str, positions: jax.Array) -> Table:
    """cos and sin, fp32 `[1 or batch, seq, head_dim / 2]`, at `positions [1 or batch, seq]`."""
    inverse, factor = frequencies(config, kind)
    inverse = jnp.asarray(inverse, jnp.float32)[None, None]
    angles = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def kinds(config: ModelConfig) -> list[str]:
    """The kinds of layers that the model has, in the order of `tables`."""
    return sorted(set(config.layer_kinds))


def tables(config: ModelConfig, positions: jax.Array) -> Table:
    """`table` of each kind of layer, `[kinds, 1 or batch, seq, head_dim / 2]`."""
    cos, sin = zip(*(table(config, kind, positions) for kind in kinds(config)), strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def rotate(x: jax.Array, cos_sin: Table) -> jax.Array:
    """Turn `x [batch, seq, heads, head_dim]` by its positions, in fp32, back in its dtype.

    Dimension i is paired with i + head_dim / 2 (the "half" or NeoX form).
    """
    cos, sin = (t[:, :, None] for t in cos_sin)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
