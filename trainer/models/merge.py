"""`python -m trainer merge`: a LoRA adapter and its base → a plain model folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from trainer.context import Folders
from trainer.data.tokenizer import copy_files
from trainer.errors import CheckpointError, ConfigError
from trainer.models.download import fetch
from trainer.models.lora import SETTINGS, WEIGHTS, fingerprint

GENERATION = "generation_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="what fine-tuning wrote: final/, or a step_… of type full"
    )
    parser.add_argument(
        "--base", metavar="DIR", help="the model it was trained on; default: the one that the adapter names"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError or CheckpointError."""
    adapter, out = Path(args.adapter), Path(args.out)
    base = find_base(adapter, args.base)
    merge(base, adapter, out)
    print(f"merged {adapter} into {base}: {out}", flush=True)
    return 0


def find_base(adapter: Path, given: str | None) -> Path:
    """The base model's folder: `given`, or what the adapter was trained on; fetched from the hub if need be."""
    settings = _read(adapter / SETTINGS)
    name = given or settings.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{adapter} does not name its base model", hint="Give its folder with --base.")
    revision = None if given else settings.get("revision")
    return fetch(str(name), revision, Folders.read(os.environ, "merge").cache, leader=True, timeout=3600, say=print)


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Writes the base model with the adapter's products added to its weights: a plain transformers folder.

    Weights keep the dtype of `base`. Tokenizer and defaults for generation are the adapter's, else the base's.
    `out` is there as a whole or not at all. Takes the memory of the whole model. Raises ConfigError for folders
    that cannot be used, CheckpointError if they do not belong together.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already", hint="Name a new folder.")
    shapes = _shapes(adapter)
    _check_same_base(base, adapter)
    model = _open(base)
    _check_fits(model, shapes, base, adapter)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error, below
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"peft cannot open {adapter} on {base}: {' '.join(str(error).split())}") from None
    if missing := sorted(get_peft_model_state_dict(adapted).keys() - shapes.keys()):
        raise CheckpointError(f"the adapter in {adapter} is for another model than {base}: it has no {missing[0]}")
    merged: Any = adapted.merge_and_unload()
    merged.generation_config = GenerationConfig()  # those of some models do not pass transformers' own checks
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        merged.save_pretrained(staging)
        for file in staging.iterdir():
            file.chmod(staging.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
        copy_files(next((f for f in (adapter, base) if (f / "tokenizer_config.json").is_file()), base), staging)
        for folder in (adapter, base):
            if (folder / GENERATION).is_file():
                shutil.copy(folder / GENERATION, staging / GENERATION)
                break
        if out.is_dir():
            out.rmdir()
        os.rename(staging, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written: {' '.join(str(error).split())}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file.parent} is no adapter: there is no {file.name}",
            hint="--adapter wants the folder final/ of a run with model.lora.rank, or a checkpoint of type full.",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    return found if isinstance(found, dict) else {}


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    _read(adapter / SETTINGS)
    file = adapter / WEIGHTS
    if not file.is_file():
        raise ConfigError(
            f"{adapter}: there is no {WEIGHTS}", hint="Checkpoints have it with checkpoint.type=full; final/ always."
        )
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None


def _check_same_base(base: Path, adapter: Path) -> None:
    """By the fingerprint that our checkpoints note; an adapter of other programs has none."""
    manifest = adapter / "manifest.json"
    noted = _read(manifest).get("base") if manifest.is_file() else None
    if noted is not None and noted != fingerprint(base):
        raise CheckpointError(
            f"the adapter in {adapter} was trained on other weights than those in {base}",
            hint="Give with --base the folder that model.pretrained named.",
        )


def _open(base: Path) -> nn.Module:
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"--base {base} cannot be opened: {' '.join(str(error).split())}") from None
    return model


def _check_fits(model: nn.Module, shapes: dict[str, tuple[int, ...]], base: Path, adapter: Path) -> None:
    """Raises CheckpointError that names the first layer that `model` lacks or has in another size.

    peft tells of the one in many lines, and of the other, if the config names layers by their last part, not at all.
    """
    layers = dict(model.named_modules())
    for key, shape in shapes.items():
        name, kind = key.removeprefix("base_model.model."), ""
        for part in ("A", "B"):
            if f".lora_{part}." in name:
                name, kind = name.partition(f".lora_{part}.")[0], part
        if not kind:
            continue
        layer: Any = layers.get(name)
        if layer is None:
            raise CheckpointError(
                f"the adapter in {adapter} is for another model than {base}: that has no layer {name!r}"
            )
        rows, columns = layer.weight.shape if isinstance(layer, nn.Linear) else reversed(layer.weight.shape)
        here, there = (columns, shape[1]) if kind == "A" else (rows, shape[0])
        if here != there:
            what = "inputs" if kind == "A" else "outputs"
            raise CheckpointError(
                f"the adapter in {adapter} is for another model than {base}: for {there} {what} of {name}, which has"
                f" {here}"
            )
