"""A mixture of experts: each token takes the few MLPs that its router prefers; none is dropped.

Each device routes and sorts its own tokens. Experts lie split over the mesh axis `expert`, and rows
travel to them and back; over `fsdp` their weights are gathered, over `tensor` their width is split.
Letters: n tokens, e experts, k experts of a token. Source: OLMoE, arXiv 2409.02060.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.config.parameters import table
from olmo_jax.kernels import exchange
from olmo_jax.kernels.grouped_matmul import grouped_matmul
from olmo_jax.nn import router as routing
from olmo_jax.nn.layers import weight
from olmo_jax.nn.router import Stats
from olmo_jax.parallel.sharding import axis_size, spec, summed


class MoE(nn.Module):
    """Router and experts in the place of the MLP."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Stats]:
        """`x [batch, seq, d_model]` -> the same shape, and what the router did.

        Args:
          x: input of the block's feed-forward part.

        Returns:
          The experts' weighted sum, and the `Stats` of the router.
        """
        c = self.config
        names = ["router", "w_gate", "w_up", "w_down"]
        names += ["router_bias"] if c.router_bias_gamma is not None else []
        paths = [f"layers/moe/{name}" for name in names]
        given = x, *(weight(self, path) for path in paths)
        local = functools.partial(_experts, c, self.compute)
        if jax.sharding.get_abstract_mesh().empty:
            return local(*given)
        rows, whole = spec(("batch", "seq", None)), PartitionSpec()
        logical = [table(c)[path].logical for path in paths]
        return jax.shard_map(
            local,
            # Each device routes with the whole router.
            in_specs=(rows, *(spec(x) if "expert" in x else whole for x in logical)),
            out_specs=(rows, whole),
            check_vma=False,
        )(*given)


def _experts(
    c: ModelConfig,
    compute: ComputeConfig,
    x: jax.Array,
    router: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """The experts of a device's tokens `x [batch, seq, d_model]`, inside `shard_map` on a mesh."""
    tokens = x.reshape(-1, x.shape[-1])
    scores, lse = routing.score(tokens, router)
    travel = functools.partial(_travel, c, compute, (w_gate, w_up, w_down))
    if c.router == "expert_choice":
        token, weights, sizes = routing.choose_tokens(scores, c, len(x))
        y, needed = travel(tokens[token], sizes)
        y = y.astype(jnp.float32) * weights[:, None]
        out = jnp.zeros(tokens.shape, jnp.float32).at[token].add(y)
    else:
        chosen, weights = routing.choose_experts(scores, c, bias)
        order = jnp.argsort(chosen.reshape(-1))  # by expert; stable, so by token within one
        inverse = jnp.argsort(order)
        sizes = jnp.bincount(chosen.reshape(-1), length=c.n_experts).astype(jnp.int32)
        y, needed = travel(_spread(tokens, order, inverse, c.n_experts_per_token), sizes)
        y = _collect(y, order, inverse).reshape(*chosen.shape, -1)
        weights = weights.astype(y.dtype)
        out = jnp.einsum("nkd,nk->nd", y, weights, preferred_element_type=jnp.float32)
    out = summed(out, "tensor")
    stats = routing.stats(sizes, scores, lse) | needed
    return out.astype(x.dtype).reshape(x.shape), stats


Matrices = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down of a device's experts


def _travel(
    c: ModelConfig, compute: ComputeConfig, weights: Matrices, rows: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, Stats]:
    """`rows [n, d_model]`, by expert, through their experts and back; `buffer` if it is limited."""
    if len(weights[0]) == c.n_experts:
        return _mlps(rows, sizes, *weights, compute.grad_dtype), {}
    buffer = _buffer(c, compute, len(rows))
    plan, needed = exchange.plan(sizes, buffer)
    y: Any = exchange.send(rows, plan, buffer)
    y = _mlps(y, plan.sizes, *weights, compute.grad_dtype)
    y = exchange.send_back(y, plan, len(rows))
    if compute.expert_buffer is None:
        return y, {}
    return y, {"buffer": routing.over_devices(jax.lax.pmax, needed / len(rows))}


def _mlps(
    rows: jax.Array,
    sizes: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    grad_dtype: str,
) -> jax.Array:
    """SwiGLU of each row `[rows, d_model]`, which lie by expert, with the weights of its expert."""
    into, out_of = (("fsdp", 1), ("fsdp", 2)) if axis_size("fsdp") > 1 else (None, None)
    gate: Any = grouped_matmul(rows, w_gate, sizes, into, grad_dtype)
    up: Any = grouped_matmul(rows, w_up, sizes, into, grad_dtype)
    return grouped_matmul(jax.nn.silu(gate) * up, w_down, sizes, out_of, grad_dtype)


def _buffer(c: ModelConfig, compute: ComputeConfig, n_rows: int) -> int:
    """Rows that the experts of a device can take from all devices, each with `n_rows`."""
    if c.router == "expert_choice":  # always balanced
        return n_rows
    ways, k = axis_size("expert"), c.n_experts_per_token
    most = ways * n_rows // k * min(k, c.n_experts // ways)  # a token goes to an expert once
    if compute.expert_buffer is None:
        return most
    # A little more than the step allows, whose fp32 cannot tell it from what is allowed.
    rows = (1 + 1e-6) * compute.expert_buffer * n_rows
    return min(most, 8 * math.ceil(rows / 8))


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
