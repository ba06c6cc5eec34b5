"""Rows travel to the devices of their experts and back, each to its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from olmo_jax.kernels import exchange

DEVICES, EXPERTS, WIDTH = 4, 8, 3
COUNTS = {  # rows that each device has for each expert
    "random": np.random.default_rng(0).integers(0, 6, (DEVICES, EXPERTS)),
    "all to one": np.eye(EXPERTS, dtype=int)[[3] * DEVICES] * 20,
    "some have none": np.diag([1, 0, 7, 2, 0, 0, 5, 3])[:DEVICES],
}


def homes(counts):
    """Rows of each device, by expert; they say where they come from, and fill up with zeros."""
    rows = np.zeros((DEVICES, counts.sum(1).max(), WIDTH), np.float32)
    for device, of_experts in enumerate(counts):
        expert = np.repeat(np.arange(EXPERTS), of_experts)
        number = np.arange(len(expert))
        rows[device, : len(expert)] = np.stack([0 * number + device + 1, expert, number], 1)
    return rows


def buffers(rows, counts, size):
    """What each device receives: by expert, then by the device of origin."""
    out = np.zeros((DEVICES, size, WIDTH), np.float32)
    for device in range(DEVICES):
        own = range(device * EXPERTS // DEVICES, (device + 1) * EXPERTS // DEVICES)
        parts = [rows[s, : counts[s].sum()] for s in range(DEVICES)]
        parts = [parts[s][parts[s][:, 1] == e] for e in own for s in range(DEVICES)]
        parts = np.concatenate(parts)[:size]
        out[device, : len(parts)] = parts
    return out


def there_and_back(rows, counts, size):
    """In a `shard_map`: the buffers, what comes back, group sizes, rows needed, a gradient."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("expert",))
    split = PartitionSpec("expert")

    def local(rows, counts):
        rows, counts = rows[0], counts[0]
        plan, needed = exchange.plan(counts, size)
        sent, vjp = jax.vjp(lambda rows: exchange.send(rows, plan, size), rows)
        back = exchange.send_back(sent, plan, len(rows))
        (gradient,) = vjp(2 * sent)
        outputs = sent, back, plan.sizes, needed[None], gradient
        return jax.tree.map(lambda a: a[None], outputs)

    call = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return jax.jit(call)(rows, jnp.asarray(counts, jnp.int32))


def check(counts, size):
    rows = homes(counts)
    sent, back, sizes, needed, gradient = there_and_back(rows, counts, size)
    np.testing.assert_array_equal(sent, buffers(rows, counts, size))
    loads = counts.sum(0).reshape(DEVICES, -1)
    np.testing.assert_array_equal(needed.reshape(-1), DEVICES * [loads.sum(1).max()])
    np.testing.assert_array_equal(gradient, 2 * back)
    if loads.sum(1).max() <= size:
        np.testing.assert_array_equal(sizes, loads)
        np.testing.assert_array_equal(back, rows)
    else:
        assert sizes.sum(1).max() == size
        survived = (np.asarray(back) == rows).all(2)
        assert np.all(np.asarray(back)[~survived] == 0)


@pytest.mark.parametrize("name", COUNTS)
def test_rows_arrive_by_expert_and_come_back(name):
    check(COUNTS[name], 4 * 20 + 8)


def test_what_finds_no_room_is_counted_and_harms_no_other_row():
    check(COUNTS["random"], 16)


def test_the_ragged_form_is_given_the_same_places(monkeypatch):
    # XLA on a CPU lacks it, so here it is played by its documented meaning.
    def ragged(x, out, here, sizes, there, received, *, axis_name):
        every = [jax.lax.all_gather(a, axis_name) for a in (x, here, sizes, there)]
        me, n = jax.lax.axis_index(axis_name), len(here) // DEVICES
        at = jnp.arange(len(out))
        for source in range(DEVICES):
            rows, here_, sizes_, there_ = (a[source] for a in every)
            for i in range(n):
                block = me * n + i
                offset = at - there_[block]
                own = (offset >= 0) & (offset < sizes_[block])
                out = jnp.where(own[:, None], rows[(here_[block] + offset) % len(rows)], out)
        del received
        return out

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
    choose = lambda *args, cpu, default: default(*args)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    check(COUNTS["random"], 88)
    check(COUNTS["random"], 16)
