"""One update of the state, and what else runs on a batch: evaluation, norms."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmo_jax.config.parameters import table
from olmo_jax.config.training import OptimConfig, TrainConfig
from olmo_jax.nn.transformer import Output, Transformer
from olmo_jax.parallel import xla_flags
from olmo_jax.parallel.sharding import (
    axis_size,
    data_parallel_ways,
    spec,
    sum_of_replicas,
)
from olmo_jax.training import experts, losses, optim
from olmo_jax.training.losses import Apply, Arrays, Objective, Parts
from olmo_jax.training.state import TrainState, param_shardings, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What a step was like: arrays on the devices, for the host to read later."""

    loss: jax.Array  # mean cross entropy, nats
    has_loss: jax.Array  # bool: whether any token had one
    grad_norm: jax.Array  # before clipping
    taken: jax.Array  # bool: whether the step changed the parameters
    room: jax.Array | None  # that the experts of one device needed, where it is limited
    scalars: dict[str, jax.Array]  # more, by OLMo-core's names
    tables: dict[str, jax.Array]

    def metrics(self) -> dict[str, jax.Array]:
        """All scalars by OLMo-core's names."""
        return {
            "train/CE loss": self.loss,
            "optim/total grad norm": self.grad_norm,
            "optim/step skipped": 1.0 - self.taken,
        } | self.scalars


