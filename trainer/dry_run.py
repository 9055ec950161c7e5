"""`--dry_run`: the recipe's own code on a tiny model of its architecture, on this CPU, without network.

Trains a few steps, saves, starts again from what was saved, and evaluates both: the two must agree.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer.config import Config
from trainer.context import Context, Folders, Outcome
from trainer.distributed.env import RankEnv
from trainer.errors import CheckpointError
from trainer.events import Events
from trainer.stop import StopRequest
from trainer.tasks.finetune import FINAL

STEPS = 4
SEQ_LEN = 64


def shrink(config: Config, folder: Path) -> Config:
    """`config` with the same choices and small sizes; what would come over the network is made in `folder`."""
    values = config.model_dump(mode="json")
    values["model"].update(
        pretrained=None,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if config.model.num_key_value_heads else None,
        vocab_size=None,
        extra={key: value for key, value in config.model.extra.items() if not key.endswith(("_dim", "_size"))},
    )
    values["tokenizer"].update(path=None, vocab_size=min(config.tokenizer.vocab_size, 512))
    values["data"].update(_data(config, folder))
    # one process: layouts are the parity tests' business
    values["parallel"].update(strategy="ddp", replicate=None, tensor=1, sequence=False, pipeline=1)
    values["train"].update(steps=STEPS, global_batch=4, micro_batch=2, device="cpu", max_bad_steps=0, compile=False)
    values["optim"]["warmup_steps"] = min(config.optim.warmup_steps, 1)
    values["optim"]["decay_steps"] = None
    values["eval"].update(every=0, source=None, path=None, max_rows=16)
    values["checkpoint"].update(every=2, resume="auto", on_failure="stop", remote=None)
    values["log"].update(every=1, wandb=None, profile=None)
    values["sample"]["max_new_tokens"] = min(config.sample.max_new_tokens, 8)
    return configuration.validate(values, "dry run")


def _data(config: Config, folder: Path) -> dict[str, Any]:
    """Small local data of the same kind as the recipe's."""
    local: dict[str, Any] = {"seq_len": min(config.data.seq_len, SEQ_LEN), "remote": None, "limit": 60}
    local.update(workers=min(config.data.workers, 1), holdout=max(config.data.holdout, 0.05))
    if config.data.source == "chat":
        talk = [
            {"role": "user", "content": "Which number comes after {}?"},
            {"role": "assistant", "content": "After {} comes the next one."},
        ]
        rows = [
            {"messages": [{**part, "content": part["content"].format(number)} for part in talk]}
            for number in range(60)
        ]
        path = folder / "chat.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return local | {"path": str(path)}
    return local | {"source": "pydoc_topics", "path": None, "name": None, "subset": None}


def run(config: Config) -> None:
    """Raises whatever the real run would raise, and CheckpointError if the reloaded model differs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="trainer-dry-run-") as name:
        small = shrink(config, Path(name))
        if config.model.pretrained:
            small = _from_pretrained(small, Path(name))
        trained = _once(small, Path(name))
        print("dry run: starting again from the checkpoint", flush=True)
        reloaded = _once(small, Path(name))
        if config.task == "finetune":
            _open(Path(name) / "checkpoints" / FINAL)
    if trained.loss != reloaded.loss or reloaded.step != STEPS:
        raise CheckpointError(f"dry run: held-out loss {trained.loss} became {reloaded.loss} after save and load")
    print(f"dry run of recipe {config.name!r} passed: trained, saved, loaded, evaluated", flush=True)


def _from_pretrained(config: Config, folder: Path) -> Config:
    """`config` with weights to start from, as the recipe has: a tiny model's, made with the same tokenizer."""
    values = config.model_dump(mode="json")
    values["task"], values["train"]["steps"], values["checkpoint"]["type"] = "pretrain", 0, "full"
    values["model"]["lora"]["rank"], values["model"]["sparse"]["mask"] = 0, "none"
    _once(configuration.validate(values, "dry run"), folder / "base")
    values = config.model_dump(mode="json")
    values["model"]["pretrained"] = str(folder / "base/checkpoints/step_00000000")
    return configuration.validate(values, "dry run")


def _open(final: Path) -> None:
    """As a user does; transformers opens an adapter on the base that it names. Raises whatever they raise."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(final)
    AutoTokenizer.from_pretrained(final)


def _once(config: Config, folder: Path) -> Outcome:
    folders = Folders(folder, folder / "checkpoints", folder / "cache")
    events = Events(folder, 0, 1)
    task = importlib.import_module(f"trainer.tasks.{config.task}")
    try:
        return task.run(Context(RankEnv(), config, folders, events, StopRequest(folder)))
    finally:
        events.close()
