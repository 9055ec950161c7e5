"""What the trainer's measurements share: the small Llama, processes with one thread each, the run's own events."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATIENCE = 900

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "tie_word_embeddings": False,
}
"""12.9 million parameters; the keys are both transformers' and our recipe's."""


def arguments(doc: str | None, rounds: int, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="steps in each round")
    parser.add_argument("--json", action="store_true")
    return parser


def python(command: list[str], folder: Path, *, ranks: int = 1) -> str:
    """Standard output of `ranks` processes under torchrun (of a plain one without), working in `folder`."""
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "ORCH_RUN_DIR": str(folder / "run"),
        "ORCH_CACHE_DIR": str(folder / "cache"),
        "START_TIME": repr(time.time()),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    argv = [sys.executable]
    if ranks > 1:
        argv += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*argv, *command], env=environ, capture_output=True, text=True, timeout=PATIENCE, cwd=folder, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def answer(output: str) -> dict:
    """The JSON line with which a script of job/ ends."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))


def recipe(**keys: object) -> list[str]:
    """The trainer's command line without a tokenizer, checkpoints in between, or held-out data; `a__b` is `a.b`."""
    common = {"data__holdout": 0, "checkpoint__every": 0, "sample__max_new_tokens": 0}
    given = {f"model__{name}": value for name, value in MODEL.items()} | common | keys
    values = [f"{name.replace('__', '.')}={value}" for name, value in given.items()]
    return ["run", "--config", "demo", *values]


def step_events(folder: Path) -> list[dict]:
    """Rank 0's events of finished steps, in a folder that `python` worked in."""
    lines = (folder / "run/events/rank-0.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]
