"""Attention of NVIDIA's cuDNN, through JAX's public function, as far as that can express ours.

It knows one length for each row, which is no way to pack documents. It is compiled where cuDNN is:
nothing of it but the mask can be tried without a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.parallel.sharding import Axes, on_each_device

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 128  # of any GPU; Hopper's is 256

_OF_Q: Axes = ("batch", None, "heads", None)
_OF_KV: Axes = ("batch", None, "kv_heads", None)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    scale: float,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Causal attention by cuDNN; see `kernels.attention.attention` for the contract.

    `implementation` "xla" gives the same mask on any platform: for tests. Under a remat policy that
    keeps the output, cuDNN computes it again nevertheless, for its logsumexp.
    """
    # JAX counts the positions to the left without the own one.
    left_and_right = None if window is None else (window - 1, 0)

    def run(q, k, v):
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=scale,
            local_window_size=left_and_right, implementation=implementation,
        )  # fmt: skip
        return (out,)

    (out,) = on_each_device(run, (_OF_Q, _OF_KV, _OF_KV), (_OF_Q,), q, k, v)
    return checkpoint_name(out, "attention_out")


def obstacle(device: Any, dtype: Any, head_dim: int, has_documents: bool) -> str | None:
    """Why cuDNN cannot compute this on a device, in words; None if it can."""
    if device.platform != "gpu" or not device.device_kind.startswith("NVIDIA"):
        return f"an NVIDIA GPU is needed, this is {device.platform} ({device.device_kind})"
    if has_documents:
        return "it knows no segment_ids (data.document_mask)"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"{' or '.join(DTYPES)} is needed, this is {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"head_dim={head_dim} is no multiple of 8 up to {MAX_HEAD_DIM}"
    return None
