"""Attention: one public function; masks are descriptions; `choose` says what "auto" means."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.kernels import blocked, cudnn, reference
from olmo_jax.sharding import BATCH_AXES, axis_size, device


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
      ValueError: for heads or rows that the mesh does not divide.
    """
    target, of_kernel = device(), (q.dtype, q.shape[3], segment_ids is not None)
    if impl == "auto":
        impl = choose(target, axis_size("context"), *of_kernel)
    usual: float = q.shape[3] ** -0.5
    if scale is None:
        scale = usual
    elif impl in ("reference", "blocked"):
        q = q * (scale / usual)
    if impl == "reference":
        out = reference.attention(q, k, v, window=window, segment_ids=segment_ids)
        return checkpoint_name(out, "attention_out")
    if impl == "blocked":
        return blocked.attention(q, k, v, segment_ids, window)
    if impl == "cudnn":
        _check(impl, cudnn.obstacle(target, *of_kernel), q.shape, k.shape)
        return cudnn.attention(q, k, v, window, scale)
    if impl == "pallas" and target.platform == "gpu":
        from olmo_jax.kernels import pallas_gpu

        _check(impl, pallas_gpu.obstacle(target, *of_kernel[:2]), q.shape, k.shape)
        return pallas_gpu.attention(q, k, v, segment_ids, window, scale)
    if impl == "pallas":
        other = f"a TPU or a Hopper GPU is needed, this is {target.platform}"
        _check(impl, None if target.platform == "tpu" else other, q.shape, k.shape)
        from olmo_jax.kernels import pallas_tpu

        tuning = pallas_tpu.tuning(q.shape[3], q.dtype, segment_ids is not None)
        return pallas_tpu.attention(q, k, v, segment_ids, window, scale, tuning)
    raise NotImplementedError(
        f"attention impl={impl!r}: there are auto, pallas, cudnn, blocked and reference"
    )


def choose(target: Any, context_ways: int, dtype: Any, head_dim: int, has_documents: bool) -> str:
    """What "auto" takes: kernels and blocks need a sequence that is whole on each device.

    On a GPU that is cuDNN where it can; our kernels are not until they have been measured there.
    """
    if context_ways > 1:
        return "reference"
    if target.platform == "tpu":
        return "pallas"
    return "blocked" if cudnn.obstacle(target, dtype, head_dim, has_documents) else "cudnn"


def _check(
    impl: str, obstacle: str | None, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]
) -> None:
    if obstacle is not None:
        raise NotImplementedError(f"attention impl={impl!r}: {obstacle}; use auto or blocked")
    if (ways := axis_size("context")) > 1:
        raise NotImplementedError(
            f"attention impl={impl!r}: mesh.context={ways} splits sequences; use auto or reference"
        )
    for name, size, axes in (
        ("batch", q_shape[0], BATCH_AXES),
        ("n_heads", q_shape[2], ("tensor",)),
        ("n_kv_heads", kv_shape[2], ("tensor",)),
    ):
        if size % axis_size(*axes):
            over = " x ".join(f"mesh.{axis}" for axis in axes)
            raise ValueError(
                f"attention impl={impl!r}: {name}={size} is not divisible by"
                f" {over}={axis_size(*axes)}"
            )
