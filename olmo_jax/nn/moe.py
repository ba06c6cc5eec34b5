"""A mixture of experts: each token takes the few MLPs that its router prefers; none is dropped.

Router and experts as OLMoE was trained (arXiv 2409.02060): softmax over all experts in fp32, the
top k of it as weights, not renormalised. Letters: n tokens, e experts, k experts of a token.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from olmo_jax.config import ComputeConfig, ModelConfig
from olmo_jax.kernels.grouped_matmul import grouped_matmul
from olmo_jax.nn.layers import matrix_init, weight
from olmo_jax.sharding import BATCH_AXES, axis_size, spec

Stats = dict[str, jax.Array]  # of one layer's router, over all tokens of the batch


class MoE(nn.Module):
    """Router and experts in the place of the MLP."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array) -> tuple[jax.Array, Stats]:
        """`x [batch, seq, d_model]` -> the same shape, and what the router did.

        Args:
          x: input of the block's feed-forward part.
          layer: int32, the layer's index, for the initial scale.

        Returns:
          The experts' weighted sum, and `tokens [e]` (routed to each), `probability [e]` (mean
          softmax), `z` (mean of logsumexp² of the logits), all fp32 and over the whole batch.
        """
        c, e, d, f = self.config, self.config.n_experts, self.config.d_model, self.config.d_ff
        # Axes and initial scale of each; the last writes to the residual stream.
        router = weight(self, "router", (d, e), ("embed", None), matrix_init(c, d))
        into, out_of = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        w_gate = weight(self, "w_gate", (e, d, f), into, matrix_init(c, d))
        w_up = weight(self, "w_up", (e, d, f), into, matrix_init(c, d))
        w_down = weight(self, "w_down", (e, f, d), out_of, matrix_init(c, f, layer))

        if self.is_initializing():  # one token, which no mesh can split
            return x, {}
        local = functools.partial(_experts, c, self.compute)
        if jax.sharding.get_abstract_mesh().empty:
            return local(x, router, w_gate, w_up, w_down)
        rows = spec(("batch", "seq", None))
        # Each device sorts and computes its own tokens; what it needs of others is in `_experts`.
        return jax.shard_map(
            local,
            in_specs=(rows, PartitionSpec(), spec(into), spec(into), spec(out_of)),
            out_specs=(rows, PartitionSpec()),
            check_vma=False,
        )(x, router, w_gate, w_up, w_down)


def route(
    x: jax.Array, router: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which experts each token takes.

    Args:
      x: [n, d_model].
      router: [d_model, e].
      config: `n_experts_per_token`, `normalize_expert_weights`.

    Returns: expert numbers `[n, k]` int32, their weights `[n, k]`, and for the losses the softmax
      over all experts `[n, e]` and the logsumexp of the logits `[n]`, fp32.
    """
    # fp32 in truth, on a TPU too: a rounded logit can change the choice.
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=exact)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = jnp.exp(logits - lse)
    weights, chosen = jax.lax.top_k(scores, config.n_experts_per_token)
    if config.normalize_expert_weights:
        weights = weights / weights.sum(-1, keepdims=True)
    return chosen, weights, scores, lse[:, 0]


def _experts(
    c: ModelConfig,
    compute: ComputeConfig,
    x: jax.Array,
    router: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
) -> tuple[jax.Array, Stats]:
    """The experts of a device's tokens `x [batch, seq, d_model]`, inside `shard_map` on a mesh."""
    tokens = x.reshape(-1, x.shape[-1])
    chosen, weights, scores, lse = route(tokens, router, c)
    stats = _stats(chosen, scores, lse, c.n_experts)
    here = w_gate.shape[0]  # experts of this device
    if here < c.n_experts:  # the tokens of all devices that share the experts
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
        tokens, chosen, weights = gather(tokens), gather(chosen), gather(weights)
        chosen = chosen - here * jax.lax.axis_index("expert")
        chosen = jnp.where((chosen >= 0) & (chosen < here), chosen, here)  # others sort last

    order = jnp.argsort(chosen.reshape(-1))  # by expert; stable, so by token within one
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(chosen.reshape(-1), length=here + 1)[:here].astype(jnp.int32)

    is_split = axis_size("fsdp") > 1
    rows = _spread(tokens, order, inverse, c.n_experts_per_token)
    into, out_of = (("fsdp", 1), ("fsdp", 2)) if is_split else (None, None)
    gate: Any = grouped_matmul(rows, w_gate, sizes, into, compute.grad_dtype)
    up: Any = grouped_matmul(rows, w_up, sizes, into, compute.grad_dtype)
    y = grouped_matmul(jax.nn.silu(gate) * up, w_down, sizes, out_of, compute.grad_dtype)
    y = _collect(y, order, inverse).reshape(*chosen.shape, -1)
    out = jnp.einsum("nkd,nk->nd", y, weights.astype(y.dtype), preferred_element_type=jnp.float32)
    if axis_size("tensor") > 1:
        out = jax.lax.psum(out, "tensor")
    if here < c.n_experts:
        out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
    return out.astype(x.dtype).reshape(x.shape), stats


def _stats(chosen: jax.Array, scores: jax.Array, lse: jax.Array, n_experts: int) -> Stats:
    """Sums and means over the tokens of all devices."""
    stats = {
        "tokens": jnp.bincount(chosen.reshape(-1), length=n_experts).astype(jnp.float32),
        "probability": scores.mean(0),
        "z": jnp.mean(jnp.square(lse)),
    }
    axes = tuple(name for name in (*BATCH_AXES, "context") if axis_size(name) > 1)
    if not axes:
        return stats
    total = jax.lax.psum(stats, axes)
    return total | {name: total[name] / axis_size(*axes) for name in ("probability", "z")}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> jax.Array:
    """`x [n, d]` -> `[n * k, d]`, each token k times, in order; the gradient gathers, as this."""
    return x[order // k]


def _spread_backward(k: int, residuals: Any, dy: jax.Array) -> tuple[jax.Array, None, None]:
    _, inverse = residuals
    dx = dy[inverse].reshape(-1, k, dy.shape[-1]).astype(jnp.float32).sum(1)
    return dx.astype(dy.dtype), None, None


def _spread_forward(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> Any:
    return _spread(x, order, inverse, k), (order, inverse)


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(y: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Sorted rows `[n * k, d]` back in the order of the tokens."""
    return y[inverse]


def _collect_forward(y: jax.Array, order: jax.Array, inverse: jax.Array) -> Any:
    return _collect(y, order, inverse), order


def _collect_backward(order: jax.Array, dy: jax.Array) -> Any:
    return dy[order], None, None


_collect.defvjp(_collect_forward, _collect_backward)
