"""All that one training run is, at one step: model, optimizer, schedule, scaler, RNG, data position."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.configuration_utils import PretrainedConfig

from trainer.models.lora import Adapter, is_adapter

Tensors = dict[str, torch.Tensor]
"""`model.<name in the whole model>` and `optimizer.<that name>.<key>`: the same in every layout."""


class Parts(Protocol):
    """What is needed of a ParallelModel."""

    parts: Sequence[nn.Module]


class Stateful(Protocol):
    """`state_dict` is made of what JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stream(Stateful, Protocol):
    """The training rows of one data-parallel rank."""

    @staticmethod
    def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of all, from that of each data-parallel rank in order; `load_state_dict` takes it anywhere."""
        ...


@dataclass
class TrainingState:
    model: Parts
    optimizer: Optimizer
    schedule: Stateful
    """Loaded after the optimizer; it sets the groups' rates, which are the recipe's and not in the checkpoint."""
    scaler: Stateful | None
    stream: Stream
    hf_config: PretrainedConfig
    """Written with every checkpoint, as is the tokenizer."""
    tokenizer_folder: Path | None
    config_hash: str
    step: int = 0
    """Finished optimizer steps."""
    adapter: Adapter | None = None
    """If adapters are trained: nothing else of the model is saved or loaded."""
    pretrained: Path | None = None
    """`model.pretrained`, whose defaults for generation are written too."""
    chat: bool = False
    """Whether conversations are learnt: a tokenizer without a chat template is written with the one in use."""


def tensors(state: TrainingState, *, optimizer: bool = True) -> Tensors:
    """This rank's tensors, as they are used: parameters and persistent buffers (tied ones once), moments; with
    adapters, theirs alone.

    A tensor is a DTensor where it is sharded. Asking each part for its `state_dict` also puts FSDP's
    parameters back into shards, in which they are not after a forward pass without backward.
    """
    found: Tensors = {}
    names: dict[int, str] = {}
    for part in state.model.parts:
        for name, tensor in part.state_dict(keep_vars=True).items():
            if id(tensor) not in names and (state.adapter is None or is_adapter(name)):
                names[id(tensor)] = name
                found[f"model.{name}"] = tensor
    if optimizer:
        for parameter, moments in state.optimizer.state.items():
            for key, moment in moments.items():
                found[f"optimizer.{names[id(parameter)]}.{key}"] = moment
    return found


def allocate_moments(optimizer: Optimizer) -> None:
    """Lets the optimizer make its state, in its own types and placements: a step of size 0 with zero gradients.

    Method of torch.distributed.checkpoint.state_dict (`_init_optim_state`).
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def forget_moments(state: TrainingState, known: set[str]) -> None:
    """Drops the moments of parameters that have none in the checkpoint: those that had no gradient yet."""
    names = {id(tensor): name.partition(".")[2] for name, tensor in tensors(state, optimizer=False).items()}
    for parameter, moments in list(state.optimizer.state.items()):
        if any(f"optimizer.{names[id(parameter)]}.{key}" not in known for key in moments):
            del state.optimizer.state[parameter]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's own values, without gradient history; writing to it writes to `tensor`."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rng_state(device: torch.device) -> dict[str, Any]:
    """Every generator of this process, in types that `torch.load(weights_only=True)` accepts."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys, int(position), int(has_gauss), float(cached)],
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
