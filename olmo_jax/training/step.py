"""The training step: state, its birth on the mesh, one update, and the evaluation step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmo_jax.config.parameters import table
from olmo_jax.config.run import Config
from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel import xla_flags
from olmo_jax.parallel.sharding import (
    axis_size,
    data_parallel_ways,
    spec,
    sum_of_replicas,
)
from olmo_jax.training import experts, losses, optim
from olmo_jax.training.experts import balance, reached_all
from olmo_jax.training.state import Batch, Metrics, TrainState, build_model, state_shardings


def make_train_step(config: Config, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled update `(state, batch, lr, max_grad_norm) -> (state, metrics)`.

    The state is donated and keeps its shardings. Metrics are device scalars by OLMo-core's names,
    for the host to read later. `batch` holds global `[batch, seq]` arrays; a new shape compiles,
    with the flags of `xla_flags` for these devices.
    """
    model = build_model(config)
    ranks = config.train.loss_ranks or data_parallel_ways(mesh)
    state_spec, whole = state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())

    def train_step(
        state: TrainState, batch: Batch, lr: jax.Array, max_grad_norm: jax.Array
    ) -> tuple[TrainState, Metrics]:
        weights = batch["loss_weights"]
        grads, parts = _gradients(config, model, state.params, batch, ranks)
        is_whole = reached_all(config, parts)
        with jax.named_scope("optimizer"):
            params, opt_state, metrics = optim.update(
                config.optim, grads, state.opt_state, state.params, lr, max_grad_norm,
                parts["ce"], (weights.sum() > 0) & is_whole, table(config.model),
            )  # fmt: skip
        if config.model.router_bias_gamma is not None:
            # OLMo: moves it after a skipped step too.
            gamma = config.model.router_bias_gamma * (1.0 - metrics["optim/step skipped"])
            params = balance(params, parts["routed"], gamma)
        metrics |= {
            "train/CE loss": parts["ce"],
            "train/masked labels (%)": 1.0 - jnp.mean(weights),  # OLMo-core: a fraction
            "train/masked instances (%)": jnp.mean(weights.sum(1) == 0, dtype=jnp.float32),
        }
        if config.train.z_loss is not None:
            metrics["train/Z loss"] = config.train.z_loss * parts["z"]
            metrics["train/Z loss unscaled"] = parts["z"]
        if "routed" in parts:
            metrics |= experts.metrics(config, parts)
        return TrainState(state.step + is_whole, params, opt_state), metrics

    rows = NamedSharding(mesh, spec(("batch", "seq")))
    return _under(mesh, jax.jit(
        train_step,
        in_shardings=(state_spec, rows, whole, whole),
        out_shardings=(state_spec, whole),
        donate_argnums=0,
        compiler_options=xla_flags.options(
            mesh.devices.flat[0].device_kind, config.compute.xla_flags
        ),
    ))  # fmt: skip


def _gradients(
    config: Config, model: Transformer, params: Any, batch: Batch, ranks: int
) -> tuple[Any, dict[str, jax.Array]]:
    """Summed gradients and loss parts of the batch, over `compute.accumulate` micro-batches."""
    weights = batch["loss_weights"]  # the divisors are those of the whole batch
    n_counted = losses.counted(weights).sum()
    scaled = losses.normalize(weights, config.train.loss_normalization, ranks)
    batch = batch | {"loss_weights": scaled}

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden, routed = _apply(model, params, batch, "hidden")
        loss, parts = losses.next_token(hidden, transformer.head(params), batch, config)
        if not routed:
            return loss, parts
        router_loss, router_parts = experts.router(routed, batch["tokens"].size, n_counted, config)
        return loss + router_loss, parts | router_parts

    grad_fn = jax.grad(loss_fn, has_aux=True)
    n = config.compute.accumulate
    if n == 1:
        return grad_fn(params, batch)

    def add(total: Any, micro: Batch) -> tuple[Any, None]:
        grads, parts = jax.tree.map(jnp.add, total, new := grad_fn(params, micro))
        if "buffer" in parts:
            parts["buffer"] = jnp.maximum(total[1]["buffer"], new[1]["buffer"])
        return (grads, parts), None

    def total(params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        # Strided, so that each device splits its own rows: contiguous parts would move rows around.
        micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, n, *a.shape[1:]), 1, 0), batch)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, params, _first(micro)))
        return jax.lax.scan(add, zeros, micro)[0]

    # Gradients that are sharded have to be scattered in each micro-batch, else they would not fit.
    # Losses of experts are of all rows together.
    is_sharded = axis_size("fsdp", "expert", "context", "tensor") > 1
    if axis_size("data") == 1 or is_sharded or config.model.n_experts:
        return total(params, batch)
    return sum_of_replicas(total, params, batch)


def _apply(model: Transformer, params: Any, batch: Batch, output: str) -> Any:
    optional = batch.get("positions"), batch.get("segment_ids")
    return model.apply({"params": params}, batch["tokens"], *optional, output=output)


def _first(micro: Batch) -> Batch:
    return jax.tree.map(lambda a: a[0], micro)


def make_eval_step(config: Config, mesh: Mesh) -> Callable[[Any, Batch], Metrics]:
    """The compiled `(params, batch) -> {"ce_sum", "tokens"}`: nats over, and number of, tokens.

    `batch` holds global arrays with `loss_weights` 1 for tokens that are scored, else 0.
    """
    compute = dataclasses.replace(config.compute, expert_buffer=None)  # nothing would stop it
    model = build_model(dataclasses.replace(config, compute=compute))

    def evaluate(params: Any, batch: Batch) -> Metrics:
        hidden, _ = _apply(model, params, batch, "hidden")
        parts = losses.next_token(hidden, transformer.head(params), batch, config)[1]
        return {"ce_sum": parts["ce"], "tokens": batch["loss_weights"].sum()}

    params = state_shardings(config, mesh).params
    rows, whole = (NamedSharding(mesh, spec(a)) for a in (("batch", "seq"), ()))
    return _under(mesh, jax.jit(evaluate, in_shardings=(params, rows), out_shardings=whole))


def make_norms(config: Config, mesh: Mesh) -> Callable[[Any, Batch], Metrics]:
    """The compiled `(params, batch) -> per-layer norms` of parameters, gradients, activations.

    Returns a flat dict: `norms/param/{path}` and `norms/grad/{path}` (L2), `norms/activation`
    (RMS of each block's output); leaves under `layers` and activations are `[n_layers]`.
    """
    model = build_model(config)

    def norms(params: Any, batch: Batch) -> Metrics:
        ranks = config.train.loss_ranks or data_parallel_ways(mesh)
        grads, _ = _gradients(config, model, params, batch, ranks)
        _, stats = _apply(model, params, batch, "stats")
        out = {"norms/activation": stats["activation rms"]}
        for kind, tree in (("param", params), ("grad", grads)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                axes = tuple(range(int(name.startswith("layers/")), leaf.ndim))
                out[f"norms/{kind}/{name}"] = jnp.sqrt(jnp.sum(jnp.square(leaf), axes))
        return out

    params = state_shardings(config, mesh).params
    rows, whole = (NamedSharding(mesh, spec(a)) for a in (("batch", "seq"), ()))
    return _under(mesh, jax.jit(norms, in_shardings=(params, rows), out_shardings=whole))


def _under(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` with the mesh in force, which `constrain` asks for while tracing."""

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return step(*args)

    call.jitted = step  # type: ignore[attr-defined] # for lowering ahead of time and cache counts
    return call
