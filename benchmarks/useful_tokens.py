"""Useful tokens/s on ragged documents: our packed rows against HF `Trainer` with its padding collator.

    .venv-trainer/bin/python benchmarks/useful_tokens.py [--rounds 3] [--steps 25] [--json]

A token is useful if it is a target. Documents have log-normal lengths with σ = 1 and a mean of half a row (web text as
FineWeb-Edu: some 1,000 tokens each, in rows of 2,048), so that one in nine is longer than a row. Both sides: one
process, one thread, fp32, the same Llama (12.9 million parameters), the same documents as tokens, 8 rows a step of at
most 256 tokens, clipping, fused AdamW. HF: DataCollatorForLanguageModeling(mlm=False), which pads to the longest of
the batch; documents are in memory and cut to a row, as the collator wants them. Ours: `python -m trainer run`, pack,
documents isolated from one another, read from MDS.

In turns; a side's figure is all useful tokens of its steps but the first five over the time from the end of the fifth
to the end of the last. The median of the rounds' ratios counts.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from ranks import HERE, MODEL, answer, arguments, python, recipe, step_events

sys.path.insert(0, str(HERE.parent))

from trainer.data.streaming_import import MDSWriter

ROWS, SEQ_LEN, SKIP = 8, 256, 5
MEAN, SIGMA = SEQ_LEN / 2, 1.0
DOCUMENTS = 5000
PAD = 0
"""HF's padding; no document contains it."""
TARGET = 1.5


def write(folder: Path) -> dict[str, float]:
    """The same documents as MDS and as one array; → what they are like."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, DOCUMENTS).astype(int).clip(8, None)
    tokens = random.integers(PAD + 1, MODEL["vocab_size"], lengths.sum(), dtype=np.int32)
    np.savez(folder / "documents.npz", tokens=tokens, ends=lengths.cumsum())
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:int32"}) as writer:
        for part in np.split(tokens, lengths.cumsum()[:-1]):
            writer.write({"tokens": part})
    return {
        "documents": DOCUMENTS,
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "longer_than_a_row": float((lengths > SEQ_LEN).mean()),
    }


def speed(useful: list[int], ends: list[float]) -> float:
    return sum(useful[SKIP:]) / (ends[-1] - ends[SKIP - 1])


def ours(steps: int, data: Path, folder: Path) -> dict[str, float]:
    given = recipe(
        data__source="mds",
        data__path=data / "mds",
        data__seq_len=SEQ_LEN,
        train__steps=steps,
        train__global_batch=ROWS,
        train__micro_batch=ROWS,
    )
    python(["-m", "trainer", *given], folder)
    events = step_events(folder)
    useful = [row["tokens"] for row in events]
    return {
        "tokens_per_s": speed(useful, [row["time"] for row in events]),
        "useful": sum(useful) / (len(useful) * ROWS * SEQ_LEN),
    }


def hf(steps: int, data: Path, folder: Path) -> dict[str, float]:
    given = {
        "documents": str(data / "documents.npz"),
        "max_length": SEQ_LEN,
        "model": MODEL,
        "rows": ROWS,
        "steps": steps,
    }
    found = answer(python([str(HERE / "job/hf_padding.py"), json.dumps(given)], folder))
    return {
        "tokens_per_s": speed(found["useful"], found["ends"]),
        "useful": sum(found["useful"]) / sum(found["slots"]),
    }


def main() -> int:
    given = arguments(__doc__, 3, 25).parse_args()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "hf": []}
    with tempfile.TemporaryDirectory() as data:
        about = write(Path(data))
        for number in range(given.rounds):
            for side in ("ours", "hf") if number % 2 else ("hf", "ours"):
                with tempfile.TemporaryDirectory() as folder:
                    found[side].append((ours if side == "ours" else hf)(SKIP + given.steps, Path(data), Path(folder)))
    pairs = zip(found["ours"], found["hf"], strict=True)
    result = {
        "ratio": statistics.median(one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs),
        "target": TARGET,
        "lengths": about,
        "rounds": found,
    }
    for side, rounds in found.items():
        result[f"{side}_tokens_per_s"] = statistics.median(one["tokens_per_s"] for one in rounds)
        result[f"{side}_useful"] = statistics.median(one["useful"] for one in rounds)
    result["ok"] = result["ratio"] >= TARGET
    if given.json:
        print(json.dumps(result))
    else:
        for side, name in (("ours", "ours, packed"), ("hf", "HF Trainer, padded")):
            print(f"{name}: {result[f'{side}_tokens_per_s']:,.0f} useful tokens/s,", end=" ")
            print(f"{result[f'{side}_useful']:.1%} of the slots useful")
        print(f"{result['ratio']:.2f}×")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
