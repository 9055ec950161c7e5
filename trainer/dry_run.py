"""`--dry_run`: the recipe's own code on a tiny model of its architecture, on this CPU, without network.

Trains a few steps, saves, starts again from what was saved, and evaluates both: the two must agree.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path

from trainer import config as configuration
from trainer.config import Config
from trainer.context import Context, Folders, Outcome
from trainer.distributed.env import RankEnv
from trainer.errors import CheckpointError
from trainer.events import Events
from trainer.stop import StopRequest

STEPS = 4


def shrink(config: Config) -> Config:
    """`config` with the same choices and small sizes."""
    values = config.model_dump(mode="json")
    values["model"].update(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    values["tokenizer"]["vocab_size"] = min(config.tokenizer.vocab_size, 512)
    values["data"]["seq_len"] = min(config.data.seq_len, 64)
    values["train"].update(
        steps=STEPS,
        global_batch=4,
        micro_batch=2,
        device="cpu",
        max_bad_steps=0,
        precision=config.train.precision,
    )
    values["optim"]["warmup_steps"] = min(config.optim.warmup_steps, 1)
    values["eval"]["every"] = 0
    values["checkpoint"].update(every=2, resume="auto", on_failure="stop")
    values["log"]["every"] = 1
    values["sample"]["max_new_tokens"] = min(config.sample.max_new_tokens, 8)
    return configuration.validate(values, "dry run")


def run(config: Config) -> None:
    """Raises whatever the real run would raise, and CheckpointError if the reloaded model differs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    small = shrink(config)
    with tempfile.TemporaryDirectory(prefix="trainer-dry-run-") as name:
        trained = _once(small, Path(name))
        print("dry run: starting again from the checkpoint", flush=True)
        reloaded = _once(small, Path(name))
    if trained.loss != reloaded.loss or reloaded.step != STEPS:
        raise CheckpointError(
            f"dry run: held-out loss {trained.loss} became {reloaded.loss} after save and load"
        )
    print(f"dry run of recipe {config.name!r} passed: trained, saved, loaded, evaluated", flush=True)


def _once(config: Config, folder: Path) -> Outcome:
    folders = Folders(folder, folder / "checkpoints", folder / "cache")
    events = Events(folder, 0, 1)
    task = importlib.import_module(f"trainer.tasks.{config.task}")
    try:
        return task.run(Context(RankEnv(), config, folders, events, StopRequest(folder)))
    finally:
        events.close()
