"""Our packed batches from a folder of tokenised MDS against raw iteration of mosaicml's StreamingDataset over it.

    .venv-trainer/bin/python benchmarks/data_speed.py [--rounds 5] [--tokens 16000000] [--json]

The folder is written by plain MDSWriter: documents of log-normal length (σ = 1, mean 1,000 tokens, as FineWeb-Edu),
int32. Raw: `for sample in StreamingDataset(…)`, shuffled, which decodes each sample and does nothing with it; its
threads may use every core. Ours: BatchStream without loader processes, one thread, shuffled: reads the same samples,
packs them into rows of 2,048, labels them, restarts positions, and makes int64 tensors of 8 rows, 64 rows a step.
One epoch each, in turns in one process, after a round that is not counted.

A slot is a position of a row; one is filled if it holds a token of a document. Memory is the process's resident size
after each step of one more epoch of ours, twice as long: the mean of the last quarter against that of the first.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.config import DataConfig
from trainer.data import sources
from trainer.data.packing import IGNORE
from trainer.data.stream import BatchStream
from trainer.data.streaming_import import MDSWriter

VOCAB, PAD = 32_000, 32_000
"""No document contains PAD, so that padding can be told from data."""
SEQ_LEN, ROWS, MICRO = 2048, 64, 8
RATIO, SPEED, FILLED, GROWTH = 0.9, 1e6, 0.99, 1.01


def write(folder: Path, tokens: int) -> int:
    """Documents of `tokens` tokens in all; → how many documents."""
    random = np.random.default_rng(0)
    count = 0
    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:int32"}, size_limit=1 << 26) as writer:
        while tokens > 0:
            length = int(np.clip(random.lognormal(np.log(1000) - 0.5, 1.0), 16, 100_000))
            writer.write({"tokens": random.integers(0, VOCAB, length, dtype=np.int32)})
            tokens -= length
            count += 1
    return count


class Raw:
    def __init__(self, folder: Path) -> None:
        from streaming.base.dataset import StreamingDataset

        self._data = StreamingDataset(local=str(folder), shuffle=True, batch_size=MICRO)

    def epoch(self) -> tuple[float, int]:
        """(seconds, tokens)."""
        began, tokens = time.perf_counter(), 0
        for sample in self._data:
            tokens += len(sample["tokens"])
        return time.perf_counter() - began, tokens


class Ours:
    def __init__(self, folder: Path, tokens: int) -> None:
        data = DataConfig(source="mds", path=str(folder), seq_len=SEQ_LEN)
        documents = sources.open_documents(data, None, seed=1, cache=folder / "cache")
        self._stream = BatchStream(
            documents, data, global_batch=ROWS, micro_batch=MICRO, data_rank=0, data_size=1, pad_id=PAD, seed=1
        )
        self.steps = tokens // (ROWS * SEQ_LEN)

    def epoch(self) -> tuple[float, int]:
        began = time.perf_counter()
        tokens = sum(sum(batch["input_ids"].numel() for batch in batches) for batches in self._batches())
        return time.perf_counter() - began, tokens

    def filled(self) -> tuple[float, float]:
        """Shares of all slots: those with a token, those with a target."""
        slots = tokens = targets = 0
        for batches in self._batches():
            for batch in batches:
                slots += batch["input_ids"].numel()
                tokens += int((batch["input_ids"] != PAD).sum())
                targets += int((batch["labels"] != IGNORE).sum())
        return tokens / slots, targets / slots

    def memory(self) -> list[int]:
        """Bytes after each step of two epochs."""
        return [resident() for _ in range(2) for _ in self._batches()]

    def _batches(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        for _ in range(self.steps):
            yield self._stream.peek()
            self._stream.advance()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, rounds: int, tokens: int) -> dict:
    documents = write(folder, tokens)
    ours, raw = Ours(folder, tokens), Raw(folder)
    speeds: dict[str, list[float]] = {"ours": [], "raw": []}
    for number in range(rounds + 1):
        for side in ("ours", "raw") if number % 2 else ("raw", "ours"):
            seconds, count = (ours if side == "ours" else raw).epoch()
            if number:
                speeds[side].append(count / seconds)
    filled, targets = ours.filled()
    memory = ours.memory()
    quarter = len(memory) // 4
    first, last = statistics.mean(memory[:quarter]), statistics.mean(memory[-quarter:])
    speed = {side: statistics.median(values) for side, values in speeds.items()}
    result = {
        "documents": documents,
        "ours_tokens_per_s": speed["ours"],
        "raw_tokens_per_s": speed["raw"],
        "ratio": speed["ours"] / speed["raw"],
        "filled": filled,
        "targets": targets,
        "memory_first": first,
        "memory_last": last,
        "growth": last / first,
        "speeds": speeds,
        "limits": {"ratio": RATIO, "tokens_per_s": SPEED, "filled": FILLED, "growth": GROWTH},
    }
    result["checks"] = {
        "ratio": result["ratio"] >= RATIO,
        "tokens_per_s": speed["ours"] >= SPEED,
        "filled": filled >= FILLED,
        "growth": result["growth"] <= GROWTH,
    }
    result["ok"] = all(result["checks"].values())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16_000_000, help="in the folder")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # StreamingDataset on its defaults
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), given.rounds, given.tokens)
    if given.json:
        print(json.dumps(result))
    else:
        print(f"tokens/s: packed {result['ours_tokens_per_s']:,.0f}, raw {result['raw_tokens_per_s']:,.0f}:", end=" ")
        print(f"{result['ratio']:.2f}×; slots filled {result['filled']:.2%} ({result['targets']:.2%} targets)")
        print(f"resident memory {result['memory_first'] / 1e6:.1f} → {result['memory_last'] / 1e6:.1f} MB", end=" ")
        print(f"({result['growth'] - 1:+.2%}) from the first quarter of two epochs to the last")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
