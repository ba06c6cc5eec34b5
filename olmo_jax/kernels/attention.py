"""Attention: one public function; masks are descriptions; `choose` says what "auto" means."""

import jax
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.kernels import blocked, reference
from olmo_jax.sharding import BATCH_AXES, axis_size


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Causal attention of queries over keys, within documents and within a window.

    Args:
      q: [batch, seq, n_heads, head_dim].
      k, v: [batch, seq, n_kv_heads, head_dim]; n_heads is a multiple of n_kv_heads.
      window: positions visible to the left, the own one included; None for all.
      segment_ids: [batch, seq] int32, equal within a document; None for one document.
      impl: "auto", "pallas", "blocked" or "reference". A named one never falls back.

    Returns:
      [batch, seq, n_heads, head_dim], in the dtype of q; softmax in fp32.

    Raises:
      NotImplementedError: for an implementation that does not exist, or cannot run here.
      ValueError: for heads or rows that the mesh does not divide.
    """
    if impl == "auto":
        impl = choose(_platform(), axis_size("context"))
    if impl == "reference":
        out = reference.attention(q, k, v, window=window, segment_ids=segment_ids)
        return checkpoint_name(out, "attention_out")
    if impl == "blocked":
        return blocked.attention(q, k, v, segment_ids, window)
    if impl == "pallas":
        _check_pallas(_platform(), q.shape, k.shape)
        from olmo_jax.kernels import pallas_tpu

        tuning = pallas_tpu.tuning(q.shape[3], q.dtype, segment_ids is not None)
        return pallas_tpu.attention(q, k, v, segment_ids, window, tuning)
    raise NotImplementedError(
        f"attention impl={impl!r}: there are auto, pallas, blocked and reference"
    )


def choose(platform: str, context_ways: int) -> str:
    """What "auto" takes: kernels and blocks need a sequence that is whole on each device."""
    if context_ways > 1:
        return "reference"
    return "pallas" if platform == "tpu" else "blocked"


def _platform() -> str:
    """What is compiled for: the platform of the mesh in force, be it on this machine or not."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _check_pallas(platform: str, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    if platform != "tpu":
        raise NotImplementedError(
            f"attention impl='pallas': a TPU is needed, this is {platform}; use auto or blocked"
        )
    if (ways := axis_size("context")) > 1:
        raise NotImplementedError(
            f"attention impl='pallas': mesh.context={ways} splits sequences; use auto or reference"
        )
    for name, size, axes in (
        ("batch", q_shape[0], BATCH_AXES),
        ("n_heads", q_shape[2], ("tensor",)),
        ("n_kv_heads", kv_shape[2], ("tensor",)),
    ):
        if size % axis_size(*axes):
            over = " x ".join(f"mesh.{axis}" for axis in axes)
            raise ValueError(
                f"attention impl='pallas': {name}={size} is not divisible by"
                f" {over}={axis_size(*axes)}"
            )