class Jitted(NamedTuple):
    """A compiled function that is called with its mesh in force, which `constrain` asks for."""

    function: Any
    mesh: Mesh

    def __call__(self, *args: Any) -> Any:
        """The function's result."""
        with jax.set_mesh(self.mesh):
            return self.function(*args)

    def lower(self, *args: Any) -> Any:
        """The function for arguments of these shapes, to be compiled ahead of its first call."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(*args)


def make_update(
    objective: Objective, model: Transformer, t: TrainConfig, o: OptimConfig, mesh: Mesh
) -> Jitted:
    """The compiled update `(state, batch, lr, max_grad_norm) -> (state, report)`.

    The state is donated and keeps its shardings. `batch` holds global `[batch, seq]` arrays; a new
    shape compiles, with the flags of `xla_flags` for these devices.

    Args:
      objective: what is made small.
      model: as it is computed.
      t: how losses are normalised, and what experts add.
      o: the optimizer.
      mesh: of the devices.
    """
    m, compute = model.config, model.compute
    state_spec, whole = state_shardings(m, o, mesh), NamedSharding(mesh, PartitionSpec())
    gradients = _gradients_of(objective, model, t, mesh)

    def train_step(
        state: TrainState, batch: Arrays, lr: jax.Array, max_grad_norm: jax.Array
    ) -> tuple[TrainState, Report]:
        weights = batch["loss_weights"]
        grads, parts = gradients(state.params, batch)
        is_whole = experts.reached_all(compute.expert_buffer, parts)
        has_loss = weights.sum() > 0
        with jax.named_scope("optimizer"):
            params, opt_state, norm, taken = optim.update(
                o, grads, state.opt_state, state.params, lr, max_grad_norm, parts["ce"],
                has_loss & is_whole, table(m),
            )  # fmt: skip
        if m.router_bias_gamma is not None:
            # OLMo: moves it after a skipped step too.
            params = experts.balance(params, parts["routed"], m.router_bias_gamma * taken)
        scalars = {
            "train/masked labels (%)": 1.0 - jnp.mean(weights),  # OLMo-core: a fraction
            "train/masked instances (%)": jnp.mean(weights.sum(1) == 0, dtype=jnp.float32),
        }
        if t.z_loss is not None:
            scalars["train/Z loss"] = t.z_loss * parts["z"]
            scalars["train/Z loss unscaled"] = parts["z"]
        tables = {}
        if "routed" in parts:
            scalars |= experts.metrics(m, t, parts)
            tables["train/expert load"] = experts.loads(parts)
        report = Report(parts["ce"], has_loss, norm, taken, parts.get("buffer"), scalars, tables)
        return TrainState(state.step + is_whole, params, opt_state), report

    rows = NamedSharding(mesh, spec(("batch", "seq")))
    flags: Any = xla_flags.options(mesh.devices.flat[0].device_kind, compute.xla_flags)
    jitted = jax.jit(
        train_step,
        in_shardings=(state_spec, rows, whole, whole),
        out_shardings=(state_spec, whole),
        donate_argnums=0,
        compiler_options=flags,
    )
    return Jitted(jitted, mesh)


def _gradients_of(
    objective: Objective, model: Transformer, t: TrainConfig, mesh: Mesh
) -> Callable[[Any, Arrays], tuple[Any, Parts]]:
    """What gives summed gradients and loss parts of a batch, over its micro-batches."""
    ranks, n = t.loss_ranks or data_parallel_ways(mesh), model.compute.accumulate

    def gradients(params: Any, batch: Arrays) -> tuple[Any, Parts]:
        weights = batch["loss_weights"]  # the divisors are those of the whole batch
        n_counted = losses.counted(weights).sum()
        scaled = losses.normalize(weights, t.loss_normalization, ranks)
        batch = batch | {"loss_weights": scaled}

        def loss_of(params: Any, batch: Arrays) -> tuple[jax.Array, Parts]:
            return objective(_apply(model), params, batch | {"n_counted": n_counted})

        grad_fn = jax.grad(loss_of, has_aux=True)
        if n == 1:
            return grad_fn(params, batch)

        def add(total: Any, micro: Arrays) -> tuple[Any, None]:
            grads, parts = jax.tree.map(jnp.add, total, new := grad_fn(params, micro))
            if "buffer" in parts:
                parts["buffer"] = jnp.maximum(total[1]["buffer"], new[1]["buffer"])
            return (grads, parts), None

        def total(params: Any, batch: Arrays) -> tuple[Any, Parts]:
            # Strided, so that each device splits its own rows: contiguous parts would move rows.
            micro = jax.tree.map(
                lambda a: jnp.moveaxis(a.reshape(-1, n, *a.shape[1:]), 1, 0), batch
            )
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, params, _first(micro)))
            return jax.lax.scan(add, zeros, micro)[0]

        # Gradients that are sharded have to be scattered in each micro-batch, else they would not
        # fit. Losses of experts are of all rows together.
        is_sharded = axis_size("fsdp", "expert", "context", "tensor") > 1
        if axis_size("data") == 1 or is_sharded or model.config.n_experts:
            return total(params, batch)
        return sum_of_replicas(total, params, batch)

    return gradients


def _apply(model: Transformer, **options: Any) -> Apply:
    def apply(params: Any, batch: Arrays) -> Output:
        optional = batch.get("positions"), batch.get("segment_ids")
        return model.apply({"params": params}, batch["tokens"], *optional, **options)  # type: ignore[return-value]

    return apply


def _first(micro: Arrays) -> Arrays:
    return jax.tree.map(lambda a: a[0], micro)


def make_eval_step(model: Transformer, mesh: Mesh) -> Jitted:
    """The compiled `(params, batch) -> {"ce_sum", "tokens"}`: nats over, and number of, tokens.

    `batch` holds global arrays with `loss_weights` 1 for tokens that are scored, else 0.
    """
    m, compute = model.config, dataclasses.replace(model.compute, expert_buffer=None)
    model = Transformer(m, compute)  # nothing would stop an evaluation for its experts

    def evaluate(params: Any, batch: Arrays) -> dict[str, jax.Array]:
        hidden = _apply(model)(params, batch).hidden
        _, parts = losses.cross_entropy_of(m, compute, None, hidden, params, batch)
        return {"ce_sum": parts["ce"], "tokens": batch["loss_weights"].sum()}

    rows, whole = (NamedSharding(mesh, spec(a)) for a in (("batch", "seq"), ()))
    places = param_shardings(m, mesh), rows
    return Jitted(jax.jit(evaluate, in_shardings=places, out_shardings=whole), mesh)


def make_norms(objective: Objective, model: Transformer, t: TrainConfig, mesh: Mesh) -> Jitted:
    """The compiled `(params, batch) -> per-layer norms` of parameters, gradients, activations.

    Returns a flat dict: `norms/param/{path}` and `norms/grad/{path}` (L2), `norms/activation`
    (RMS of each block's output); leaves under `layers` and activations are `[n_layers]`.
    """
    gradients = _gradients_of(objective, model, t, mesh)

    def norms(params: Any, batch: Arrays) -> dict[str, jax.Array]:
        grads, _ = gradients(params, batch)
        stats = _apply(model, has_stats=True)(params, batch).stats
        out = {"norms/activation": stats["activation rms"]}
        for kind, tree in (("param", params), ("grad", grads)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                axes = tuple(range(int(name.startswith("layers/")), leaf.ndim))
                out[f"norms/{kind}/{name}"] = jnp.sqrt(jnp.sum(jnp.square(leaf), axes))
        return out

    rows, whole = (NamedSharding(mesh, spec(a)) for a in (("batch", "seq"), ()))
    places = param_shardings(model.config, mesh), rows
    return Jitted(jax.jit(norms, in_shardings=places, out_shardings=whole), mesh)
