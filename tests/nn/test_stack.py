"""Layers that differ: stacks for each part, a scan over periods, and what fits in none unrolled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from olmo_jax.config.model import ComputeConfig, MeshConfig, ModelConfig, model_problems
from olmo_jax.config.parameters import nested, table
from olmo_jax.config.training import OptimConfig
from olmo_jax.nn import rope, stack, transformer
from olmo_jax.nn.layers import rms_norm
from olmo_jax.nn.transformer import Block, Transformer
from olmo_jax.parallel import sharding
from olmo_jax.training import state

MIXED = ModelConfig(
    vocab_size=96, d_model=32, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
    n_experts=4, n_experts_per_token=2, max_seq_len=64, layer_types=("sliding", "full"), window=5,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 16))


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ("aaaa", (0, 1)),
        ("baaa", (1, 1)),
        ("abab", (0, 2)),
        ("aabaab", (0, 3)),
        ("babbab", (0, 3)),
        ("ccabab", (2, 2)),
        ("abcdef", (0, 6)),
        ("a", (0, 1)),
    ],
)
def test_periods_have_the_fewest_layers_to_compile(layers, found):
    assert stack.periods(list(layers)) == found


@pytest.mark.parametrize("dense", [(0,), (1, 3, 5), (0, 1), (0, 3), (2,), ()])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_scan_over_layers_that_differ_equals_a_loop_by_hand(dense, remat):
    m = dataclasses.replace(MIXED, dense_layers=dense)
    assert model_problems(m) == []
    params = transformer.init(m, jax.random.key(1))
    counts = {len(params["layers"]["moe"]["router"]): 6 - len(dense)}
    if dense:
        counts[len(params["layers"]["mlp"]["w_up"])] = len(dense)
    assert all(found == need for found, need in counts.items())

    def by_hand(params):
        x = params["embed"][TOKENS]
        kinds, tables = rope.kinds(m), rope.tables(m, jnp.arange(16)[None])
        n_moe = n_mlp = 0
        routed = []
        for i, kind in enumerate(m.layer_kinds):
            layers, own = params["layers"], {}
            for name, part in layers.items():
                at = {"mlp": n_mlp, "moe": n_moe}.get(name, i)
                if name == ("moe" if i in dense else "mlp"):
                    continue
                own[name] = jax.tree.map(lambda leaf, at=at: leaf[at], part)
            n_mlp, n_moe = n_mlp + (i in dense), n_moe + (i not in dense)
            block = Block(m, ComputeConfig(dtype="float32", remat="none"), i not in dense)
            x, said = block.apply({"params": own}, x, jnp.int32(kinds.index(kind)), tables, None)  # type: ignore
            routed += [said["tokens"]] if said else []
        return rms_norm(x, params["final_norm"], m.norm_eps), jnp.stack(routed)

    model = Transformer(m, ComputeConfig(dtype="float32", remat=remat))

    def scanned(params):
        out = model.apply({"params": params}, TOKENS)
        return out.hidden, out.routed["tokens"]

    for found, want in zip(jax.jit(scanned)(params), jax.jit(by_hand)(params), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-6)
    grads = (jax.jit(jax.grad(lambda p, f=f: (f(p)[0] ** 2).sum())) for f in (scanned, by_hand))
    for found, want in zip(*(jax.tree.leaves(g(params)) for g in grads), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_a_layer_starts_equal_whatever_its_place_in_a_stack():
    whole = transformer.init(MIXED, jax.random.key(3))
    mixed = transformer.init(dataclasses.replace(MIXED, dense_layers=(0, 3)), jax.random.key(3))
    router = (tree["layers"]["moe"]["router"] for tree in (whole, mixed))
    first, second = router
    np.testing.assert_array_equal(second, first[np.array([1, 2, 4, 5])])
    rows = table(dataclasses.replace(MIXED, dense_layers=(0, 3)))
    assert rows["layers/mlp/w_up"].layers == (0, 3)
    assert rows["layers/moe/w_up"].shape == (4, 4, 32, 48)
    assert rows["layers/attn_norm"].shape == (6, 32)


def test_sharded_layers_that_differ_compute_the_same():
    m = dataclasses.replace(MIXED, dense_layers=(0,))
    model = Transformer(m, ComputeConfig(dtype="float32", remat="qkv"))
    results = []
    for shape in (MeshConfig(fsdp=1), MeshConfig(fsdp=2, expert=2, tensor=2)):
        n = shape.fsdp * shape.expert * shape.tensor
        mesh = sharding.make_mesh(shape, jax.devices()[:n])
        params = state.init_state(m, OptimConfig(), mesh, 5).params
        rows = np.tile(TOKENS, (2, 1))
        with jax.set_mesh(mesh):
            tokens = sharding.to_global({"tokens": rows.astype(np.int32)}, mesh, 4)["tokens"]
            apply = jax.jit(lambda p, t: model.apply({"params": p}, t).hidden)
            results.append(np.asarray(apply(params, tokens)))
    np.testing.assert_allclose(*results, atol=2e-5)


@pytest.mark.parametrize("dense", [(6,), (1, 0), (1, 1), (0, 1, 2, 3, 4, 5)])
def test_layers_that_are_not_there_are_refused(dense):
    (line,) = model_problems(dataclasses.replace(MIXED, dense_layers=dense))
    assert line.startswith("config.model.dense_layers=")
    assert re.search("some of the layers 0 to 5, rising", line)
    no_experts = dataclasses.replace(MIXED, n_experts=0, dense_layers=(0,))
    assert "of a model with model.n_experts" in model_problems(no_experts)[0]


@pytest.mark.slow
def test_a_run_with_a_dense_layer_saves_and_resumes(tmp_path, compiled):
    options = [f"--config={runs.ROOT / 'configs/tiny_olmoe.py'}", "model.dense_layers=0",
               f"data.paths={runs.write_tokens(tmp_path / 'tokens.npy')}", "mesh.fsdp=4",
               "mesh.expert=2", "checkpoint.interval=2", "train.load_balancing_loss=0.01",
               "optim.schedule.warmup=0", f"compute.compilation_cache={compiled}"]  # fmt: skip
    assert runs.run(*options, f"dir={tmp_path / 'whole'}", "train.duration=4").code == 0
    first = runs.run(*options, f"dir={tmp_path / 'half'}", "train.duration=4", "train.hard_stop=2")
    assert first.code == 0, first.err
    rest = runs.run(*options, f"dir={tmp_path / 'half'}", "train.duration=4")
    assert rest.code == 0, rest.err
    last = "checkpoints/step4"
    assert runs.arrays(tmp_path / "half" / last) == runs.arrays(tmp_path / "whole" / last)
    text = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert "block 00/load" not in text
    assert "block 01/load imbalance" in text
    tree = nested({path: row.shape for path, row in table(MIXED).items()})
    assert tree["layers"].keys() >= {"attn", "moe"}
