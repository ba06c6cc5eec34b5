import jax
import made
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import hf

from olmo_jax.config.data import FixedLength
from olmo_jax.config.model import ComputeConfig, MeshConfig
from olmo_jax.config.run import Config
from olmo_jax.config.training import OptimConfig
from olmo_jax.parallel import sharding
from olmo_jax.training import (
    optim,
)
from olmo_jax.training.state import TrainState


@pytest.mark.parametrize(
    "name", ["olmo3 yarn grouped", pytest.param("olmo2 grouped", marks=pytest.mark.slow)]
)
def test_ten_steps_equal_pytorch_adamw_on_a_hugging_face_model(name):
    model, model_config, params = hf.random_model(name, scale=0.05)
    rng = np.random.default_rng(1)
    # Two batches in turn, so that there is something to learn.
    batches = np.tile(rng.integers(2, 97, (2, 4, 32)), (5, 1, 1)).astype(np.int32)
    lr, clip = 1e-3, 1.0

    decayed = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [model.model.embed_tokens.weight], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for tokens in batches:
        ids = torch.from_numpy(tokens).long()
        loss = model(ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adam.step()
        expected.append(loss.item())

    config = Config(
        model=model_config,
        compute=ComputeConfig(dtype="float32"),
        data=FixedLength(seq_len=32, global_batch_size=4 * 32),
        mesh=MeshConfig(fsdp=1),
        optim=OptimConfig(name="adamw", eps=1e-8, weight_decay=0.1),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = TrainState(np.int32(0), params, optim.init(config.optim, params))
    state = jax.device_put(state, made.state_places(config, mesh))
    update = made.make_update(config, mesh)
    losses = []
    for tokens in batches:
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": weights}
        arrays = sharding.to_global(batch, mesh, 4)
        state, report = update(state, arrays, np.float32(lr), np.float32(clip))
        losses.append(float(report.loss))
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
