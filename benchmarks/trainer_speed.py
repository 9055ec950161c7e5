"""Our trainer against the barest PyTorch DDP loop: tokens/s of two processes on the CPU, and start to first step.

    .venv-trainer/bin/python benchmarks/trainer_speed.py [--rounds 5] [--json]

Both sides: the same Llama (12.6 M parameters), the same rows per rank, fp32, Gloo, one thread a rank, under torchrun, in
turns. Ours reads packed documents, counts tokens, clips, checks for NaN, writes events; the other does nothing of this.
A side's figure is the median over the rounds of the median step after the first five.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "tie_word_embeddings": False,
}
ROWS, SEQ_LEN, PROCS, SKIP = 4, 256, 2, 5
TARGET = 0.98


def torchrun(arguments: list[str], folder: Path) -> str:
    """Standard output of `PROCS` ranks."""
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ORCH_RUN_DIR": str(folder / "run"),
        "START_TIME": repr(time.time()),
        "PYTHONPATH": str(HERE.parent),
    }
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCS), *arguments]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=600, cwd=folder, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments[:3])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def ours(steps: int, folder: Path) -> tuple[float, float]:
    """(seconds a step, seconds from the start of torchrun to the end of the first step)."""
    began = time.time()
    keys = [f"model.{key}={value}" for key, value in MODEL.items()]
    keys += ["data.source=synthetic", "data.cross_document=true", f"data.seq_len={SEQ_LEN}", "data.holdout=0"]
    keys += [f"train.steps={steps}", f"train.global_batch={ROWS * PROCS}", f"train.micro_batch={ROWS}"]
    keys += ["checkpoint.every=0", "log.tensorboard=false", "sample.max_new_tokens=0", f"log.every={steps}"]
    torchrun(["-m", "trainer", "run", "--config", "demo", *keys], folder)
    rows = [json.loads(line) for line in (folder / "run/events/rank-0.jsonl").read_text().splitlines()]
    events = [row for row in rows if row["kind"] == "step"]
    return statistics.median(row["step_s"] for row in events[SKIP:]), events[0]["time"] - began


def bare(steps: int, folder: Path) -> tuple[float, float]:
    given = {"model": MODEL, "rows": ROWS, "seq_len": SEQ_LEN, "steps": steps}
    result = json.loads(torchrun([str(HERE / "job/bare_ddp.py"), json.dumps(given)], folder).splitlines()[-1])
    return statistics.median(result["seconds"][SKIP:]), result["first"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for number in range(given.rounds):
        order = ("ours", "bare") if number % 2 else ("bare", "ours")
        for side in order:
            with tempfile.TemporaryDirectory() as name:
                times[side].append((ours if side == "ours" else bare)(given.steps, Path(name)))
    step = {side: statistics.median(one[0] for one in rows) for side, rows in times.items()}
    first = {side: statistics.median(one[1] for one in rows) for side, rows in times.items()}
    tokens = ROWS * PROCS * SEQ_LEN
    ratio = step["bare"] / step["ours"]
    result = {
        "ours_tokens_per_s": tokens / step["ours"],
        "bare_tokens_per_s": tokens / step["bare"],
        "ratio": ratio,
        "ours_first_s": first["ours"],
        "bare_first_s": first["bare"],
        "ok": ratio >= TARGET,
        "times": times,
    }
    if given.json:
        print(json.dumps(result))
    else:
        print(f"tokens/s: ours {tokens / step['ours']:,.0f}, barest DDP loop {tokens / step['bare']:,.0f}: {ratio:.3f}×")
        print(f"start of torchrun → first step: ours {first['ours']:.1f} s, barest {first['bare']:.1f} s")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
