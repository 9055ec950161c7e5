"""Low-rank adapters (LoRA, arXiv:2106.09685) with peft: put into a model, written for PeftModel, merged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.config import LoraConfig
from trainer.errors import ConfigError

ADAPTER = "default"
"""peft's own name of a model's only adapter; part of the parameters' names."""


def apply_lora(model: nn.Module, lora: LoraConfig) -> None:
    """Gives the linear layers named in `lora.targets` adapters, and freezes all else, in place.

    `model` is on the meta device; models/weights.py initialises the adapters as peft does (A uniform, B zero).
    Names become `….q_proj.base_layer.weight`, `….q_proj.lora_A.default.weight`. Raises ConfigError for a target
    that names no layer.
    """
    from peft import inject_adapter_in_model

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    for target in lora.targets:
        if target not in names:
            raise ConfigError(
                f"model.lora.targets: {type(model).__name__} has no linear layer {target!r}",
                hint=f"It has {', '.join(sorted(names))}.",
            )
    with torch.device("meta"):
        inject_adapter_in_model(_peft_config(lora, type(model).__name__), model, ADAPTER)


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
            state[f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"] = whole.detach().cpu().contiguous()
    return state


def save_adapter(
    folder: Path, state: dict[str, torch.Tensor], lora: LoraConfig, *, base: str, model_class: str
) -> None:
    """Writes what `PeftModel.from_pretrained(model, folder)` opens; `state` as `adapter_state` gives it.

    `base` is the folder or hub name of the base model, `model_class` the name of its class in transformers.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = _peft_config(lora, model_class)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Writes the base model with the adapter's product added to its weights: a plain transformers folder.

    Weights keep the dtype of `base`; a tokenizer in `adapter`, else in `base`, comes along.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    for folder in (adapter, base):
        if (folder / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(out)
            break
