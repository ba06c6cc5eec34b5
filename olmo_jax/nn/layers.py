"""Weights, the one product with them, norms and the MLP.

Einsum letters, here and in the whole package: b batch, t query position, s key position,
d d_model, n heads, k kv heads, g heads per kv head, h head_dim, f d_ff, v vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.parallel.sharding import (
    Axes,
    axis_index,
    axis_size,
    constrain,
    on_each_device,
    sum_gradient,
)

Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


@flax.struct.dataclass
class Named(nn.Partitioned):
    """A fresh parameter with its logical axes; unlike flax's, it never constrains by itself."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The array."""
        return self.value


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, init: Init
) -> jax.Array:
    """Declare a parameter in fp32: made by `init` with its logical axes, or fetched and checked.

    Raises:
      ValueError: if the parameter is missing or has another shape, by its path.
    """
    if module.is_initializing():
        boxed: Any = lambda *a: Named(init(*a), axes)  # noqa: E731
        return module.param(name, boxed, shape, jnp.float32)
    path = "/".join((*module.path, name))
    if not module.has_variable("params", name):
        raise ValueError(f"parameter {path} is missing; the model needs it with shape {shape}")
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(f"parameter {path} has shape {value.shape}, the config needs {shape}")
    return value


def normal(std: float | jax.Array) -> Init:
    """A normal of this std, truncated at three of it (`trunc_normal_` of OLMo and OLMo-core)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype)

    return init


def constant(value: float) -> Init:
    """Every entry the same."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def matrix_init(config: ModelConfig, fan_in: int, layer: jax.Array | None = None) -> Init:
    """How a matrix of a block starts: OLMo 2's one std, or OLMo 1's `mitchell`.

    Args:
      config: the model.
      fan_in: inputs of the matrix.
      layer: index of the layer, for the matrices that write to the residual stream: mitchell
        makes them smaller with depth.
    Source: OLMo olmo/initialization.py; OLMo-core nn/transformer/init.py.
    """
    if config.init == "normal":
        return normal(config.init_std)
    return normal(fan_in**-0.5 if layer is None else (2.0 * fan_in * (layer + 1)) ** -0.5)


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
    table: jax.Array, tokens: jax.Array, dtype: str, grad_dtype: str = "float32"
) -> jax.Array:
    """Rows of `table [vocab, d_model]` at `tokens [batch, seq]`, in `dtype`.

    Its gradient is added up in fp32 on each device, and over the mesh in `grad_dtype`.
    """
    # Looked up in a table sharded on d_model, XLA would rematerialise the whole output.
    return jnp.take(constrain(table, ("vocab", None)).astype(dtype), tokens, axis=0)


def _lookup_forward(table, tokens, dtype, grad_dtype):
    return lookup(table, tokens, dtype, grad_dtype), (table, tokens)


def _lookup_backward(dtype, grad_dtype, residuals, dy):
    table, tokens = residuals
    n_rows = table.shape[0] // axis_size("tensor")

    def here(tokens, dy):
        row = tokens - axis_index("tensor") * n_rows
        row = jnp.where(row < 0, n_rows, row)  # beyond the end: dropped
        sums = jnp.zeros((n_rows, dy.shape[-1]), jnp.float32)
        sums = sums.at[row].add(dy.astype(jnp.float32), mode="drop").astype(grad_dtype)
        return (sum_gradient(sums, 1),)

    into: list[Axes] = [("batch", "seq"), ("batch", "seq", None)]
    (d_table,) = on_each_device(here, into, [("vocab", "embed")], tokens, dy)
    return d_table.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def norm(
    module: nn.Module, name: str, x: jax.Array, config: ModelConfig, gain: float = 1.0
) -> jax.Array:
    """Normalise `x [batch, seq, d_model]` as the family does, in fp32, back in the dtype of `x`.

    rms: x / sqrt(mean x² + eps) times a weight, the product in fp32 (OLMo 2, Olmo 3).
    nonparametric: LayerNorm without weight or bias (OLMo 1).
    """
    with jax.named_scope(name):
        if config.norm == "nonparametric":
            y = x.astype(jnp.float32)
            y = y - y.mean(-1, keepdims=True)
            y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps)
            return y.astype(x.dtype)
        scale = weight(module, name, x.shape[-1:], ("norm",), constant(gain))
        return rms_norm(x, scale, config.norm_eps)


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
    def __call__(self, x: jax.Array, layer: jax.Array) -> jax.Array:
        """`x [batch, seq, d_model]` -> the same shape; `layer`: index, for the initial scale."""
        c, product = self.config, functools.partial(einsum, grad_dtype=self.compute.grad_dtype)
        d, f = c.d_model, c.d_ff
        w_gate = weight(self, "w_gate", (d, f), ("embed", "mlp"), matrix_init(c, d))
        w_up = weight(self, "w_up", (d, f), ("embed", "mlp"), matrix_init(c, d))
        w_down = weight(self, "w_down", (f, d), ("mlp", "embed"), matrix_init(c, f, layer))
        gate = product("btd,df->btf", x, w_gate)
        up = product("btd,df->btf", x, w_up)
        gate = checkpoint_name(gate, "gate")
        up = checkpoint_name(up, "up")
        return gated_product(gate, up, w_down, self.compute.grad_dtype)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def gated_product(gate: jax.Array, up: jax.Array, w: jax.Array, grad_dtype: str) -> jax.Array:
    """silu(gate) · up times `w`; gate and up `[batch, seq, d_ff]`, w `[d_ff, d_model]`."""
    return einsum("btf,fd->btd", jax.nn.silu(gate) * up, w, grad_dtype)
