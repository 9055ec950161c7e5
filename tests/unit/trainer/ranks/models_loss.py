"""One backward pass on 2 ranks with FSDP2: gradients of each loss, checkpointing and LoRA. argv: output, overrides."""

from __future__ import annotations

import os
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer import config as configuration
from trainer.distributed.env import RankEnv
from trainer.distributed.process_group import Communicator
from trainer.models import build, lora, weights
from trainer.models.memory import apply_activation_checkpoint, compile_layers, decoder_layers

output, *overrides = sys.argv[1:]
cpu = torch.device("cpu")
comm = Communicator(RankEnv.read(os.environ), cpu, 60)
mesh = init_device_mesh("cpu", (2,))
CASES = {
    "plain": [],
    "chunked": ["model.loss=chunked"],
    "own_group": ["model.loss=chunked", "model.tie_word_embeddings=false"],
    "full": ["model.loss=chunked", "train.activation_checkpoint=full"],
    "selective": ["train.activation_checkpoint=selective", "train.compile=true", "train.compile_backend=aot_eager"],
    "lora": ["model.lora.rank=4"],
    "lora_ddp": ["model.lora.rank=4"],
}


def gradients(name: str, recipe: list[str]) -> dict[str, torch.Tensor]:
    config = configuration.load("demo", [*overrides, *recipe])
    settings = build.model_config(config, vocab_size=300, bos_id=0, eos_id=1, pad_id=2)
    models = [build.on_meta(config, settings, cpu) for _ in range(2)]
    if config.model.lora.rank:
        for model in models:
            lora.apply_lora(model, config)
    model, plan = models
    apply_activation_checkpoint(model, config.train.activation_checkpoint)
    if config.train.compile:
        compile_layers(model, config.train.compile_backend)
    if name != "lora_ddp":
        for _, layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        if name == "own_group":
            fully_shard(model.get_output_embeddings(), mesh=mesh)
        fully_shard(model, mesh=mesh)
    weights.initialise([model], plan, config.seed, cpu)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zero at first: nothing would reach A
            weights._local(parameter).data.fill_(0.01)
    run = DistributedDataParallel(model) if name == "lora_ddp" else model
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    mine = slice(comm.env.rank, comm.env.rank + 1)
    loss = run(input_ids=tokens[mine], position_ids=positions[mine], labels=tokens[mine].roll(-1, 1))
    loss.backward()
    found = {
        key: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for key, p in model.named_parameters()
        if p.grad is not None
    }
    if config.model.lora.rank:
        found["state"] = lora.adapter_state(model.named_parameters())
    return found


torch.save({name: gradients(name, recipe) for name, recipe in CASES.items()}, f"{output}.{comm.env.rank}")
comm.close()
