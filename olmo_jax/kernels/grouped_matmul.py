"""Matrix products of groups of rows with a matrix each: the experts of a mixture.

Rows lie sorted by group; nothing is padded to a capacity and no row is lost, however unequal the
groups are. On TPU and GPU XLA has a kernel (`lax.ragged_dot`), but on TPU none for the gradient of
the matrices: there it multiplies all rows for each group, so that one is JAX's own Pallas kernel
("megablox"). On a CPU XLA's form multiplies all rows with all matrices, so there a loop takes the
rows of each group in a block that just holds them, or in several: shapes are static, so the program
has a product for each size of a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TILES = 512, 1024, 512  # rows, in and out of the kernel for TPU; fit into the VMEM of each


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    gather: tuple[str, int] | None = None,
    grad_dtype: str = "float32",
    impl: str = "auto",
) -> jax.Array:
    """Multiply each row with the matrix of its group.

    Args:
      x: [rows, in], the rows of group 0 first; rows behind the last group give 0.
      w: [groups, in, out], cast to the dtype of `x`.
      sizes: [groups] int32, rows of each group; their sum is at most `rows`.
      gather: (mesh axis, dimension) over which `w` is split inside a `shard_map`: its parts are
        gathered in the dtype of `x`, and their gradients reduced and scattered.
      grad_dtype: in which the gradient of `w` is accumulated and reduced over the mesh.
      impl: "auto" (by the platform that it is compiled for), "ragged", "loop", or "interpret", as
        on a TPU but with its kernel interpreted, for tests.

    Returns: [rows, out], in the dtype of `x`.
    Raises: NotImplementedError for an implementation that does not exist.
    """
    return _product(x, _whole(w, x.dtype, gather), sizes, False, impl)


def _forward(x, w, sizes, gather, grad_dtype, impl):
    return grouped_matmul(x, w, sizes, gather, grad_dtype, impl), (x, w, sizes)


def _backward(gather, grad_dtype, impl, residuals, dy):
    x, w, sizes = residuals
    dx = _product(dy, _whole(w, x.dtype, gather), sizes, True, impl)
    dw = _outer(x, dy, sizes, jnp.dtype(grad_dtype), impl)
    if gather is not None:
        axis, dimension = gather
        dw = jax.lax.psum_scatter(dw, axis, scatter_dimension=dimension, tiled=True)
    return dx, dw.astype(w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _whole(w: jax.Array, dtype: jnp.dtype, gather: tuple[str, int] | None) -> jax.Array:
    w = w.astype(dtype)
    return w if gather is None else jax.lax.all_gather(w, gather[0], axis=gather[1], tiled=True)


def _by_platform(impl: str, forms: dict[str, Callable[..., jax.Array]], *args: jax.Array):
    if impl == "auto":
        on_tpu = forms.get("tpu", forms["ragged"])
        return jax.lax.platform_dependent(
            *args, cpu=forms["loop"], tpu=on_tpu, default=forms["ragged"]
        )
    if impl not in ("ragged", "loop", "interpret"):
        raise NotImplementedError(f"grouped_matmul impl={impl!r}: there are auto, ragged and loop")
    return forms.get(impl, forms["ragged"])(*args)


def _product(
    x: jax.Array, w: jax.Array, sizes: jax.Array, is_transposed: bool, impl: str
) -> jax.Array:
    """`x [rows, in]` by `w [groups, in, out]`, or by `w [groups, out, in]` where transposed."""

    def ragged(x, w, sizes):
        dims = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2 if is_transposed else 1,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        y = jax.lax.ragged_dot_general(x, w, sizes, dims, preferred_element_type=x.dtype)
        behind = jnp.arange(x.shape[0])[:, None] >= sizes.sum()
        return jnp.where(behind, 0, y)  # a kernel may leave them as they were

    def loop(x, w, sizes):
        blocks = _blocks(x.shape[0], w.shape[0])
        most = blocks[-1]
        padded = jnp.pad(x, ((0, most), (0, 0)))
        contract = (((1,), (1 if is_transposed else 0,)), ((), ()))

        def block(n, at, left, w):
            y = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(padded, at, n), w, contract)
            return jnp.pad(y, ((0, most - n), (0, 0)))

        def group(out, inputs):
            w, start, size = inputs

            def rows(i, out):  # the last block reaches into the next group, which comes later
                at, left = start + i * most, size - i * most
                return jax.lax.dynamic_update_slice_in_dim(
                    out, _smallest(blocks, block, at, left, w), at, 0
                )

            return jax.lax.fori_loop(0, -(-size // most), rows, out), None

        n_out = w.shape[1] if is_transposed else w.shape[2]
        out = jnp.zeros((x.shape[0] + most, n_out), x.dtype)
        out, _ = jax.lax.scan(group, out, (w, jnp.cumsum(sizes) - sizes, sizes))
        behind = jnp.arange(x.shape[0])[:, None] >= sizes.sum()
        return jnp.where(behind, 0, out[: x.shape[0]])

    return _by_platform(impl, dict(ragged=ragged, loop=loop), x, w, sizes)


def _outer(x: jax.Array, dy: jax.Array, sizes: jax.Array, dtype: jnp.dtype, impl: str) -> jax.Array:
    """The sum of x ⊗ dy over the rows of each group, `[groups, in, out]` in `dtype`."""

    def ragged(x, dy, sizes):
        dims = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        return jax.lax.ragged_dot_general(x, dy, sizes, dims, preferred_element_type=dtype)

    def loop(x, dy, sizes):
        blocks = _blocks(x.shape[0], sizes.shape[0])
        most = blocks[-1]
        x, dy = (jnp.pad(a, ((0, most), (0, 0))) for a in (x, dy))

        def block(n, at, left):
            x_part = jax.lax.dynamic_slice_in_dim(x, at, n)
            dy_part = jax.lax.dynamic_slice_in_dim(dy, at, n)
            x_part = jnp.where(jnp.arange(n)[:, None] < left, x_part, 0)
            return jnp.matmul(x_part.T, dy_part, preferred_element_type=dtype)

        def group(_, inputs):
            start, size = inputs
            part = lambda i: _smallest(blocks, block, start + i * most, size - i * most)  # noqa: E731
            add = lambda i, total: total + part(i)  # noqa: E731
            return None, jax.lax.fori_loop(1, -(-size // most), add, part(0))

        return jax.lax.scan(group, None, (jnp.cumsum(sizes) - sizes, sizes))[1]

    def kernel(x, dy, sizes, interpret=False):
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        x, dy = (jnp.pad(a, ((0, -a.shape[0] % TILES[0]), (0, 0))) for a in (x, dy))
        return tgmm(x.T, dy, sizes, dtype, TILES, interpret=interpret)

    interpreted = functools.partial(kernel, interpret=True)
    forms = dict(ragged=ragged, loop=loop, tpu=kernel, interpret=interpreted)
    return _by_platform(impl, forms, x, dy, sizes)


def _blocks(rows: int, groups: int) -> list[int]:
    """Rows of the blocks there are: from half to one and a half of the groups' mean."""
    mean = max(1, rows // groups)
    grain = 8 * -(-mean // 64)
    return [grain * i for i in range(max(1, mean // (2 * grain)), -(-3 * mean // (2 * grain)) + 1)]


def _smallest(
    blocks: list[int], block: Callable[..., jax.Array], at: jax.Array, left: jax.Array, *args: Any
) -> jax.Array:
    """`block(n, at, left, *args)` with the smallest n that holds `left` rows, else the largest."""
    index = sum((left > n).astype(jnp.int32) for n in blocks[:-1])
    return jax.lax.switch(index, [functools.partial(block, n) for n in blocks], at, left, *args)
