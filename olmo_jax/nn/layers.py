"""Weights, the one product with them, norms and the MLP.

Einsum letters, here and in the whole package: b batch, t query position, s key position,
d d_model, n heads, k kv heads, g heads per kv head, h head_dim, f d_ff, v vocabulary.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.config.parameters import table
from olmo_jax.parallel.sharding import (
    Axes,
    axis_index,
    axis_size,
    constrain,
    on_each_device,
    sum_gradient,
)


def weight(module: Any, path: str) -> jax.Array:
    """Fetch a parameter of one layer, or of none, by its path in `config/parameters.py`.

    Raises:
      ValueError: if it is missing or has another shape.
    """
    *_, name = path.split("/")
    value = module.get_variable("params", name)
    check(path, table(module.config)[path].sizes, value)
    return value


def check(path: str, shape: tuple[int, ...], value: Any) -> None:
    """Refuse a parameter that is missing (None), or has another shape than the config needs."""
    if value is None:
        raise ValueError(f"parameter {path} is missing; the model needs it with shape {shape}")
    if value.shape != shape:
        raise ValueError(f"parameter {path} has shape {value.shape}, the config needs {shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(equation: str, x: jax.Array, w: jax.Array, grad_dtype: str = "float32") -> jax.Array:
    """The product of activations with a weight: `x [..., in...]` by `w [in..., out...]`.

    The weight is cast to the dtype of `x`; its gradient is accumulated, and so reduced over the
    mesh, in `grad_dtype`: autodiff alone would make it bf16 in a bf16 forward pass.
    """
    return _matmul(equation, x, w)


def _matmul(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    (x_in, w_in), out = _split(equation), equation.split("->")[1]
    w = w.astype(x.dtype)
    if axis_size("context") > 1:  # merging two sharded dimensions would gather them
        return jnp.einsum(equation, x, w)
    n = sum(letter in w_in for letter in x_in)  # contracted dimensions
    size = math.prod(w.shape[:n])
    y = x.reshape(-1, size) @ w.reshape(size, -1)
    return y.reshape(*x.shape[: x.ndim - n], *w.shape[n:]) if len(out) else y


def _split(equation: str) -> tuple[str, str]:
    x, w = equation.split("->")[0].split(",")
    return x, w


def _einsum_forward(equation, x, w, grad_dtype):
    return _matmul(equation, x, w), (x, w)


def _einsum_backward(equation, grad_dtype, residuals, dy):
    x, w = residuals
    n = sum(letter in _split(equation)[1] for letter in _split(equation)[0])
    size, dtype = math.prod(w.shape[:n]), jnp.dtype(grad_dtype)
    if axis_size("context") > 1:
        x_in, w_in = _split(equation)
        out = equation.split("->")[1]
        dx = jnp.einsum(f"{out},{w_in}->{x_in}", dy, w.astype(dy.dtype))
        dw = jnp.einsum(f"{x_in},{out}->{w_in}", x, dy, preferred_element_type=dtype)
        return dx, dw.astype(w.dtype)
    dy = dy.reshape(-1, math.prod(w.shape[n:]))
    dx = (dy @ w.astype(dy.dtype).reshape(size, -1).T).reshape(x.shape)
    dw = jnp.matmul(x.reshape(-1, size).T, dy, preferred_element_type=dtype)
    if w.ndim > 2:  # XLA would reshape, and so copy, the activations in the place of the gradient
        dw = jax.lax.optimization_barrier(dw)
    return dx, dw.reshape(w.shape).astype(w.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(
    embed: jax.Array, tokens: jax.Array, dtype: str, grad_dtype: str = "float32"
) -> jax.Array:
    """Rows of `embed [vocab, d_model]` at `tokens [batch, seq]`, in `dtype`.

    Its gradient is added up in fp32 on each device, and over the mesh in `grad_dtype`.
    """
    # Looked up in a table sharded on d_model, XLA would rematerialise the whole output.
    return jnp.take(constrain(embed, ("vocab", None)).astype(dtype), tokens, axis=0)


def _lookup_forward(embed, tokens, dtype, grad_dtype):
    return lookup(embed, tokens, dtype, grad_dtype), (embed, tokens)


def _lookup_backward(dtype, grad_dtype, residuals, dy):
    embed, tokens = residuals
    n_rows = embed.shape[0] // axis_size("tensor")

    def here(tokens, dy):
        row = tokens - axis_index("tensor") * n_rows
        row = jnp.where(row < 0, n_rows, row)  # beyond the end: dropped
        sums = jnp.zeros((n_rows, dy.shape[-1]), jnp.float32)
        sums = sums.at[row].add(dy.astype(jnp.float32), mode="drop").astype(grad_dtype)
        return (sum_gradient(sums, 1),)

    into: list[Axes] = [("batch", "seq"), ("batch", "seq", None)]
    (d_embed,) = on_each_device(here, into, [("vocab", "embed")], tokens, dy)
    return d_embed.astype(embed.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def norm(module: Any, path: str, x: jax.Array) -> jax.Array:
    """Normalise `x [batch, seq, d_model]` as the family does, in fp32, back in the dtype of `x`.

    rms: x / sqrt(mean x² + eps) times a weight, the product in fp32 (OLMo 2, Olmo 3).
    nonparametric: LayerNorm without weight or bias (OLMo 1).
    """
    c: ModelConfig = module.config
    with jax.named_scope(path.split("/")[-1]):
        if c.norm != "nonparametric":
            return rms_norm(x, weight(module, path), c.norm_eps)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + c.norm_eps)
        return y.astype(x.dtype)


# Here and in `gated_product` the backward pass keeps the inputs only and makes the rest again:
# elementwise work is cheaper than the memory, even where `compute.remat` keeps everything else.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the trailing dimensions that `scale` has, statistics and product in fp32."""
    axes = tuple(range(-scale.ndim, 0))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + eps)
    return (y * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)).astype(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). arXiv 2002.05202."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [batch, seq, d_model]` -> the same shape."""
        product = functools.partial(einsum, grad_dtype=self.compute.grad_dtype)
        w_gate = weight(self, "layers/mlp/w_gate")
        w_up = weight(self, "layers/mlp/w_up")
        w_down = weight(self, "layers/mlp/w_down")
        gate = product("btd,df->btf", x, w_gate)
        up = product("btd,df->btf", x, w_up)
        gate = checkpoint_name(gate, "gate")
        up = checkpoint_name(up, "up")
        return gated_product(gate, up, w_down, self.compute.grad_dtype)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def gated_product(gate: jax.Array, up: jax.Array, w: jax.Array, grad_dtype: str) -> jax.Array:
    """silu(gate) · up times `w`; gate and up `[batch, seq, d_ff]`, w `[d_ff, d_model]`."""
    return einsum("btf,fd->btd", jax.nn.silu(gate) * up, w, grad_dtype)
