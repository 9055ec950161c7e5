"""Two steps of LoRA in low precision, frozen matrices as they are held and held in fp32. argv: output, overrides."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainer import config as configuration
from trainer.config import Config
from trainer.distributed.env import RankEnv
from trainer.distributed.layout import layout_for
from trainer.distributed.mesh import Mesh
from trainer.distributed.process_group import Communicator
from trainer.models import build, lora, weights
from trainer.models.parallelize import parallelize

cpu = torch.device("cpu")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def measure(config: Config, mesh: Mesh, wide: bool) -> dict[str, Any]:
    settings = build.model_config(config, vocab_size=300, bos_id=0, eos_id=1, pad_id=2)
    model = build.on_meta(config, settings, cpu)
    lora.apply_lora(model, config)
    if wide:
        model.float()
    plan = copy.deepcopy(model)
    parallel = parallelize(model, config, mesh, lambda parts: weights.initialise(parts, plan, config.seed, cpu))
    named = list(parallel.named_parameters())
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    for name, parameter in trained.items():
        if ".lora_B" in name:  # zero at first: nothing would reach A
            weights._local(parameter).data.fill_(0.01)
    tokens = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(4, -1)
    batch = {"input_ids": tokens, "position_ids": positions, "labels": tokens.roll(-1, 1)}
    share = 4 // mesh.layout.data
    mine = {key: value[mesh.data_rank * share :][:share] for key, value in batch.items()}
    result: dict[str, Any] = {"held": {name: parameter.dtype for name, parameter in named}}
    for step in range(2):
        loss = parallel.forward_backward([mine], 1 / 96)
        result[f"loss {step}"] = loss
        for name, parameter in trained.items():
            assert parameter.grad is not None
            result[f"{step} {name}"] = whole(parameter.grad)
            parameter.data.add_(parameter.grad, alpha=-1.0)
        parallel.zero_grad()
    result["evaluated"] = parallel.evaluate(mine)
    return result


if __name__ == "__main__":
    output, *overrides = sys.argv[1:]
    config = configuration.load("demo", overrides)
    env = RankEnv.read(os.environ)
    comm = Communicator(env, cpu, 60)
    mesh = Mesh(layout_for(config, env.world_size, env.local_world_size), comm)
    torch.save([measure(config, mesh, wide) for wide in (False, True)], f"{output}.{env.rank}")
    comm.close()
