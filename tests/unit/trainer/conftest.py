"""Runs ranks as real processes with Gloo, without paying the import of torch for each.

A fork server imports the trainer once; each rank is forked from it and runs a script of `ranks/`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS = Path(__file__).parent / "ranks"
WORDS = "the of and a to in is you that it he was for on are as with his they at be this have from"

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("trainer.tasks.finetune", "trainer.dry_run", "torch.utils.tensorboard", "torch._dynamo"),
        *("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "transformers.models.llama.modeling_llama"),
    ]
)

TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "tokenizer.vocab_size=300",
    "data.seq_len=16",
    "data.source=text_files",
    "data.holdout=0.2",
    "train.steps=6",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.device=cpu",
    "optim.warmup_steps=2",
    "checkpoint.every=2",
    "checkpoint.keep_last=2",
    "log.every=1",
    "log.tensorboard=false",
    "sample.max_new_tokens=4",
    "distributed.timeout=60",
]
"""Overrides that make any recipe tiny; `tiny` adds the path of its text."""


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Overrides of a tiny run on twelve documents of uneven length."""
    folder = tmp_path / "text"
    folder.mkdir()
    vocabulary = WORDS.split()
    for index in range(12):
        words = [vocabulary[(index * 7 + i * i) % len(vocabulary)] for i in range(5 + 9 * (index % 5))]
        (folder / f"{index:02}.txt").write_text(" ".join(words) + ".")
    return [*TINY, f"data.path={folder}"]


@dataclass(frozen=True)
class Ranks:
    """What came of a group of ranks."""

    exit_codes: list[int | None]
    output: list[str]
    """Standard output and error of each rank."""


Launch = Callable[..., Ranks]


@pytest.fixture
def ranks(tmp_path: Path) -> Launch:
    """`ranks(script, world, argv=…, env=…, timeout=…)`: runs `ranks/<script>.py` on `world` processes.

    `env` is a mapping for all ranks or a list with one for each. `TEST_PORTS` are further free ports, for a script
    that makes one process group after the other.
    """
    count = iter(range(1000))

    def launch(
        script: str,
        world: int = 1,
        *,
        argv: Sequence[str] = (),
        env: Mapping[str, str] | Sequence[Mapping[str, str]] = (),
        timeout: float = 60,
    ) -> Ranks:
        logs = tmp_path / f"logs-{next(count)}"
        logs.mkdir()
        ports = _free_ports(10)
        group = []
        for rank in range(world):
            mine = dict(env if isinstance(env, Mapping) else env[rank] if env else {})
            variables = {"HOME": str(tmp_path / "home"), "ORCH_CACHE_DIR": str(tmp_path / "cache")}
            if world > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                variables |= {name: str(value) for name, value in names.items()}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "TEST_PORTS": " ".join(ports)}
            given = {
                "ENV": variables | mine,
                "ARGV": list(argv),
                "LOG": str(logs / str(rank)),
                "SCRIPT": script,
            }
            process = _context.Process(
                target=runpy.run_path, args=(str(RANKS / "start.py"), given, "__main__")
            )
            process.start()
            group.append(process)
        try:
            for process in group:
                process.join(timeout)
        finally:
            for process in group:
                process.kill()
                process.join()
        output = [
            (logs / str(rank)).read_text() if (logs / str(rank)).exists() else "" for rank in range(world)
        ]
        return Ranks([process.exitcode for process in group], output)

    return launch


@pytest.fixture
def train(ranks: Launch, tiny: list[str], tmp_path: Path) -> Callable[..., Ranks]:
    """`train(name, *overrides, world=…, env=…)`: the trainer with its run folder in tmp_path/name."""

    def run(name: str, *overrides: str, world: int = 1, env: Any = (), script: str = "cli") -> Ranks:
        base = {"ORCH_RUN_DIR": str(tmp_path / name)}
        several = [base | dict(one) for one in env] if isinstance(env, list) else base | dict(env)
        return ranks(script, world, argv=["run", "--config", "demo", *tiny, *overrides], env=several)

    return run


@pytest.fixture
def events(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`events(name, kind, rank=0)`: the events of that kind in tmp_path/name."""

    def read(name: str, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        lines = (tmp_path / name / "events" / f"rank-{rank}.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    return read


def _free_ports(count: int) -> list[str]:
    """Different ones: a port is only known to be free while it is held."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]
