"""A checkpoint of any kind as a model and its parameters on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax import sharding, storage
from olmo_jax.config import ComputeConfig, MeshConfig
from olmo_jax.convert import weights
from olmo_jax.convert.derived import Padded
from olmo_jax.convert.weights import Index, Weights, whole
from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Params, Transformer


def load(
    src: str,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
) -> tuple[Transformer, Params]:
    """The model and the parameters of a checkpoint of any kind.

    `model.apply({"params": params}, tokens)` gives fp32 logits `[batch, seq, vocab_size]`. Under
    `jax.set_mesh` the batch has to divide by the mesh's ways; without it XLA splits what it can.

    Args:
      src: a run's folder or a checkpoint, a Hugging Face, OLMo or OLMo-core folder, here, on
        `gs://` (ours) or `https://`, or an id on the Hugging Face Hub.
      dtype: of parameters and activations, "float32" or "bfloat16".
      mesh: from `sharding.make_mesh`, to spread the parameters over; None: the first device. A
        vocabulary that its `tensor` axis does not divide gets rows of padding.
      revision: of a Hub id.
    Raises:
      FileNotFoundError, ValueError, OSError: if there is no checkpoint that is whole.
    """
    source = weights.open(src, revision=revision)
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    ways = mesh.shape["tensor"]
    rows = -(-source.model.vocab_rows // ways) * ways
    if rows != source.model.vocab_rows:
        source = Padded(source, rows)
    model = Transformer(source.model, ComputeConfig(dtype=dtype, remat="none"))  # type: ignore[arg-type]
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    where = storage.names(sharding.shardings(mesh, transformer.logical_axes(model)))
    params = [
        _leaf(source, f"params/{name}", leaf.shape, jnp.dtype(dtype), where[name])
        for name, leaf in storage.names(shapes).items()
    ]
    return model, jax.tree.unflatten(jax.tree.structure(shapes), params)


def _leaf(
    source: Weights,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: jax.sharding.Sharding,
) -> jax.Array:
    """A leaf on its devices; each reads its own part."""
    blocks: dict[Any, np.ndarray] = {}  # replicas share one read

    def block(index: Index | None) -> np.ndarray:
        index = whole(shape, index)
        key = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        if key not in blocks:
            blocks[key] = source.read(name, index).astype(dtype, copy=False)
        return blocks[key]

    return jax.make_array_from_callback(shape, where, block, dtype=dtype)
