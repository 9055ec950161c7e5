"""Weights into a model that is on the meta device and already spread over the ranks.

Nothing is communicated and nothing is held whole: a rank draws one decoder layer (or embedding) at a time in full
size and keeps its slices, or reads only its slices from the safetensors files. Either way the values do not depend
on the layout. Parameters may be plain tensors or DTensors (FSDP2, tensor parallel, both).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.modeling_utils import PreTrainedModel

from trainer.errors import CheckpointError, ConfigError
from trainer.models.memory import decoder_layers
from trainer.models.sparse import initialize_masks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def initialise(parts: Sequence[nn.Module], model: PreTrainedModel, seed: int, device: torch.device) -> None:
    """Puts random weights into `parts` and moves them to `device`.

    `model` is the whole model on the meta device, before any parallelism, with the parameter names of the parts;
    it stays as it is. Each of its modules is initialised as transformers does (`_init_weights`, children first)
    from a generator seeded with (seed, the module's name), in fp32 on `device`: equal on every layout, for one
    kind of device. Needs the memory of one full decoder layer, or embedding, beside the parts.

    Raises ConfigError for an architecture that leaves a parameter without a value.
    """
    materialise(parts, device)
    _fill(parts, model, seed, device, lambda name: True)


def load_pretrained(
    parts: Sequence[nn.Module], model: PreTrainedModel, folder: Path, seed: int, device: torch.device
) -> None:
    """Reads the safetensors of `folder` (transformers' layout, one file or an index) into `parts` on `device`.

    Only the slices of this rank are read, one tensor at a time, and converted to the parameters' dtype. `model` as
    in `initialise`; what was added to the architecture (adapters, masks) is initialised from `seed`.
    Raises CheckpointError that names the first missing, unexpected or mis-shaped tensor.
    """
    materialise(parts, device)
    with ExitStack() as stack:
        stored = _Stored(folder, stack)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        complete = all(stored.key(name, model) for name in names)
        own = names if complete else _names_of_class(model)
        added = set() if complete else {name for name in names if plain_name(name) not in own}
        keys = stored.keys_of(names - added, model)
        for part in parts:
            for name, tensor in [*part.named_parameters(), *_persistent_buffers(part)]:
                if name not in added:
                    _read(stored, keys[name], tensor)
    _fill(parts, model, seed, device, lambda name: name in added)


def materialise(parts: Sequence[nn.Module], device: torch.device) -> None:
    """Allocates what is on the meta device and moves the rest (buffers) to `device`; tied parameters stay tied."""
    for part in parts:
        ties: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in part.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    ties.setdefault(id(parameter), []).append((module, key))
        # through _apply, so that FSDP2 takes note of its new shards
        part._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        for (first, first_key), *others in ties.values():
            for module, key in others:
                module._parameters[key] = first._parameters[first_key]


def local_slices(parameter: torch.Tensor) -> tuple[slice, ...]:
    """The slices of the full tensor that this rank's shard is; all of it for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert shape == tuple(parameter.to_local().shape), f"{parameter.placements} is not one block of the tensor"
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


def plain_name(name: str) -> str:
    """A parameter's name without what adapters put into it: its name in the plain architecture."""
    return name.replace(".base_layer.", ".")


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def _fill(
    parts: Sequence[nn.Module], model: PreTrainedModel, seed: int, device: torch.device, wanted: Callable[[str], bool]
) -> None:
    """Initialises, unit by unit, those parameters of `parts` whose name is `wanted`."""
    targets: dict[str, list[nn.Parameter]] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            if wanted(name):
                targets.setdefault(name, []).append(parameter)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for prefix, unit in _units(model):
            names = [_join(prefix, name) for name, _ in unit.named_parameters()]
            if not any(name in targets for name in names):
                continue
            full = _drawn(model, prefix, unit, seed, device)
            for name in names:
                for parameter in targets.get(name, []):
                    _local(parameter).copy_(full[name][local_slices(parameter)])


def _units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(name, module): the decoder layers, and each module outside of them with parameters of its own."""
    layers = dict(decoder_layers(model))
    for name, module in model.named_modules():
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        if name in layers or (not inside and any(p is not None for p in module._parameters.values())):
            yield name, module


def _drawn(
    model: PreTrainedModel, prefix: str, unit: nn.Module, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The full fp32 parameters of one unit, by name; the unit itself is back on the meta device afterwards."""
    places = [(_join(prefix, name), module, dict(module._parameters)) for name, module in unit.named_modules()]
    for _, module, parameters in places:
        for key, parameter in parameters.items():
            if parameter is not None:
                # NaN, to see what is left without a value
                whole = torch.full(parameter.shape, torch.nan, dtype=torch.float32, device=device)
                module._parameters[key] = nn.Parameter(whole, requires_grad=False)
    try:
        for path, module, _ in reversed(places):  # children before their parents
            torch.manual_seed(_seed_of(seed, path))
            _initialise_module(model, module)
        initialize_masks(unit)
        full = {
            _join(path, key): module._parameters[key].detach()  # type: ignore[union-attr]
            for path, module, parameters in places
            for key, parameter in parameters.items()
            if parameter is not None
        }
    finally:
        for _, module, parameters in places:
            module._parameters.update(parameters)
    for name, tensor in full.items():
        if tensor.isnan().any():
            raise ConfigError(
                f"{type(model).__name__} of transformers leaves {name!r} without an initial value",
                hint="Start from weights (model.pretrained), or use another model.architecture.",
            )
    return full


def _initialise_module(model: PreTrainedModel, module: nn.Module) -> None:
    """As transformers does, or peft for its adapters."""
    model._init_weights(module)
    if hasattr(module, "reset_lora_parameters"):
        for adapter in module.lora_A:
            module.reset_lora_parameters(adapter, True)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _seed_of(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{path}".encode()).digest()[:8], "little") >> 1


def _persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (_join(path, key), buffer)
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    ]


def _names_of_class(model: PreTrainedModel) -> set[str]:
    """The parameters that transformers' class itself has."""
    with torch.device("meta"):
        return {name for name, _ in type(model)(model.config).named_parameters(remove_duplicate=False)}


class _Stored:
    """The tensors of a folder, without reading any."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._open: dict[str, Any] = {}
        try:
            if (folder / INDEX).is_file():
                self._files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            elif (folder / SINGLE).is_file():
                self._files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
            else:
                raise CheckpointError(
                    f"{folder}: neither {SINGLE} nor {INDEX} is there",
                    hint="model.pretrained needs weights as safetensors (save_pretrained writes them).",
                )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: {' '.join(str(error).split())}") from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = self._stack.enter_context(safe_open(str(self.folder / name), framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / name}: {' '.join(str(error).split())}") from None
        return self._open[name]

    def key(self, name: str, model: PreTrainedModel) -> str | None:
        """The stored name of a parameter: its own, or without the base model's prefix (GPT-2's weights on the hub)."""
        name = plain_name(name)
        short = name.removeprefix(f"{model.base_model_prefix}.")
        return next((key for key in (name, short) if key in self._files), None)

    def slice(self, key: str) -> Any:
        return self._file(self._files[key]).get_slice(key)

    def keys_of(self, names: set[str], model: PreTrainedModel) -> dict[str, str]:
        """The stored name of each of these parameters, and of the persistent buffers; tied ones share theirs.

        Raises CheckpointError for the first one that is missing, then for the first tensor that has no place.
        """
        tensors = {name: tensor for name, tensor in model.named_parameters(remove_duplicate=False) if name in names}
        tensors.update(_persistent_buffers(model))
        found = {name: self.key(name, model) for name in tensors}
        shared = {id(tensors[name]): key for name, key in found.items() if key}
        keys: dict[str, str] = {}
        for name, tensor in tensors.items():
            key = found[name] or shared.get(id(tensor))
            if key is None:
                raise CheckpointError(f"{self.folder}: there is no tensor {plain_name(name)!r}")
            keys[name] = key
        constants = {self.key(name, model) for name, _ in model.named_buffers()}
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"\.rotary_emb\.inv_freq$"]
        for key in sorted(set(self._files) - set(keys.values()) - constants):
            if not any(re.search(pattern, key) for pattern in ignored):
                raise CheckpointError(f"{self.folder}: the model has no place for the tensor {key!r}")
        return keys


@torch.no_grad()
def _read(stored: _Stored, key: str, tensor: torch.Tensor) -> None:
    source = stored.slice(key)
    if tuple(source.get_shape()) != tuple(tensor.shape):
        raise CheckpointError(
            f"{stored.folder}: tensor {key!r} has the shape {tuple(source.get_shape())},"
            f" the model's is {tuple(tensor.shape)}"
        )
    local = _local(tensor)
    if local.numel():
        local.copy_(source[local_slices(tensor)])
