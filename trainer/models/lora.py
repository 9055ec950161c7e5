"""Low-rank adapters (LoRA, arXiv:2106.09685) with peft: put into a model, named and described for PeftModel.

While a model with adapters trains, its other weights are frozen. They are not in its checkpoints; a resume reads
them from `model.pretrained` again, and `fingerprint` tells whether they are still the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from trainer.config import Config, LoraConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.models.memory import LOW

ADAPTER = "default"
"""peft's own name of a model's only adapter; part of the parameters' names."""

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""peft's files."""

_PREFIX = "base_model.model."
_SAMPLE = 4096


def apply_lora(model: nn.Module, config: Config) -> None:
    """Gives the linear layers named in `model.lora.targets` adapters, and freezes all else, in place.

    `model` is on the meta device; models/weights.py initialises the adapters as peft does (A uniform, B zero).
    Names become `….q_proj.base_layer.weight`, `….q_proj.lora_A.default.weight`. Frozen matrices of linear layers
    are held in the precision to compute in: they would be cast to it for every product, so no number changes.
    Adapters, norms and embeddings stay fp32. Raises ConfigError for a target that names no layer, or the output
    head where its weight is also the embedding.
    """
    from peft import inject_adapter_in_model

    lora = config.model.lora
    layers = {name: module for name, module in model.named_modules() if _is_linear(module)}
    names = {name.rpartition(".")[2] for name in layers}
    for target in lora.targets:
        if target not in names:
            raise ConfigError(
                f"model.lora.targets: {type(model).__name__} has no linear layer {target!r}",
                hint=f"It has {', '.join(sorted(names))}.",
            )
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in layers.items():
        if name.rpartition(".")[2] in lora.targets and module.weight is embedding.weight:
            raise ConfigError(
                f"model.lora.targets: {name} shares its weight with the embedding, which would change with it",
                hint=f"Leave {name} out of model.lora.targets.",
            )
    with torch.device("meta"):
        inject_adapter_in_model(_peft_config(lora, type(model).__name__), model, ADAPTER)
    low = LOW.get(config.train.precision)
    for module in layers.values() if low else ():
        if module.weight is not embedding.weight:
            module.to(low)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, transposed


def _peft_config(lora: LoraConfig, model_class: str):  # type: ignore[no-untyped-def]
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        fan_in_fan_out=model_class.startswith("GPT2"),
        task_type="CAUSAL_LM",
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def adapter_state(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The adapters among named parameters, whole and on the CPU, under the names of peft's files.

    Collective where they are DTensors: all ranks of their mesh call it.
    """
    state = {}
    for name, tensor in parameters:
        if is_adapter(name):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[f"{_PREFIX}{name.replace(f'.{ADAPTER}.', '.')}"] = whole.detach().cpu().contiguous()
    return state


def own_name(name: str) -> str:
    """The parameter's name for a name in peft's files: `adapter_state` backwards."""
    module, _, kind = name.removeprefix(_PREFIX).rpartition(".")
    return f"{module}.{ADAPTER}.{kind}"


@dataclass(frozen=True)
class Adapter:
    """What there is to know about adapters beside their weights."""

    lora: LoraConfig
    base: str
    """Folder or hub name of the frozen model; empty if its weights are random."""
    revision: str | None
    model_class: str
    """Of transformers."""
    fingerprint: str
    """Of the frozen weights."""

    def write_settings(self, folder: Path) -> None:
        """With the weights' file this makes what `PeftModel.from_pretrained(model, folder)` opens."""
        settings = _peft_config(self.lora, self.model_class)
        settings.base_model_name_or_path = self.base
        settings.revision = self.revision
        settings.inference_mode = True
        settings.save_pretrained(str(folder))


def adapter_of(config: Config, hf_config: PretrainedConfig, pretrained: Path | None) -> Adapter | None:
    """The recipe's adapter, or None without one; `pretrained` is the folder of `model.pretrained` on this node."""
    model = config.model
    if not model.lora.rank:
        return None
    if pretrained is None:  # random weights: a function of the seed and the sizes
        about = {**hf_config.to_dict(), "transformers_version": None, "seed": config.seed}
        known = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    else:
        known = fingerprint(pretrained)
    here = pretrained is not None and Path(str(model.pretrained)).is_dir()
    return Adapter(
        lora=model.lora,
        base=str(Path(str(model.pretrained)).resolve()) if here else model.pretrained or "",
        revision=model.revision,
        model_class=MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)].__name__,
        fingerprint=known,
    )


def fingerprint(folder: Path) -> str:
    """16 hex digits of the safetensors in `folder`: each tensor's name, type and shape, and 3 × 4 KiB of its values.

    However the tensors are divided into files. A fine-tuned or otherwise replaced model differs in all of its
    matrices, so a sample of each tells, in milliseconds. Raises CheckpointError for a file that cannot be read.
    """
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    begin, end = entry.pop("data_offsets")
                    state = hashlib.sha256(json.dumps([name, entry], sort_keys=True).encode())
                    for offset in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                        file.seek(start + offset)
                        state.update(file.read(min(_SAMPLE, end - offset)))
                    tensors[name] = state.digest()
        except (OSError, ValueError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()[:16]
