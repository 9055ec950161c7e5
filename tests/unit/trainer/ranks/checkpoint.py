"""One rank that does to a checkpointed model what argv's JSON says. No forward pass: a gradient is a function of its
parameter alone, element by element, so that one plain process gets the same numbers as any layout."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.checkpoints import Checkpointer, TrainingState
from trainer.checkpoints.formats import files
from trainer.config import CheckpointConfig
from trainer.distributed.env import RankEnv
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh
from trainer.distributed.process_group import Communicator
from trainer.errors import TrainerError

LANES = 12


class Stream:
    """Lanes as those of BatchStream: a data-parallel rank has a contiguous range of them."""

    def __init__(self, mesh: Mesh) -> None:
        share = LANES // mesh.layout.data
        self._range = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
        self.lanes = [[lane, 0] for lane in range(LANES)][self._range]

    def advance(self) -> None:
        for lane in self.lanes:
            lane[1] += lane[0] + 1

    def state_dict(self) -> dict[str, Any]:
        return {"lanes": self.lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert len(state["lanes"]) == LANES
        self.lanes = copy.deepcopy(state["lanes"][self._range])

    @staticmethod
    def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
        return {"lanes": [lane for state in states for lane in state["lanes"]]}


class Reporter:
    def __init__(self, main: bool) -> None:
        self._main = main

    def say(self, text: str) -> None:
        if self._main:
            print(text, flush=True)

    def checkpoint(self, path: Path, size: int, seconds: float, blocked: float) -> None:
        self.say("event " + json.dumps({"path": path.name, "bytes": size, "seconds": seconds, "blocked": blocked}))


class Parts:
    def __init__(self, parts: list[torch.nn.Module]) -> None:
        self.parts = parts


def build(mesh: Mesh, spec: dict[str, Any]) -> tuple[list[torch.nn.Module], LlamaConfig]:
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    config = LlamaConfig(
        num_key_value_heads=2, tie_word_embeddings=spec.get("tied", False), **{**sizes, **spec.get("model", {})}
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    layout = mesh.layout
    if layout.pipeline > 1:
        for index in range(config.num_hidden_layers):
            if index % layout.pipeline != mesh.pipeline_rank:
                delattr(model.model.layers, str(index))
        if mesh.pipeline_rank != 0:
            model.model.embed_tokens = None
        if mesh.pipeline_rank != layout.pipeline - 1:
            model.model.norm, model.lm_head = torch.nn.Identity(), None
    if layout.tensor > 1:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        for layer in model.model.layers:
            parallelize_module(layer.mlp, mesh["tp"], plan)
    if layout.shard > 1:
        names = ("replicate", "shard") if layout.replicate > 1 else "shard"
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh[names])
        fully_shard(model, mesh=mesh[names])
    return [model], config


def train(state: TrainingState, steps: int, checkpointer: Checkpointer) -> None:
    for _ in range(steps):
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.sin(7 * parameter.detach() + state.step)
        checkpointer.poll()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.schedule.step()
        state.stream.advance()
        state.step += 1


def dump(state: TrainingState, mesh: Mesh, path: str) -> None:
    """Every whole tensor, put together by torch and not by the code under test; one file for each rank."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    named = {name: p for part in state.model.parts for name, p in part.named_parameters()}
    moments = {name: {key: whole(value) for key, value in state.optimizer.state[p].items()} for name, p in named.items()
               if p in state.optimizer.state}  # fmt: skip
    torch.save(
        {
            "model": {name: whole(parameter) for name, parameter in named.items()},
            "moments": moments,
            "step": state.step,
            "lr": [group["lr"] for group in state.optimizer.param_groups],
            "lanes": state.stream.lanes,
            "scale": state.scaler.get_scale() if state.scaler else None,
            "random": torch.rand(3),
        },
        f"{path}.{mesh.comm.env.rank}",
    )


def limit_file_size(size: int) -> None:
    """As if the disk of this rank were full: a file cannot grow beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def main() -> int:
    spec = json.loads(sys.argv[1])
    env = RankEnv.read(os.environ)
    comm = Communicator(env, torch.device("cpu"), 30)
    mesh = Mesh(Layout(**spec.get("layout", {})), comm)
    files.LIMIT = spec.get("limit", files.LIMIT)
    parts, config = build(mesh, spec)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}], lr=1e-2
    )
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if spec.get("scaler") else None
    tokenizer = Path(spec["tokenizer"]) if "tokenizer" in spec else None
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = TrainingState(Parts(parts), optimizer, schedule, scaler, Stream(mesh), config, tokenizer, "cafe")
    root = Path(os.environ.get("ORCH_CHECKPOINT_DIR", spec.get("root", "")))
    torch.manual_seed(env.rank)
    try:
        checkpointer = Checkpointer(
            CheckpointConfig(**spec.get("config", {})), root, mesh, Reporter(env.is_main), run="run", timeout=30
        )
        for action, *arguments in spec["do"]:
            if action == "resume":
                checkpointer.resume(state, lambda: None)
                for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                    group["lr"] = rate
            elif action == "train":
                train(state, arguments[0], checkpointer)
            elif action == "dump":
                dump(state, mesh, arguments[0])
            elif action == "full disk" and env.rank in arguments[0]:
                limit_file_size(arguments[1])
            elif action == "slow copy":
                slow_copy()
            elif action in ("save", "poll", "finish"):
                getattr(checkpointer, action)(*([state] if action == "save" else []))
    except TrainerError as error:
        print(f"{type(error).__name__}: {error.message}\nhint: {error.hint}", flush=True)
        return error.exit_code
    finally:
        comm.close()
    return 0


def slow_copy() -> None:
    """The writer's thread starts to copy late."""
    from trainer.checkpoints.snapshot import Snapshot

    original = Snapshot.copy

    def copy_late(self: Snapshot) -> None:
        time.sleep(0.3)
        original(self)

    Snapshot.copy = copy_late  # type: ignore[method-assign]


sys.exit(main())
