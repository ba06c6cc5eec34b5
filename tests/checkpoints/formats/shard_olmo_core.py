"""Two processes of OLMo-core train a model that is sharded over them, and save it.

Run by the tests with that package installed: `shard_olmo_core.py OUT` makes a checkpoint in OUT
and, in OUT/whole.npz, each parameter and first moment put together by PyTorch.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.distributed.checkpoint import save_model_and_optim_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_olmo_core import LOUD, OPTIMIZERS, VOCAB, model_config

PROCESSES, OPTIMIZER = 2, OPTIMIZERS["adamw"](**LOUD)


def work(rank: int, out: pathlib.Path) -> None:
    """One of the processes."""
    meeting = (out / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    config = model_config("olmo3")
    model = config.build(init_device="cpu")
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optim = OPTIMIZER.build(model)
    for _ in range(2):
        model(torch.randint(0, VOCAB, (2, 24))).square().mean().backward()
        optim.step()
        optim.zero_grad()
    save_model_and_optim_state(out / "model_and_optim", model, optim)
    whole = {key: value.full_tensor() for key, value in model.state_dict().items()}
    for key, p in model.named_parameters():
        whole[f"{key}.exp_avg"] = optim.state[p]["exp_avg"].full_tensor()
    if rank == 0:
        np.savez(out / "whole.npz", **{key: value.numpy() for key, value in whole.items()})
        experiment = {
            "model": config.as_config_dict(),
            "train_module": {"optim": OPTIMIZER.as_config_dict()},
        }
        (out / "config.json").write_text(json.dumps(experiment))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (pathlib.Path(sys.argv[1]),), PROCESSES)
    print(json.dumps(PROCESSES))
