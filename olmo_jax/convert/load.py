"""A checkpoint of any kind as a model and its parameters on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax import sharding, storage
from olmo_jax.config import ComputeConfig, MeshConfig
from olmo_jax.convert import weights
from olmo_jax.convert.weights import Index, Weights
from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Params, Transformer


def load(
    src: str,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
) -> tuple[Transformer, Params]:
    """The model and the parameters of a checkpoint of any kind.

    `model.apply({"params": params}, tokens)` gives fp32 logits `[batch, seq, vocab_size]`.

    Args:
      src: a run's folder or a checkpoint, a Hugging Face, OLMo or OLMo-core folder, here, on
        `gs://` (ours) or `https://`, or an id on the Hugging Face Hub.
      dtype: of parameters and activations, "float32" or "bfloat16".
      mesh: from `sharding.make_mesh`, to spread the parameters over; None: the first device.
      revision: of a Hub id.
    Raises:
      FileNotFoundError, ValueError, OSError: if there is no checkpoint that is whole.
    """
    source = weights.open(src, revision=revision)
    model = Transformer(source.model, ComputeConfig(dtype=dtype, remat="none"))  # type: ignore[arg-type]
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    abstract = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    where = sharding.shardings(mesh, transformer.logical_axes(model))
    params = [
        _load_leaf(source, f"params/{name}", leaf, dtype, sharding_)
        for (name, leaf), sharding_ in zip(
            storage.names(abstract).items(), jax.tree.leaves(where), strict=True
        )
    ]
    return model, jax.tree.unflatten(jax.tree.structure(abstract), params)


def _load_leaf(source: Weights, name: str, leaf: Any, dtype: str, sharding_: Any) -> jax.Array:
    if name not in source.leaves or source.leaves[name].shape != leaf.shape:
        found = source.leaves[name].shape if name in source.leaves else "nothing"
        raise ValueError(f"{name}: found {found}, the model needs {leaf.shape}")
    blocks: dict[Any, np.ndarray] = {}  # replicas share one read

    def block(index: Index) -> np.ndarray:
        key = tuple(part.indices(n) for part, n in zip(index, leaf.shape, strict=True))
        if key not in blocks:
            blocks[key] = source.read(name, index).astype(dtype, copy=False)
        return blocks[key]

    return jax.make_array_from_callback(leaf.shape, sharding_, block, dtype=jnp.dtype(dtype))
