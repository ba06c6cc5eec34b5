"""Rows to the devices of their experts and back, over the mesh axis `expert`, in a `shard_map`.

A block is what one device has for one expert. At home the blocks of a device lie by expert; in the
buffer of the experts' device they lie by expert, then by the device that they come from: ready for
`grouped_matmul`. Only blocks travel, in one ragged exchange on TPU and GPU. XLA has none for a CPU:
there every pair of devices exchanges as many rows as it could ever have, mostly zeros.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

AXIS = "expert"


class RowBlocks(NamedTuple):
    """The blocks that a device sends or receives, by other device: `[devices, blocks]` int32."""

    here: jax.Array  # row in its own array at which a block begins
    sizes: jax.Array  # rows of a block
    there: jax.Array  # row at which it begins on the other device


class Exchange(NamedTuple):
    """What a device exchanges; the way back has the roles of both swapped."""

    home: RowBlocks
    away: RowBlocks  # of the other devices, for the experts of this one

    @property
    def sizes(self) -> jax.Array:
        """Rows in the buffer for each expert of this device."""
        return self.away.sizes.sum(0)


def plan(sizes: jax.Array, buffer: int) -> tuple[Exchange, jax.Array]:
    """Agree with the other devices on the place of each block.

    Args:
      sizes: [experts] int32, rows of this device for every expert; they lie in this order.
      buffer: rows that a device can take; what is beyond is not sent.

    Returns:
      The plan, and how many rows the device with the most has to take, int32.
    """
    sizes = jax.lax.all_gather(sizes, AXIS)  # [devices, experts]
    n = len(sizes)
    at_home = jnp.cumsum(sizes, 1) - sizes
    by_expert = sizes.T.reshape(n, -1)  # of each device the blocks in the order of its buffer
    at_expert = (jnp.cumsum(by_expert, 1) - by_expert).reshape(-1, n).T
    needed = by_expert.sum(1).max()
    sizes = jnp.clip(buffer - at_expert, 0, sizes)
    at_expert = jnp.minimum(at_expert, buffer)

    me = jax.lax.axis_index(AXIS)
    own = lambda a: a[me].reshape(n, -1)  # noqa: E731
    ours = lambda a: a.reshape(n, n, -1)[:, me]  # noqa: E731
    home = RowBlocks(own(at_home), own(sizes), own(at_expert))
    return Exchange(home, RowBlocks(ours(at_expert), ours(sizes), ours(at_home))), needed


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: jax.Array, plan: Exchange, buffer: int) -> jax.Array:
    """`rows [n, d]`, by expert, to the experts: `[buffer, d]`, zero behind the last block."""
    return _move(rows, buffer, plan.home, plan.away)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(rows: jax.Array, plan: Exchange, n: int) -> jax.Array:
    """The way back of `send`: `rows [buffer, d]` to `[n, d]`, zero where nothing was sent."""
    return _move(rows, n, plan.away, plan.home)


# Each is the other's transpose; autodiff would exchange the offsets once more.
send.defvjp(
    lambda rows, plan, buffer: (send(rows, plan, buffer), (plan, len(rows))),
    lambda buffer, residuals, dy: (send_back(dy, *residuals), None),
)
send_back.defvjp(
    lambda rows, plan, n: (send_back(rows, plan, n), (plan, len(rows))),
    lambda n, residuals, dy: (send(dy, *residuals), None),
)


def _move(rows: jax.Array, n_out: int, sent: RowBlocks, received: RowBlocks) -> jax.Array:
    def ragged(rows: jax.Array, sent: RowBlocks, received: RowBlocks) -> Any:
        out = jnp.zeros((n_out, rows.shape[1]), rows.dtype)
        blocks = (a.reshape(-1) for a in (sent.here, sent.sizes, sent.there, received.sizes))
        return jax.lax.ragged_all_to_all(rows, out, *blocks, axis_name=AXIS)

    def padded(rows: jax.Array, sent: RowBlocks, received: RowBlocks) -> Any:
        most = min(len(rows), n_out)  # that a pair of devices can have
        parts = jnp.take(rows, _rows_of(sent, most), axis=0, mode="fill", fill_value=0)
        parts = jax.lax.all_to_all(parts, AXIS, 0, 0)
        out = jnp.zeros((n_out, rows.shape[1]), rows.dtype)
        return out.at[_rows_of(received, most)].set(parts, mode="drop")

    return jax.lax.platform_dependent(rows, sent, received, cpu=padded, default=ragged)


def _rows_of(blocks: RowBlocks, most: int) -> jax.Array:
    """The rows of all blocks of each other device, `[devices, most]`; too large behind the last."""

    def of_one(here: jax.Array, sizes: jax.Array) -> jax.Array:
        slot, ends = jnp.arange(most), jnp.cumsum(sizes)
        block = jnp.searchsorted(ends, slot, side="right")
        row = jnp.take(here - (ends - sizes), block, mode="clip") + slot
        return jnp.where(slot < ends[-1], row, jnp.iinfo(jnp.int32).max)

    return jax.vmap(of_one)(blocks.here, blocks.sizes)
