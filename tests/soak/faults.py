"""Injects faults while checkpoints are written, and checks what the next start makes of them.

    python tests/soak/faults.py --count 200 [--seed 1] [--folder DIR]

Two ranks under FSDP, forked from this process, save a checkpoint in every step. A run is killed at random moments,
or its disk fills up on one rank, or its newest checkpoint is truncated or gets a flipped bit; the next run goes on
in the same folder. Every value of the model and the optimizer is a function of its name and the step, so the runs
see whether what they load is whole and of one step. After each fault:

- the next run resumes from the newest checkpoint that is whole by this file's own reading of the manifests,
- which is at least as new as the last one that the trainer told of, unless it was that which was damaged.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.checkpoints import Checkpointer, TrainingState
from trainer.checkpoints.state import local
from trainer.config import CheckpointConfig
from trainer.distributed.env import RankEnv
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh
from trainer.distributed.process_group import Communicator

TYPES = ("full", "shard", "local")
DAMAGES = ("truncate", "flip a bit")
FAULTS = ("kill all", "kill one", *DAMAGES, "disk full")
WORLD = 2
PATIENCE = 60.0
"""Seconds within which ranks must come up, save or end; only a hang takes so long."""


class Stream:
    """A place in the data: the step itself."""

    def __init__(self) -> None:
        self.rows = 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    @staticmethod
    def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
        assert len({state["rows"] for state in states}) == 1
        return states[0]


class Parts:
    def __init__(self, model: torch.nn.Module) -> None:
        self.parts = [model]


class Reporter:
    """Tells the parent of each checkpoint that the trainer calls written, and of each that it could not write."""

    def __init__(self, pipe: Connection | None) -> None:
        self._pipe = pipe

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self._pipe is not None and "could not be written" in text:
            self._pipe.send(("failed", text))

    def checkpoint(self, path: Path, size: int, seconds: float, blocked: float) -> None:
        if self._pipe is not None:
            self._pipe.send(("saved", int(path.name[5:])))


def _value(name: str, step: int) -> float:
    return float(zlib.crc32(name.encode()) % 1000 + step)


def _named(state: TrainingState) -> dict[str, torch.Tensor]:
    (model,) = state.model.parts
    found = {name: local(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if parameter in state.optimizer.state:
                found[f"{name}.{key}"] = local(state.optimizer.state[parameter][key])
    return found


def _step(state: TrainingState) -> None:
    state.step += 1
    state.stream.rows = state.step  # type: ignore[attr-defined]
    for name, tensor in _named(state).items():
        tensor.fill_(_value(name, state.step))


def _check(state: TrainingState) -> None:
    assert state.stream.rows == state.step  # type: ignore[attr-defined]
    for name, tensor in _named(state).items():
        assert (tensor == _value(name, state.step)).all(), f"{name} is not of step {state.step}: {tensor}"


def _rank(
    rank: int, port: int, kind: str, root: Path, seed: int, pipe: Connection | None, plan: dict[str, Any]
) -> None:
    """One rank: resume, check, then save in every step until `plan["saves"]`, or for ever."""
    log = os.open(root.parent / f"{root.name}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"--- run {seed}: {plan}", flush=True)
    env = RankEnv(rank, rank, WORLD, WORLD, master_port=port, launcher="mpi")
    comm = Communicator(env, torch.device("cpu"), PATIENCE)
    mesh = Mesh(Layout(shard=WORLD), comm)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=200
    )
    model = fully_shard(LlamaForCausalLM(config), mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = TrainingState(Parts(model), optimizer, schedule, None, Stream(), config, None, "")  # type: ignore[arg-type]
    # one, so that nothing is left if it goes before the next is whole; where one will be damaged there must be others
    keep = 3 if plan["fault"] in DAMAGES else 1
    settings = CheckpointConfig(type=kind, keep_last=keep)  # type: ignore[arg-type]
    checkpointer = Checkpointer(settings, root, mesh, Reporter(pipe), run="soak", timeout=PATIENCE)
    resumed = checkpointer.resume(state, lambda: None)
    if resumed:
        _check(state)
    if pipe is not None:
        pipe.send(("resumed", state.step if resumed else None))
    noise = random.Random(seed)
    full_from = noise.randrange(1, 3)
    full_rank = 0 if kind == "full" else noise.randrange(WORLD)  # rank 0 writes all of a full checkpoint
    saves = 0
    while plan["saves"] is None or saves < plan["saves"]:
        full = plan["fault"] == "disk full" and saves == full_from and rank == full_rank
        _limit_file_size(noise.randrange(20_000, 60_000) if full else resource.RLIM_INFINITY)
        checkpointer.poll()
        _step(state)
        checkpointer.save(state)
        saves += 1
        if plan["fault"] == "disk full":
            checkpointer.finish()
    checkpointer.finish()
    comm.close()


def _limit_file_size(size: int) -> None:
    """As if the disk were full for this rank: a file cannot grow beyond `size` bytes (its log stays far below)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def newest_whole(root: Path) -> int | None:
    """The newest step whose files are what its manifest says; knows nothing of the trainer's own reading."""
    whole = []
    for path in root.glob("step_*"):
        try:
            head = json.loads((path / "manifest.json").read_text())
            good = all(
                len(data := (path / name).read_bytes()) == entry["bytes"]
                and hashlib.sha256(data).hexdigest() == entry["sha256"]
                for name, entry in head["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if good:
            whole.append(int(head["step"]))
    return max(whole, default=None)


class Soak:
    """Runs of one checkpoint type in one folder."""

    def __init__(self, folder: Path, kind: str, noise: random.Random) -> None:
        self.kind = kind
        self.root = folder / kind
        self._noise = noise
        self._expected: int | None = None
        """The step from which the next run must resume."""
        self.saved = 0
        """Checkpoints that the trainer told of."""

    def inject(self, fault: str) -> None:
        """One run that ends with `fault`; AssertionError if it or the state it leaves is not as it must be."""
        killed = fault.startswith("kill")
        processes, pipe = self._start({"fault": fault, "saves": None if killed else self._noise.randrange(3, 5)})
        try:
            told = self._follow(processes, pipe, fault)
        finally:
            for process in processes:
                process.kill()
                process.join()
        saved = [step for what, step in told if what == "saved"]
        self.saved += len(saved)
        if fault == "disk full":
            assert any(what == "failed" for what, _ in told), f"{self.kind}: a full disk went unnoticed"
        if fault in DAMAGES:
            self._damage(self.root / f"step_{saved[-1]:08}", fault)
            saved.pop()
        newest = newest_whole(self.root)
        last = max(saved, default=self._expected)
        assert last is None or (newest is not None and newest >= last), (
            f"{self.kind}, {fault}: step {last} was told to be written, the newest that is whole is {newest}"
        )
        self._expected = newest

    def check(self) -> None:
        """A last run without a fault."""
        processes, pipe = self._start({"fault": "none", "saves": 1})
        self._follow(processes, pipe, "none")

    def _start(self, plan: dict[str, Any]) -> tuple[list[Any], Connection]:
        here, there = multiprocessing.Pipe(duplex=False)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        seed = self._noise.randrange(1 << 30)
        fork = multiprocessing.get_context("fork")
        processes = [
            fork.Process(
                target=_rank, args=(rank, port, self.kind, self.root, seed, there if rank == 0 else None, plan)
            )
            for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
        there.close()
        return processes, here

    def _follow(self, processes: list[Any], pipe: Connection, fault: str) -> list[tuple[str, Any]]:
        """Reads what rank 0 tells, and kills when it is time. → all that was told."""
        assert pipe.poll(PATIENCE), f"{self.kind}: no run came up in {PATIENCE:.0f} s"
        try:
            what, step = pipe.recv()
        except EOFError:
            raise AssertionError(f"{self.kind}: the run did not come up, see {self.root}-*.log") from None
        assert (what, step) == ("resumed", self._expected), f"{self.kind}: {what} {step}, expected {self._expected}"
        told: list[tuple[str, Any]] = []
        if fault.startswith("kill"):
            # the first save needs longest; kills before, in and after it
            time.sleep(self._noise.uniform(0, 0.5))
            victims = processes if fault == "kill all" else [self._noise.choice(processes)]
            for process in victims:
                os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        try:
            while pipe.poll(max(0.0, deadline - time.monotonic())):
                told.append(pipe.recv())
        except EOFError:
            pass
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
            assert process.exitcode is not None, f"{self.kind}, {fault}: a rank hangs"
            assert fault.startswith("kill") or process.exitcode == 0, f"{self.kind}, {fault}: see {self.root}-*.log"
        return told

    def _damage(self, checkpoint: Path, fault: str) -> None:
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
        path = self._noise.choice(files)
        data = bytearray(path.read_bytes())
        if fault == "truncate":
            del data[self._noise.randrange(len(data)) :]
        elif path.name == "manifest.json":  # a flipped bit in its prose would be nothing: hit a hash
            place = data.index(b'"sha256": "') + 11
            data[place] = ord("0") if data[place] != ord("0") else ord("1")
        else:
            data[self._noise.randrange(len(data))] ^= 1 << self._noise.randrange(8)
        path.write_bytes(data)


def soak(folder: Path, count: int, seed: int) -> collections.Counter[tuple[str, str]]:
    """Injects `count` faults; → how many of which kind, or AssertionError at the first that was not survived."""
    noise = random.Random(seed)
    done: collections.Counter[tuple[str, str]] = collections.Counter()
    runs = [Soak(folder, kind, noise) for kind in TYPES]
    plan = [(run, fault) for fault in FAULTS for run in runs]
    order = [plan[index % len(plan)] for index in range(count)]
    noise.shuffle(order)
    for run, fault in order:
        run.inject(fault)
        done[run.kind, fault] += 1
    for run in runs:
        run.check()
    print(f"{sum(run.saved for run in runs)} checkpoints were written")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=int(os.environ.get("SOAK_COUNT", "200")))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep checkpoints and logs here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            done = soak(folder, given.count, given.seed)
        except AssertionError as error:
            for log in sorted(folder.glob("*.log")):
                print(f"== {log.name}\n" + "\n".join(log.read_text().splitlines()[-40:]), file=sys.stderr)
            sys.exit(f"error: {error}")
    print(f"{'':12}" + "".join(f"{kind:>8}" for kind in TYPES))
    for fault in FAULTS:
        print(f"{fault:12}" + "".join(f"{done[kind, fault]:8}" for kind in TYPES))
    seconds = time.monotonic() - began
    print(f"{done.total()} faults in {seconds:.0f} s: every run resumed from the newest whole checkpoint")


if __name__ == "__main__":
    main()
