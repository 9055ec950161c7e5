"""Three steps on a model half sharded, half replicated; then its state through DCP's functions.

argv: output, dtype of the moments.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.config import OptimConfig
from trainer.distributed.env import RankEnv
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh
from trainer.distributed.parallel_model import ParallelModel
from trainer.distributed.process_group import Communicator
from trainer.optimize import build_optimizer


class Model(ParallelModel):
    def __init__(self, module: nn.Module) -> None:
        self.parts = [module]

    def forward_backward(self, batches, scale):
        raise AssertionError

    def evaluate(self, batch):
        raise AssertionError


output, dtype = sys.argv[1:]
env = RankEnv.read(os.environ)
comm = Communicator(env, torch.device("cpu"), 60)
mesh = Mesh(Layout(shard=2), comm)


def build() -> nn.Module:
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 1, bias=False)])
    fully_shard(module[0], mesh=mesh["shard"])
    return module


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


model = build()
config = OptimConfig(lr=0.05, state_dtype=dtype)
optimizer = build_optimizer(Model(model), config)
torch.manual_seed(env.rank)
for step in range(3):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1) * (step + 1) * parameter.detach().sign()
    optimizer.step()
optimizer.zero_grad()
saved = get_optimizer_state_dict(model, optimizer)
other = build()
second = build_optimizer(Model(other), config)
set_optimizer_state_dict(other, second, saved)
pairs = zip(model.parameters(), other.parameters(), strict=True)
torch.save(
    {
        "parameters": {name: full(p.detach()) for name, p in model.named_parameters()},
        "kinds": ["DTensor" if isinstance(s["exp_avg"], DTensor) else "Tensor" for s in optimizer.state.values()],
        "groups": [len(group["params"]) for group in optimizer.param_groups],
        "loaded_dtypes": [s[name].dtype for s in second.state.values() for name in ("exp_avg", "exp_avg_sq")],
        "dcp_equal": all(
            torch.equal(full(optimizer.state[a]["exp_avg_sq"]), full(second.state[b]["exp_avg_sq"])) for a, b in pairs
        ),
    },
    f"{output}.{env.rank}",
)
comm.close()
