"""A checkpoint of any kind as a model and its parameters on a mesh."""

import jax

from olmo_jax.checkpoints import storage
from olmo_jax.checkpoints.arrays import on_devices
from olmo_jax.checkpoints.derived import Padded
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.checkpoints.weights import Weights, parts, pieces
from olmo_jax.config.model import ComputeConfig, MeshConfig
from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Params, Transformer
from olmo_jax.parallel import sharding


def load(
    src: str,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
) -> tuple[Transformer, Params]:
    """The model and the parameters of a checkpoint of any kind.

    `model.apply({"params": params}, tokens)` gives hidden states, of which `logits` makes
    scores. Under `jax.set_mesh` the batch has to divide by the mesh's ways; without it XLA splits
    what it can.

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
    source = open_weights(src, revision=revision)
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    ways = mesh.shape["tensor"]
    rows = -(-source.model.vocab_rows // ways) * ways
    if rows != source.model.vocab_rows:
        source = Padded(source, rows)
    model = Transformer(source.model, ComputeConfig(dtype=dtype, remat="none"))  # type: ignore[arg-type]
    shapes = transformer.abstract_params(source.model)
    where = storage.names(sharding.shardings(mesh, transformer.logical_axes(source.model)))
    params = [
        read_leaf(
            source,
            f"params/{name}",
            jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where[name]),
        )
        for name, leaf in storage.names(shapes).items()
    ]
    return model, jax.tree.unflatten(jax.tree.structure(shapes), params)


def read_leaf(source: Weights, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf of a checkpoint of any kind, in the dtype and on the sharding of `leaf`."""
    cheap = (
        piece for part in parts(name, source.leaves[name]) for piece in pieces(source, name, part)
    )
    return on_devices(leaf, lambda index: source.view(name, index), cheap)
