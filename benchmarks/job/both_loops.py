"""Our trainer, run as it is (`python -m trainer run …`), with a step of the barest DDP loop after each of its own.

    torchrun … both_loops.py '{"model": …, "rows": …, "seq_len": …}' run --config …

Both use the same ranks and process group and meet at a barrier, which is not timed, between two steps. A step of ours
is all that its loop does from the beginning of one step to the beginning of the next. Rank 0 writes one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch.distributed as dist
from bare_ddp import Bare

from trainer import __main__ as program
from trainer.loop import Loop
from trainer.metrics import StepMetrics


class Turns:
    """Stands in for `Loop.step`."""

    def __init__(self, given: dict) -> None:
        self._given, self._take = given, Loop.step
        self._bare: Bare | None = None
        self._began: float | None = None
        self.seconds: dict[str, list[float]] = {"ours": [], "bare": []}

    def step(self, loop: Loop) -> StepMetrics | None:
        now = time.perf_counter()
        if self._began is not None:
            self.seconds["ours"].append(now - self._began)
        self._bare = self._bare or Bare(**self._given)
        dist.barrier()
        began = time.perf_counter()
        self._bare.step()
        self.seconds["bare"].append(time.perf_counter() - began)
        dist.barrier()
        self._began = time.perf_counter()
        return self._take(loop)


def main() -> int:
    turns = Turns(json.loads(sys.argv[1]))
    Loop.step = lambda loop: turns.step(loop)  # type: ignore[method-assign]
    code = program.main(sys.argv[2:])
    if code == 0 and os.environ["RANK"] == "0":
        print(json.dumps(turns.seconds), flush=True)
    return code


if __name__ == "__main__":
    code = main()
    os._exit(code)  # as the trainer's own: no destructor may wait for another rank
