"""Attention: one public function; masks are descriptions; `choose` says what "auto" means."""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.config.model import LANES
from olmo_jax.kernels import blocked, cudnn, reference, ring
from olmo_jax.parallel.sharding import BATCH_AXES, axis_size, device, is_split_by_xla


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Causal attention of queries over keys, within documents and within a window.

    On a mesh that splits sequences (`mesh.context`) positions are in the order of `ring.order`, and
    the implementation named computes inside of a ring.

    Args:
      q: [batch, seq, n_heads, head_dim].
      k, v: [batch, seq, n_kv_heads, head_dim]; n_heads is a multiple of n_kv_heads.
      window: positions visible to the left, the own one included; None for all.
      segment_ids: [batch, seq] int32, equal within a document; None for one document.
      scale: of the products of queries and keys; None: head_dim ** -0.5.
      impl: "auto", "pallas" (our kernels for TPU, or for Hopper GPUs), "cudnn", "blocked" or
        "reference". A named one never falls back.

    Returns:
      [batch, seq, n_heads, head_dim], in the dtype of q; softmax in fp32.

    Raises:
      NotImplementedError: for an implementation that does not exist, or cannot run here.
      ValueError: for heads, rows or positions that the mesh does not divide.
    """
    target, is_split = device(), axis_size("context") > 1
    of_kernel = q.dtype, q.shape[3], segment_ids is not None
    if impl == "auto":
        # XLA cannot split a kernel for TPU.
        needs_xla = target.platform == "tpu" and is_split_by_xla()
        impl = "blocked" if needs_xla else choose(target, is_split, *of_kernel)
    usual: float = q.shape[3] ** -0.5
    if scale is None:
        scale = usual
    elif impl in ("reference", "blocked"):
        q = q * (scale / usual)
    if impl == "reference":
        positions = ring.order(q.shape[1])
        out = reference.attention(
            q, k, v, window=window, segment_ids=segment_ids, positions=positions
        )
        return checkpoint_name(out, "attention_out")
    if found := obstacle(impl, target, is_split, *of_kernel):
        raise NotImplementedError(f"attention impl={impl!r}: {found}")
    if impl == "blocked" and not is_split:
        return blocked.attention(q, k, v, segment_ids, window)
    _check_division(impl, q.shape, k.shape)
    if is_split:
        window = None if window is None or window >= q.shape[1] else window
        kernel = _kernel(impl, q, scale, segment_ids is not None or window is not None)
        return ring.attention(q, k, v, segment_ids, window, kernel)
    if impl == "cudnn":
        return cudnn.attention(q, k, v, window, scale)
    if target.platform == "gpu":
        from olmo_jax.kernels import pallas_gpu

        return pallas_gpu.attention(q, k, v, segment_ids, window, scale)
    from olmo_jax.kernels import pallas_tpu

    tuning = pallas_tpu.tuning(q.shape[3], q.dtype, segment_ids is not None)
    return pallas_tpu.attention(q, k, v, segment_ids, window, scale, tuning)


def choose(target: Any, is_split: bool, dtype: Any, head_dim: int, has_documents: bool) -> str:
    """What "auto" takes on a device, for sequences that are split over devices or not.

    On a GPU our own kernels are not among it until they have been measured there.
    """
    if target.platform == "tpu":
        return "pallas"
    is_hard = obstacle("cudnn", target, is_split, dtype, head_dim, has_documents)
    return "blocked" if is_hard else "cudnn"


def obstacle(
    impl: str, target: Any, is_split: bool, dtype: Any, head_dim: int, has_documents: bool
) -> str | None:
    """Why an implementation cannot compute this on a device, in words; None if it can."""
    if impl not in ("pallas", "cudnn", "blocked"):
        return "there are auto, pallas, cudnn, blocked and reference"
    reason = None
    if impl == "cudnn":
        reason = cudnn.obstacle(target, dtype, head_dim, has_documents)
    elif impl == "pallas" and target.platform == "gpu":
        from olmo_jax.kernels import pallas_gpu

        reason = pallas_gpu.obstacle(target, dtype, head_dim)
    elif impl == "pallas" and target.platform != "tpu":
        reason = f"a TPU or a Hopper GPU is needed, this is {target.platform}"
    if is_split and impl != "blocked" and target.platform == "gpu":
        reason = reason or "mesh.context splits sequences"
    return reason and f"{reason}; use auto or blocked"


def _kernel(impl: str, q: jax.Array, scale: float, has_documents: bool) -> ring.RingKernel:
    """What a ring computes with on each device."""
    dim = q.shape[3]
    if impl == "blocked":
        return ring.RingKernel(
            functools.partial(blocked.forward, head_dim=dim),
            functools.partial(blocked.backward, head_dim=dim),
            functools.partial(blocked.delta, head_dim=dim),
        )
    from olmo_jax.kernels import pallas_tpu

    chunk = q.shape[1] // (2 * axis_size("context"))
    if chunk % LANES:
        raise ValueError(
            f"attention impl='pallas': seq={q.shape[1]} over 2 x mesh.context is chunks of {chunk},"
            f" no multiple of {LANES}; use blocked or another data.seq_len"
        )
    tuning = pallas_tpu.tuning(dim, q.dtype, has_documents).dividing(chunk)
    options: dict[str, Any] = dict(head_dim=dim, scale=scale, tuning=tuning)
    return ring.RingKernel(
        functools.partial(pallas_tpu.forward, **options),
        functools.partial(pallas_tpu.backward, **options),
        functools.partial(pallas_tpu.delta, head_dim=dim),
        tuning.forward.q,
    )


def _check_division(impl: str, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    """Each device has whole rows and heads, and two chunks of a sequence that is split."""
    chunks = 2 if axis_size("context") > 1 else 1
    for name, size, axes, times in (
        ("batch", q_shape[0], BATCH_AXES, 1),
        ("seq", q_shape[1], ("context",), chunks),
        ("n_heads", q_shape[2], ("tensor",), 1),
        ("n_kv_heads", kv_shape[2], ("tensor",), 1),
    ):
        if size % (times * axis_size(*axes)):
            over = " x ".join(["2"] * (times > 1) + [f"mesh.{axis}" for axis in axes])
            raise ValueError(
                f"attention impl={impl!r}: {name}={size} is not divisible by"
                f" {over}={times * axis_size(*axes)}"
            )
