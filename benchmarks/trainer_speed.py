"""Our trainer against the barest PyTorch DDP loop: tokens/s of two processes on the CPU, and start to first step.

    .venv-trainer/bin/python benchmarks/trainer_speed.py [--rounds 3] [--steps 25] [--json]

Both sides: the same Llama (12.9 million parameters), the same rows per rank, fp32, Gloo, one thread a rank. Ours reads
packed documents, counts tokens, clips, checks for NaN, writes events and TensorBoard; the other (job/bare_ddp.py) does
nothing of this. Documents may see one another here (data.cross_document), because they do in the other's rows too.

Speed: the two take steps in turns in the same processes (job/both_loops.py), so that whatever else the machine does
meets both; the ratio is the median of the pairs', and of the rounds. Start: processes of their own, in turns, from the
start of torchrun to the end of the first step.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ranks import HERE, MODEL, answer, arguments, python, recipe, step_events

ROWS, SEQ_LEN, PROCS, SKIP = 4, 512, 2, 5
TARGET = 0.98
BARE = json.dumps({"model": MODEL, "rows": ROWS, "seq_len": SEQ_LEN})


def keys(steps: int) -> list[str]:
    return recipe(
        data__source="synthetic",
        data__cross_document=True,
        data__seq_len=SEQ_LEN,
        train__steps=steps,
        train__global_batch=ROWS * PROCS,
        train__micro_batch=ROWS,
    )


def both(steps: int) -> dict[str, list[float]]:
    """Seconds of each step, of both sides, without the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        output = python([str(HERE / "job/both_loops.py"), BARE, *keys(SKIP + steps + 1)], Path(folder), ranks=PROCS)
    found = answer(output)
    return {side: found[side][SKIP : SKIP + steps] for side in ("ours", "bare")}


def first_step(side: str) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if side == "bare":
            return answer(python([str(HERE / "job/bare_ddp.py"), BARE], folder, ranks=PROCS))["first"]
        began = time.time()
        python(["-m", "trainer", *keys(1)], folder, ranks=PROCS)
        return step_events(folder)[0]["time"] - began


def main() -> int:
    given = arguments(__doc__, 3, 25).parse_args()
    steps, firsts = [], {"ours": [], "bare": []}
    for number in range(given.rounds):
        for side in ("ours", "bare") if number % 2 else ("bare", "ours"):
            firsts[side].append(first_step(side))
        steps.append(both(given.steps))
    ratios = [
        statistics.median(bare / ours for bare, ours in zip(one["bare"], one["ours"], strict=True)) for one in steps
    ]
    tokens = ROWS * PROCS * SEQ_LEN
    result = {
        "ratio": statistics.median(ratios),
        "target": TARGET,
        "ours_tokens_per_s": tokens / statistics.median(t for one in steps for t in one["ours"]),
        "bare_tokens_per_s": tokens / statistics.median(t for one in steps for t in one["bare"]),
        "ours_first_s": statistics.median(firsts["ours"]),
        "bare_first_s": statistics.median(firsts["bare"]),
        "ratios": ratios,
        "steps": steps,
        "firsts": firsts,
    }
    result["ok"] = result["ratio"] >= TARGET
    if given.json:
        print(json.dumps(result))
    else:
        print(f"tokens/s: ours {result['ours_tokens_per_s']:,.0f}, barest {result['bare_tokens_per_s']:,.0f};", end=" ")
        print(f"step by step {result['ratio']:.3f}× (rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")
        print(f"start → first step: ours {result['ours_first_s']:.1f} s, barest {result['bare_first_s']:.1f} s")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
