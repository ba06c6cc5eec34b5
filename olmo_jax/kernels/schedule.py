"""Which blocks of queries meet which blocks of keys, in which order, and which parts of them.

A kernel over blocks visits a flat list of pairs (block of queries, block of keys) that holds only
pairs with something to see. The list is data: made in NumPy where lengths and window say
everything, on the device where documents or a traced offset have a say, and then shorter where they
hide more. What a pair looks like inside depends only on the distance of its first query from its
first key, of which few are special: those where the diagonal or the edge of the window crosses the
block. Each such distance is a `kind` with a static outline (`tiles`), so that a kernel computes
nothing outside of it and masks only where the border runs.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.config.model import LANES

LOG2E = math.log2(math.e)  # kernels take powers of 2
# The lowest bits of a pair: the first or last one in a row of the list; the first or last one that
# meets its block across the rows.
FIRST, LAST, OPENS, CLOSES = 1, 2, 4, 8
SKIP, FULL = 0, 1  # kinds; then FULL among documents if there are any, then those of `borders`
_KIND, _KV, _Q = 4, 7, 19  # where the fields of a pair begin
MAX_BLOCKS, MAX_KINDS = 1 << (_Q - _KV), 1 << (_KV - _KIND)


class Blocks(NamedTuple):
    """Positions in a block of queries, of keys, and in a chunk of keys, inside and at borders."""

    q: int
    kv: int
    chunk: int
    border_chunk: int

    def fit(self, q_seq: int, kv_seq: int) -> "Blocks":
        """The same for sequences of any length, with little padding: multiples of LANES.

        The larger block stays a multiple of the smaller one.
        """
        large, small = max(self.q, self.kv), min(self.q, self.kv)
        ratio = large // small
        unit, seq = ratio * LANES, max(q_seq, kv_seq)
        block = _up(-(-seq // (-(-seq // large))), unit)
        q, kv = (block if size == large else block // ratio for size in (self.q, self.kv))
        return Blocks(q, kv, min(self.chunk, kv), min(self.border_chunk, kv))


class Tile(NamedTuple):
    """A part of a pair: some keys, the queries that see any of them, and those that see them all.

    Positions in the block: `keys` from, to; `queries` from, to; `clear` from, to, within `queries`.
    """

    keys: tuple[int, int]
    queries: tuple[int, int]
    clear: tuple[int, int]


class Schedule(NamedTuple):
    """The pairs `[1 or batch, n]` int32, how many to visit, and which blocks are in any of them.

    `of_q [1 or batch, blocks of queries]` and `of_kv` are bool; a kernel writes no others. It needs
    no code for other than these `kinds`.
    """

    pairs: Any
    count: Any
    of_q: Any
    of_kv: Any
    kinds: frozenset[int]


def q_block(pair: Any) -> Any:
    """Which block of queries."""
    return pair >> _Q


def kv_block(pair: Any) -> Any:
    """Which block of keys."""
    return (pair >> _KV) & (MAX_BLOCKS - 1)


def kind(pair: Any) -> Any:
    """What it looks like inside: SKIP, FULL, or a later one."""
    return (pair >> _KIND) & (MAX_KINDS - 1)


def borders(blocks: Blocks, window: int | None) -> list[int]:
    """Distances from first key to first query at which a pair is neither hidden nor all visible."""
    step = math.gcd(blocks.q, blocks.kv)
    limit = math.inf if window is None else window
    stop = blocks.kv if window is None else window + blocks.kv
    found = []
    for distance in range(-blocks.q + step, stop + step, step):
        lowest, highest = distance - blocks.kv + 1, distance + blocks.q - 1
        if highest >= 0 and lowest < limit and not (lowest >= 0 and highest < limit):
            found.append(distance)
    return found


def tiles(blocks: Blocks, window: int | None, distance: int | None) -> Iterator[Tile]:
    """The parts of a pair at this distance that hold anything visible; None: all is visible."""
    chunk = blocks.chunk if distance is None else blocks.border_chunk
    for start in range(0, blocks.kv, chunk):
        stop = min(start + chunk, blocks.kv)
        if distance is None:
            yield Tile((start, stop), (0, blocks.q), (0, blocks.q))
            continue
        # Query r sees key c if 0 <= distance + r - c < window.
        first, end = start - distance, blocks.q
        clear = [stop - 1 - distance, blocks.q]
        if window is not None:
            end = stop - 1 - distance + window
            clear[1] = start - distance + window
        first, end = _clip(first // LANES * LANES, blocks.q), _clip(_up(end, LANES), blocks.q)
        low = min(max(_up(clear[0], LANES), first), end)
        high = max(min(clear[1] // LANES * LANES, end), low)
        if first < end:
            yield Tile((start, stop), (first, end), (low, high))


def make(
    q_seq: int,
    kv_seq: int,
    blocks: Blocks,
    *,
    by: str,
    window: int | None,
    offset: Any = 0,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
) -> Schedule:
    """The pairs with anything visible.

    Args:
      q_seq, kv_seq: positions, multiples of the blocks.
      blocks: their sizes.
      by: "q" for rows of pairs that share their queries, "kv" for rows that share their keys.
      window: positions visible to the left, the own one included; None for all.
      offset: position of the first query minus that of the first key; may be traced. A multiple of
        the smaller block.
      q_ids, kv_ids: [batch, positions] int32, equal within a document; or None.

    Raises:
      NotImplementedError: for more blocks than a pair has bits for.
    """
    n_q, n_kv = q_seq // blocks.q, kv_seq // blocks.kv
    if max(n_q, n_kv) >= MAX_BLOCKS:
        raise NotImplementedError(
            f"attention impl='pallas': {max(n_q, n_kv)} blocks, there may be {MAX_BLOCKS - 1}"
        )
    is_static = isinstance(offset, int) and q_ids is None
    xp: Any = np if is_static else jnp
    kinds = _kinds(xp, n_q, n_kv, blocks, window, offset, q_ids is not None)[None]
    if q_ids is not None and kv_ids is not None:
        kinds = _with_documents(kinds, q_ids, kv_ids, n_q, n_kv)

    live = kinds != SKIP
    q, kv = xp.arange(n_q)[None, :, None], xp.arange(n_kv)[None, None, :]
    first_kv, last_kv = live.argmax(2)[:, :, None], _last(live, 2)[:, :, None]
    first_q, last_q = live.argmax(1)[:, None, :], _last(live, 1)[:, None, :]
    across, along = (kv == first_kv, kv == last_kv), (q == first_q, q == last_q)
    in_row, between = (across, along) if by == "q" else (along, across)
    flags = in_row[0] * FIRST + in_row[1] * LAST + between[0] * OPENS + between[1] * CLOSES
    pairs = (q << _Q) + (kv << _KV) + (kinds << _KIND) + flags
    reachable, found = _possible(n_q, n_kv, blocks, window, offset, q_ids is not None)
    met = live.any(2), live.any(1), found
    order = (0, 1, 2) if by == "q" else (0, 2, 1)
    pairs, live = (x.transpose(order).reshape(x.shape[0], -1) for x in (pairs, live))
    if is_static:
        return Schedule(pairs[live][None].astype(np.int32), int(live.sum()), *met)
    return Schedule(*_compact(pairs.astype(jnp.int32), live, reachable), *met)


def ranges(
    seq: int, q_block: int, kv_block: int, *, by: str, window: int | None, ids: Any = None
) -> Any:
    """For kernels that walk over blocks instead of a list: where each row of pairs begins and ends.

    Args:
      seq: positions, a multiple of both blocks.
      q_block, kv_block: positions in a block of queries and of keys.
      by: "q" for what each block of queries meets, "kv" for what each block of keys does.
      window: positions visible to the left, the own one included; None for all.
      ids: [batch, seq] int32, equal within a document; or None.

    Returns: `[1 or batch, rows, 4]` int32: the first block; the first one of a run in which all is
      visible; the end of that run; the end of all. In documents that lie one after the other
      nothing in between is hidden as a whole.
    """
    blocks, n_q, n_kv = Blocks(q_block, kv_block, 0, 0), seq // q_block, seq // kv_block
    kinds = _kinds(np, n_q, n_kv, blocks, window, 0, ids is not None)[None]
    xp: Any = np if ids is None else jnp
    if ids is not None:
        kinds = _with_documents(kinds, ids, ids, n_q, n_kv)
    if by == "kv":
        kinds = kinds.swapaxes(1, 2)
    live, clear, at = kinds != SKIP, kinds == FULL, np.arange(kinds.shape[2])[None, None]
    first, stop = live.argmax(2), _last(live, 2) + 1
    none = first if by == "q" else stop  # the diagonal is at the end of a row, or its beginning
    start = xp.where(clear.any(2), clear.argmax(2), none)
    after = ~clear & (at >= start[:, :, None])
    end = xp.where(after.any(2), after.argmax(2), stop)
    return xp.stack([first, start, xp.minimum(end, stop), stop], -1).astype(np.int32)


def _kinds(xp, n_q, n_kv, blocks, window, offset, has_documents):
    """[n_q, n_kv] int32."""
    distance = offset + xp.arange(n_q)[:, None] * blocks.q - xp.arange(n_kv)[None, :] * blocks.kv
    lowest, highest = distance - blocks.kv + 1, distance + blocks.q - 1
    full, live = lowest >= 0, highest >= 0
    if window is not None:
        full, live = full & (highest < window), live & (lowest < window)
    kinds = xp.where(full, FULL, SKIP)
    for i, border in enumerate(borders(blocks, window)):
        kinds = xp.where(live & (distance == border), FULL + 1 + has_documents + i, kinds)
    return kinds.astype(xp.int32)


def _with_documents(kinds, q_ids, kv_ids, n_q, n_kv):
    """Hide pairs without a common document; FULL stays FULL only within one document."""
    q_ids, kv_ids = (x.reshape(x.shape[0], n, -1) for x, n in ((q_ids, n_q), (kv_ids, n_kv)))
    q_low, q_high = q_ids.min(2)[:, :, None], q_ids.max(2)[:, :, None]
    kv_low, kv_high = kv_ids.min(2)[:, None, :], kv_ids.max(2)[:, None, :]
    may_meet = (kv_high >= q_low) & (kv_low <= q_high)
    is_one = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
    kinds = jnp.where((kinds == FULL) & ~is_one, FULL + 1, kinds)
    return jnp.where(may_meet, kinds, SKIP)


def _possible(n_q, n_kv, blocks, window, offset, has_documents) -> tuple[int, frozenset[int]]:
    """How many pairs can be live at all, and of which kinds."""
    if not isinstance(offset, int):
        return n_q * n_kv, frozenset(range(FULL, MAX_KINDS))
    kinds = _kinds(np, n_q, n_kv, blocks, window, offset, has_documents)
    live = kinds[kinds != SKIP]
    among_documents = {FULL + 1} if has_documents and FULL in live else set()
    return len(live), frozenset(live.tolist()) | among_documents


def _compact(pairs: jax.Array, live: jax.Array, reachable: int) -> tuple[Any, Any]:
    """Live pairs first, in order; rows that have fewer of them repeat their last one as SKIP."""
    n = pairs.shape[1]
    order = jnp.sort(jnp.where(live, jnp.arange(n)[None], n), axis=1)[:, :reachable]
    count = live.sum(1)
    index = jnp.minimum(order, order[jnp.arange(len(order)), jnp.maximum(count - 1, 0)][:, None])
    index = jnp.minimum(index, n - 1)  # a row without any
    fields = ~jnp.int32((MAX_KINDS - 1) << _KIND | FIRST | LAST | OPENS | CLOSES)
    found = jnp.take_along_axis(pairs, index, 1)
    is_live = jnp.arange(reachable)[None] < count[:, None]
    return jnp.where(is_live, found, found & fields), count.max().astype(jnp.int32)


def _last(live: Any, axis: int) -> Any:
    return live.shape[axis] - 1 - (live[:, ::-1] if axis == 1 else live[:, :, ::-1]).argmax(axis)


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def _clip(x: int, stop: int) -> int:
    return min(max(x, 0), stop)
