"""`Weights` that are made from others, piece by piece: padded, averaged, upcycled."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints import arrays
from olmo_jax.checkpoints.weights import Index, Leaves, Weights, whole

MLP, MOE, ROUTER = "params/layers/mlp/", "params/layers/moe/", "params/layers/moe/router"


class Padded(Weights):
    """`Weights` with rows of zeros behind the vocabulary: they never score, and split evenly."""

    def __init__(self, source: Weights, rows: int):
        """Widen the tables, and what the optimizer keeps of them.

        Args:
          source: without optimizer or with it.
          rows: of the tables from now on.
        Raises:
          ValueError: if there are more.
        """
        if rows < source.model.vocab_rows:
            there = source.model.vocab_rows
            raise ValueError(f"padded_vocab_size={rows} is below the {there} rows of the source")
        self._source, self.line = source, f"{source.line}, {rows} rows"
        self.model = dataclasses.replace(source.model, padded_vocab_size=rows)
        self.files, self.meta, self.torch_layout = source.files, source.meta, source.torch_layout
        self.is_remote = source.is_remote
        self.leaves = dict(source.leaves)
        for name, leaf in source.leaves.items():
            if name.endswith("/embed"):
                self.leaves[name] = jax.ShapeDtypeStruct((rows, leaf.shape[1]), leaf.dtype)
            elif name.endswith("/lm_head"):
                self.leaves[name] = jax.ShapeDtypeStruct((leaf.shape[0], rows), leaf.dtype)

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf or a part of it, in the order of the source but for the tables."""
        leaf, stored = self.leaves[name], self._source.leaves[name].shape
        if leaf.shape == stored:
            return self._source.view(name, index)
        ends = zip(whole(leaf.shape, index), leaf.shape, strict=True)
        wanted = [part.indices(n)[:2] for part, n in ends]
        there = [(min(a, n), min(b, n)) for (a, b), n in zip(wanted, stored, strict=True)]
        out = np.zeros([b - a for a, b in wanted], leaf.dtype)
        if all(a < b for a, b in there):
            values = self._source.view(name, tuple(slice(a, b) for a, b in there))
            arrays.assign(out[tuple(slice(n) for n in values.shape)], values)
        return out


class Mean(Weights):
    """`Weights` that are the mean of others, taken in float32."""

    def __init__(self, sources: Sequence[Weights]):
        self._sources = sources
        first = sources[0]
        self.line = f"mean of {len(sources)} checkpoints"
        self.model, self.files = first.model, first.files
        self.meta = {"token_ids": first.meta.get("token_ids", {})}  # no dtype: a mean is float32
        # Ours can be read across; what lies across our rows would come once for each block of them.
        self.torch_layout = any(source.torch_layout for source in sources)
        self.is_remote = any(source.is_remote for source in sources)
        self.leaves = {
            name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype("float32"))
            for name, leaf in first.leaves.items()
        }

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """The mean of a leaf or of a part of it."""
        total = self._sources[0].view(name, index).astype(np.float32)
        for source in self._sources[1:]:
            total += source.view(name, index)
        total /= len(self._sources)
        return total


class Upcycled(Weights):
    """A dense model whose every expert is its MLP (sparse upcycling, arXiv 2212.05055).

    The weights of a token's experts are renormalised to a sum of one, so that at the start the
    output is that of the dense model, whatever the routers say. These are drawn from a normal
    distribution: with equal routers all tokens would go to the same experts.
    """

    def __init__(
        self,
        source: Weights,
        n_experts: int,
        n_experts_per_token: int,
        router_std: float,
        seed: int,
    ):
        """Widen the model.

        Args:
          source: dense, without the optimizer.
          n_experts: of each layer.
          n_experts_per_token: of them that a token takes.
          router_std: of the routers' weights.
          seed: of the routers.
        Raises:
          ValueError: if the source has experts already, or there are no such experts or routers.
        """
        if source.model.n_experts:
            raise ValueError(f"upcycle: it has {source.model.n_experts} experts already")
        if not 1 <= n_experts_per_token <= n_experts:
            raise ValueError(
                f"upcycle: a token cannot take n_experts_per_token={n_experts_per_token} of"
                f" n_experts={n_experts}; need at least one, and no more than there are"
            )
        if not 0 <= router_std < math.inf or seed < 0:
            raise ValueError(
                f"upcycle: router_std={router_std} and seed={seed} need to be finite and not"
                " negative"
            )
        self.model = dataclasses.replace(
            source.model,
            n_experts=n_experts,
            n_experts_per_token=n_experts_per_token,
            normalize_expert_weights=True,
        )
        routers = f"routers of seed {seed} and std {router_std}"
        self.line = f"{source.line}; each MLP as {n_experts} experts, {routers}"
        self.files, self.meta, self.torch_layout = source.files, source.meta, source.torch_layout
        self.is_remote = source.is_remote
        self._source, self._router_std, self._seed = source, router_std, seed
        self.leaves: Leaves = {}
        for name, leaf in source.leaves.items():
            if name.startswith(MLP):
                name = name.replace(MLP, MOE)
                shape = (leaf.shape[0], n_experts, *leaf.shape[1:])
                leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
            self.leaves[name] = leaf
        shape = (source.model.n_layers, source.model.d_model, n_experts)
        self.leaves[ROUTER] = jax.ShapeDtypeStruct(shape, jnp.dtype("float32"))

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf or a part of it; all experts are one array in memory."""
        if not name.startswith(MOE):
            return self._source.view(name, index)
        shape = self.leaves[name].shape
        layers, *rest = whole(shape, index)
        if name == ROUTER:
            drawn = [self._router(layer) for layer in range(*layers.indices(shape[0]))]
            return np.stack(drawn)[(slice(None), *rest)]
        experts, *inner = rest
        # Every block of experts asks for the same rows: they stay in memory.
        read = self._source.view if self.torch_layout else self._source.read
        mlp = read(name.replace(MOE, MLP), (layers, *inner))[:, None]
        n = len(range(*experts.indices(shape[1])))
        return np.broadcast_to(mlp, (mlp.shape[0], n, *mlp.shape[2:]))

    def _router(self, layer: int) -> np.ndarray:
        """The router of a layer, `[d_model, n_experts]`."""
        rng = np.random.default_rng([self._seed, layer])
        values = rng.standard_normal(self.leaves[ROUTER].shape[1:], np.float32)
        return values * np.float32(self._router_std)
