"""All that one training run is, at one step: model, optimizer, schedule, RNG, data position.

In a checkpoint's folder this is `config.json`, `model.safetensors`, `tokenizer*.json` (so that plain
`from_pretrained` loads it), `optimizer.pt`, `rng.pt` and `state.json`.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.modeling_utils import PreTrainedModel

from trainer.data.loader import BatchStream
from trainer.distributed.broadcast import broadcast_tree
from trainer.distributed.process_group import Communicator
from trainer.errors import CheckpointError


def rng_state(device: torch.device) -> dict[str, Any]:
    """Every generator of this process, in types that `torch.load(weights_only=True)` accepts."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            cached,
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int, rank: int) -> None:
    """Other random numbers on each rank, the same at each start."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@dataclass
class TrainingState:
    model: PreTrainedModel
    optimizer: Optimizer
    schedule: LambdaLR
    stream: BatchStream
    tokenizer_folder: Path
    config_hash: str
    step: int = 0
    """Finished optimizer steps."""

    def write(self, folder: Path, rngs: list[dict[str, Any]]) -> None:
        """Puts all files into `folder`; `rngs` is every rank's `rng_state`, in order."""
        self.model.save_pretrained(folder, safe_serialization=True)
        for file in self.tokenizer_folder.iterdir():
            shutil.copy(file, folder / file.name)
        with (folder / "optimizer.pt").open("wb") as file:
            torch.save(self.optimizer.state_dict(), file)
        with (folder / "rng.pt").open("wb") as file:
            torch.save(rngs, file)
        state = {
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "data": self.stream.state_dict(),
            "config_hash": self.config_hash,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")

    def load(self, folder: Path, comm: Communicator, holder: int) -> None:
        """Every rank takes over what rank `holder` reads from `folder`.

        A rank beyond the checkpoint's world keeps its own random state. Raises DataError if the data
        is not the same, CheckpointError if the model is not.
        """
        mine = comm.env.rank == holder
        state = comm.broadcast(json.loads((folder / "state.json").read_text()) if mine else None, holder)
        self.stream.load_state_dict(state["data"])
        self._load_model(load_file(folder / "model.safetensors") if mine else {}, comm, holder)
        optimizer = (
            torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True) if mine else None
        )
        self.optimizer.load_state_dict(broadcast_tree(optimizer, comm, holder))
        self.schedule.load_state_dict(state["schedule"])
        rngs = comm.broadcast(torch.load(folder / "rng.pt", weights_only=True) if mine else None, holder)
        if comm.env.rank < len(rngs):
            set_rng_state(rngs[comm.env.rank], comm.device)
        self.step = int(state["step"])

    def _load_model(self, tensors: dict[str, torch.Tensor], comm: Communicator, holder: int) -> None:
        parameters = dict(self.model.named_parameters())  # tied ones once, under their first name
        shapes = comm.broadcast({name: tuple(tensor.shape) for name, tensor in tensors.items()}, holder)
        wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != wanted:
            wrong = sorted(set(shapes.items()) ^ set(wanted.items()))[0][0]
            raise CheckpointError(
                f"the checkpoint is of another model: {wrong} is {shapes.get(wrong, 'missing')} there,"
                f" {wanted.get(wrong, 'missing')} here",
                hint="Use the recipe's original model, or checkpoint.resume=none.",
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                source = tensors.get(name, torch.empty(0)).to(parameter.dtype)
                tensor = (
                    source.contiguous()
                    if comm.env.rank == holder
                    else torch.empty_like(parameter, device="cpu")
                )
                parameter.copy_(comm.broadcast_tensor(tensor, holder))
