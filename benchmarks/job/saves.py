"""What the training loop loses to a save of ours, and to one of plain DCP, of the same FSDP2 state; every rank.

    torchrun … saves.py ROUNDS run --config …

Runs our trainer as it is, up to its loop; then, in turns, saves with our Checkpointer while training goes on and with
`torch.distributed.checkpoint.save` while it waits, and loads both. Rank 0 writes one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from trainer import __main__ as program
from trainer.checkpoints import manifest
from trainer.checkpoints.state import tensors
from trainer.loop import Loop

WARM_UP, USUAL = 3, 5


class Clock:
    """Seconds spent in a function since `reset`; `of` puts one around it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed

    def reset(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Saves:
    def __init__(self, loop: Loop, rounds: int) -> None:
        self._loop, self._rounds = loop, rounds
        self._root = Path(os.environ["ORCH_RUN_DIR"])
        self._blocked, self._verified = Clock(), Clock()
        checkpointer: Any = loop.checkpointer
        checkpointer.poll = self._blocked.of(checkpointer.poll)
        checkpointer.save = self._blocked.of(checkpointer.save)
        manifest.verify = self._verified.of(manifest.verify)
        self._ended = False
        told = loop.reporter.checkpoint
        loop.reporter.checkpoint = lambda *args: (told(*args), setattr(self, "_ended", True))  # type: ignore[method-assign]

    def run(self) -> str:
        self._steps(WARM_UP)
        rows: dict[str, list] = {"ours": [], "dcp": []}
        self._ours()  # buffers, process groups and the disk's first pages: not counted
        self._dcp()
        for number in range(self._rounds):
            for side in ("ours", "dcp") if number % 2 else ("dcp", "ours"):
                rows[side].append(self._ours() if side == "ours" else self._dcp())
        newest = max(self._root.glob("checkpoints/step_*"))
        size = sum(entry["bytes"] for entry in manifest.read(newest)["files"].values())
        result = {**rows, "bytes": size, "loads": [self._load() for _ in range(self._rounds)]}
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
        return "succeeded"

    def _steps(self, count: int) -> list[float]:
        return [self._step() for _ in range(count)]

    def _step(self) -> float:
        began = time.perf_counter()
        self._loop.step()
        return time.perf_counter() - began

    def _ours(self) -> dict[str, float]:
        """`blocked`: in `save`, and in `poll` until it told that all is written. `lost`: by how much the steps until
        then took longer than usual, the wait included: the writer needs cores, memory and the disk, too."""
        usual = statistics.median(self._steps(USUAL))
        dist.barrier()
        self._ended = False
        self._blocked.reset()
        began = time.perf_counter()
        self._loop.checkpointer.save(self._loop.state)
        steps = 0
        while not self._ended:
            self._step()
            steps += 1
        lost = time.perf_counter() - began - steps * usual
        return {"blocked": self._worst(self._blocked.reset()), "lost": self._worst(lost), "steps": steps}

    def _dcp(self) -> float:
        folder = self._root / "dcp"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        state = self._tensors()
        dist.barrier()
        began = time.perf_counter()
        dcp.save(state, checkpoint_id=folder)
        return self._worst(time.perf_counter() - began)

    def _load(self) -> dict[str, float]:
        """Seconds of a whole resume of ours, of the hashing within it, and of plain `dcp.load` of the same state."""
        dist.barrier()
        began = time.perf_counter()
        dcp.load(self._tensors(), checkpoint_id=self._root / "dcp")
        plain = self._worst(time.perf_counter() - began)
        self._verified.reset()
        began = time.perf_counter()
        assert self._loop.checkpointer.resume(self._loop.state, before_load=lambda: None)
        return {
            "resume": self._worst(time.perf_counter() - began),
            "verify": self._worst(self._verified.reset()),
            "plain": plain,
        }

    def _tensors(self) -> dict[str, Any]:
        return {name: tensor.detach() for name, tensor in tensors(self._loop.state).items()}

    def _worst(self, seconds: float) -> float:
        """Of all ranks."""
        value = torch.tensor(seconds)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)


def main() -> int:
    rounds = int(sys.argv[1])
    Loop.run = lambda loop: Saves(loop, rounds).run()  # type: ignore[method-assign]
    return program.main(sys.argv[2:])


if __name__ == "__main__":
    code = main()
    os._exit(code)  # as the trainer's own: no destructor may wait for another rank
