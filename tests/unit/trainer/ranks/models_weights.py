"""Spreads a meta model over 4 ranks in several layouts, puts weights in, and gathers them. argv: output, folder."""

from __future__ import annotations

import os
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainer import config as configuration
from trainer.distributed.env import RankEnv
from trainer.distributed.process_group import Communicator
from trainer.models import build, weights
from trainer.models.memory import decoder_layers

output, folder, *overrides = sys.argv[1:]
cpu = torch.device("cpu")
comm = Communicator(RankEnv.read(os.environ), cpu, 60)
config = configuration.load("demo", overrides)
settings = build.model_config(config, vocab_size=301, bos_id=0, eos_id=1, pad_id=2)
reference = build.on_meta(config, settings, cpu)

LAYER = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}
LAYOUTS = {"plain": (1, 1), "fsdp": (4, 1), "tp": (1, 4), "fsdp_tp": (2, 2)}


def spread(shard: int, tensor: int) -> torch.nn.Module:
    model = build.on_meta(config, settings, cpu)
    if shard * tensor == 1:
        return model
    mesh = init_device_mesh("cpu", (4 // shard // tensor, shard, tensor), mesh_dim_names=("replicate", "shard", "tp"))
    if tensor > 1:
        for _, layer in decoder_layers(model):
            parallelize_module(layer, mesh["tp"], LAYER, src_data_rank=None)
    if shard > 1:
        for _, layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
    return model


results = {}
for name, (shard, tensor) in LAYOUTS.items():
    for kind in ("random", "loaded"):
        model = spread(shard, tensor)
        if kind == "random":
            weights.initialise([model], reference, config.seed, cpu)
        else:
            from pathlib import Path

            weights.load_pretrained([model], reference, Path(folder), config.seed, cpu)
        local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        results[name, kind] = {
            "parameters": {
                key: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
                for key, p in model.named_parameters()
            },
            "kinds": {str(p.placements) if isinstance(p, DTensor) else "plain" for p in model.parameters()},
            "buffers": {key: value.clone() for key, value in model.named_buffers()},
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "local": local,
        }
        if shard > 1:  # FSDP2 took note of its new shards: a step works
            tokens = torch.arange(8)[None]
            loss = model(input_ids=tokens, position_ids=tokens, labels=tokens)
            loss.backward()
            results[name, kind]["loss"] = loss.item()
torch.save(results, f"{output}.{comm.env.rank}")
comm.close()
