"""Gradients of a sparse model under FSDP2 on the meta device first. argv: output, mask, file of whole weights."""

from __future__ import annotations

import os
import sys

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config import SparseConfig
from trainer.distributed.env import RankEnv
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh
from trainer.distributed.process_group import Communicator
from trainer.models.sparse import apply_sparse, bake_state, initialize_masks, sparsity

output, mask, weights = sys.argv[1:]
comm = Communicator(RankEnv.read(os.environ), torch.device("cpu"), 60)
mesh = Mesh(Layout(shard=2), comm)["shard"]
given = torch.load(weights)
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**given["sizes"])).double()
controller = apply_sparse(model, SparseConfig(mask=mask, final_density=0.3, start_step=0, end_step=10))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
for module in model.modules():
    if isinstance(module, type(model)) or hasattr(module, "set_gradient_divide_factor"):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
model.to_empty(device="cpu")
model.model.rotary_emb.inv_freq.copy_(given["inv_freq"])
initialize_masks(model)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name in given["weights"]:
            parameter.copy_(distribute_tensor(given["weights"][name], mesh, parameter.placements))
controller.step(5)
ids = given["ids"].chunk(2)[comm.env.rank]
logits = model(ids, use_cache=False).logits
torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


state = {name: full(tensor) for name, tensor in model.state_dict().items()}
torch.save(
    {
        "gradients": {name: full(parameter.grad) for name, parameter in model.named_parameters()},
        "sparsity": sparsity(model),
        "baked": bake_state(model, state),
    },
    f"{output}.{comm.env.rank}",
)
comm.close()
