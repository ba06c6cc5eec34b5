"""QK-norm and RoPE in one pass over flat queries or keys, on a TPU.

Plain XLA reads and writes `[batch, seq, heads · head_dim]` several times for them, and turns it
into `[…, heads, head_dim]`, which a TPU tiles in another way, and back. Here a block of rows is
read once and written once, in each direction: y = turn(x · rsqrt(mean x² + eps) · gain), where
turn(n) = n · cos + swap(n) · sin on each head and swap exchanges its halves. Statistics and
products are fp32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from olmo_jax.config.model import LANES
from olmo_jax.parallel.sharding import Axes, axis_size, device, is_split_by_xla, on_each_device

_BLOCK = 1 << 19  # numbers of a block of rows
F32 = jnp.float32


def fits(head_dim: int) -> bool:
    """Whether heads are columns of whole tiles of a TPU, and the norm needs no other device."""
    is_whole = axis_size("tensor") == 1 and not is_split_by_xla()
    return device().platform == "tpu" and head_dim % LANES == 0 and is_whole


def scales(head_dim: int) -> tuple[float, float]:
    """What queries are scaled with when they are rotated, and what attention scales scores with.

    The two make `head_dim ** -0.5`. Kernels for TPUs take powers of 2: where the rotation is ours,
    it takes on the whole scale and the change of base, so that they multiply by nothing.
    """
    scale = math.log(2) if fits(head_dim) else head_dim**-0.5
    return head_dim**-0.5 / scale, scale


def norm_rotate(
    x: jax.Array,
    gain: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    interpret: bool = False,
) -> jax.Array:
    """Normalise over all heads together, and turn each head by its positions.

    Args:
      x: [batch, seq, heads · head_dim].
      gain: [heads · head_dim] of the norm; None for no norm.
      cos, sin: [1 or batch, seq, head_dim / 2] fp32.
      eps: of the norm.
      interpret: run on any platform, slowly.

    Returns: the shape and dtype of `x`.
    """
    cos = jnp.concatenate([cos, cos], -1)
    sin = jnp.concatenate([-sin, sin], -1)
    return _rotate(x, gain, cos, sin, _Options(cos.shape[-1], eps, interpret))


class _Options(NamedTuple):
    head_dim: int
    eps: float
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rotate(x, gain, cos, sin, options):
    return _forward(x, gain, cos, sin, options)[0]


def _forward(x, gain, cos, sin, options):
    def run(*arrays):
        return tuple(_call(_turn, options, ["rows"], *arrays))

    (y,) = _spread(run, 1, x, gain, cos, sin)
    return y, (x, gain, cos, sin)


def _backward(options, residuals, dy):
    x, gain, cos, sin = residuals

    def run(dy, gain, cos, sin, x):
        kinds = ["rows"] if gain is None else ["rows", "sums"]
        dx, *sums = _call(_turn_back, options, kinds, dy, gain, cos, sin, x)
        return (dx, *(s[:, :, 0] for s in sums))

    dx, *sums = _spread(run, 1 + (gain is not None), dy, gain, cos, sin, x)
    d_gain = None if gain is None else sums[0].sum((0, 1)).astype(gain.dtype)
    return dx, d_gain, None, None


_rotate.defvjp(_forward, _backward)


def _spread(run: Any, n_results: int, *arrays: Any) -> Any:
    """Call on the rows of each device; the gain comes second, and the tables after it."""
    rows: Axes = ("batch", "seq", None)
    table: Axes = ("batch" if arrays[2].shape[0] > 1 else None, "seq", None)
    into = (rows, (None,), table, table, *[rows] * (len(arrays) - 4))
    return on_each_device(run, into, (rows,) * n_results, *arrays)


def _call(
    kernel: Any,
    options: _Options,
    kinds: list[str],
    x: jax.Array,
    gain: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *more: jax.Array,
) -> list[jax.Array]:
    """Run a kernel on blocks of rows; it gives rows, or sums `[batch, blocks, 1, width]` fp32."""
    batch, seq, width = x.shape
    rows = min(max(16, _BLOCK // width // 16 * 16), -(-seq // 16) * 16)
    n_blocks = -(-seq // rows)
    pad = lambda a: jnp.pad(a, ((0, 0), (0, n_blocks * rows - seq), (0, 0)))  # noqa: E731
    x, cos, sin, *others = map(pad, (x, cos, sin, *more))
    block = pl.BlockSpec((None, rows, width), lambda b, i: (b, i, 0))
    turn = pl.BlockSpec(
        (None, rows, options.head_dim), lambda b, i: (b if cos.shape[0] > 1 else 0, i, 0)
    )
    whole = None if gain is None else pl.BlockSpec((1, width), lambda b, i: (0, 0))
    results = {
        "rows": (block, jax.ShapeDtypeStruct(x.shape, x.dtype)),
        "sums": (
            pl.BlockSpec((None, None, 1, width), lambda b, i: (b, i, 0, 0)),
            jax.ShapeDtypeStruct((batch, n_blocks, 1, width), F32),
        ),
    }
    outputs = pl.pallas_call(
        functools.partial(kernel, options=options),
        grid=(batch, n_blocks),
        in_specs=[block, whole, turn, turn, *[block] * len(others)],
        out_specs=[results[kind][0] for kind in kinds],
        out_shape=[results[kind][1] for kind in kinds],
        scratch_shapes=[pltpu.VMEM((rows, width), F32)] if others else [],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=options.interpret,
        name=f"qk{kernel.__name__}",
    )(x, None if gain is None else gain[None], cos, sin, *others)
    return [a[:, :seq] if kind == "rows" else a for a, kind in zip(outputs, kinds, strict=True)]


def _turn(x, gain, cos, sin, y, *, options):
    """A step of the forward kernel."""
    norm = None if gain is None else _norm(x, options)
    for at in _heads(x, options):
        part = x[:, at].astype(F32)
        if norm is not None and gain is not None:
            part = part * norm * gain[:, at]
        turned = part * cos[...] + _swap(part) * sin[...]
        y[:, at] = turned.astype(y.dtype)


def _turn_back(dy, gain, cos, sin, x, dx, *rest, options):
    """A step of the backward kernel; with a norm also the sums over rows for its gain."""
    *d_gain, held = rest
    norm = None if gain is None else _norm(x, options)
    total = jnp.zeros((x.shape[0], LANES), F32)
    for at in _heads(x, options):
        part = dy[:, at].astype(F32)
        part = part * cos[...] + _swap(part * sin[...])
        if norm is None or gain is None:
            dx[:, at] = part.astype(dx.dtype)
            continue
        seen = x[:, at].astype(F32)
        d_gain[0][:, at] = jnp.sum(part * seen * norm, 0, keepdims=True)
        held[:, at] = part = part * gain[:, at]
        product = part * seen
        total += sum(product[:, i : i + LANES] for i in range(0, options.head_dim, LANES))
    if norm is None:
        return
    shared = norm * norm * norm * (total.sum(1, keepdims=True) / x.shape[1])
    for at in _heads(x, options):
        dx[:, at] = (norm * held[:, at] - shared * x[:, at].astype(F32)).astype(dx.dtype)


def _norm(x, options):
    """One over the RMS of each row, `[rows, 1]`."""
    total = jnp.zeros((x.shape[0], LANES), F32)
    for i in range(0, x.shape[1], LANES):
        part = x[:, i : i + LANES].astype(F32)
        total += part * part
    return jax.lax.rsqrt(total.sum(1, keepdims=True) / x.shape[1] + options.eps)


def _heads(x, options):
    return [slice(i, i + options.head_dim) for i in range(0, x.shape[1], options.head_dim)]


def _swap(x):
    """The halves of each row exchanged."""
    if x.shape[1] == LANES:
        return pltpu.roll(x, LANES // 2, 1)
    a, b = jnp.split(x, 2, axis=1)
    return jnp.concatenate([b, a], axis=1)
