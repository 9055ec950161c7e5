"""Seconds that training stands still for our asynchronous save, against a synchronous torch DCP save; and loading.

    .venv-trainer/bin/python benchmarks/checkpoint_speed.py [--rounds 5] [--folder DIR] [--json]

Two processes, FSDP2 over Gloo, a Llama of 44 million parameters with AdamW's moments: 0.5 GB on disk. Both sides save
the same tensors as DCP shards into the same file system, and flush them; ours also hashes, writes the manifest and
renames. Ours (checkpoint.type=shard): the time in `save`, and in the `poll` before each optimizer step until all is
written. Other: `torch.distributed.checkpoint.save`, its defaults, from call to return. In turns in one run
(job/saves.py), after a round that is not counted; of each, the slowest rank, and the median. Where ranks, writer and
disk share cores, steps during a save are slower: that is shown, too.

Loading: a whole resume of the newest checkpoint, the hashing in it (of what was just written, so mostly from memory:
that is SHA-256's own speed), and `dcp.load` of the other side's. The ranks of a node share the hashing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from ranks import HERE, answer, python, recipe

PROCS, TARGET = 2, 0.1
MODEL = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
STEPS = 100_000
"""More than the job takes: it ends by itself."""


def measure(rounds: int, folder: Path) -> dict:
    keys = recipe(
        **{f"model__{name}": value for name, value in MODEL.items()},
        data__source="synthetic",
        parallel__strategy="full_shard",
        checkpoint__type="shard",
        checkpoint__keep_last=1,
        checkpoint__on_failure="stop",
        data__seq_len=128,
        train__steps=STEPS,
        train__global_batch=PROCS * 2,
        train__micro_batch=2,
    )
    found = answer(python([str(HERE / "job/saves.py"), str(rounds), *keys], folder, ranks=PROCS))
    blocked, lost = ([row[key] for row in found["ours"]] for key in ("blocked", "lost"))
    load = {key: statistics.median(row[key] for row in found["loads"]) for key in ("resume", "verify", "plain")}
    result = {
        "blocked_s": statistics.median(blocked),
        "dcp_s": statistics.median(found["dcp"]),
        "lost_s": statistics.median(lost),
        "target": TARGET,
        "bytes": found["bytes"],
        "resume_s": load["resume"],
        "verify_s": load["verify"],
        "dcp_load_s": load["plain"],
        "verify_share": load["verify"] / load["resume"],
        "verify_mb_per_s": found["bytes"] / load["verify"] / 1e6,
        "times": found,
    }
    result["ratio"] = result["blocked_s"] / result["dcp_s"]
    result["ok"] = result["ratio"] <= TARGET
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default: the system's temporary one")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result = measure(given.rounds, Path(folder))
    if given.json:
        print(json.dumps(result))
    else:
        print(f"{result['bytes'] / 1e6:.0f} MB: training stands still for {result['blocked_s']:.3f} s,", end=" ")
        print(f"synchronous DCP save {result['dcp_s']:.2f} s: {result['ratio']:.3f}×", end=" ")
        print(f"(steps meanwhile take {result['lost_s']:.2f} s longer in all)")
        print(f"resume {result['resume_s']:.2f} s, of which hashing {result['verify_s']:.2f} s", end=" ")
        print(f"({result['verify_share']:.0%}, {result['verify_mb_per_s']:.0f} MB/s);", end=" ")
        print(f"dcp.load {result['dcp_load_s']:.2f} s")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
