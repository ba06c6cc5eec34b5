"""A checkpoint of any kind as a model and its parameters on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints import names, storage
from olmo_jax.checkpoints.derived import Padded
from olmo_jax.checkpoints.formats import open
from olmo_jax.checkpoints.weights import Index, Weights, parts, pieces, whole
from olmo_jax.config.model import ComputeConfig, MeshConfig
from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Params, Transformer
from olmo_jax.parallel import sharding

Ranges = tuple[tuple[int, int], ...]  # start and stop in each dimension


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
    source = open.open_weights(src, revision=revision)
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
    """A leaf on its devices; what those of this process have between them is read once."""
    needed = {
        _ranges(index, shape) for index in where.addressable_devices_indices_map(shape).values()
    }
    blocks = {key: np.empty([stop - start for start, stop in key], dtype) for key in needed}
    box = tuple(
        (min(along)[0], max(stop for _, stop in along)) for along in zip(*needed, strict=True)
    )
    for part in parts(name, source.leaves[name]):
        for piece in pieces(source, name, part):
            wanted = _common(_ranges(piece, shape), box)
            if wanted is None:
                continue
            values = source.view(name, tuple(slice(*along) for along in wanted))
            for key, block in blocks.items():
                if (common := _common(wanted, key)) is not None:
                    names.assign(block[_within(common, key)], values[_within(common, wanted)])

    return jax.make_array_from_callback(
        shape, where, lambda index: blocks[_ranges(index, shape)], dtype=dtype
    )


def _ranges(index: Index | None, shape: tuple[int, ...]) -> Ranges:
    ends = zip(whole(shape, index), shape, strict=True)
    return tuple(along.indices(n)[:2] for along, n in ends)


def _common(one: Ranges, other: Ranges) -> Ranges | None:
    ends = zip(one, other, strict=True)
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in ends)
    return None if any(start >= stop for start, stop in common) else common


def _within(inner: Ranges, outer: Ranges) -> Index:
    ends = zip(inner, outer, strict=True)
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in ends)
