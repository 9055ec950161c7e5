"""The trainer's half of the event contract: what it emits has the keys and types of `fixtures/events.jsonl`.

Runs in the trainer's environment; the host's half (`test_events_host.py`) reads the same file.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.__main__ import main
from trainer.models import loss

GOLDEN = Path(__file__).parent / "fixtures" / "events.jsonl"
TINY = """\
name: contract
model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer: {vocab_size: 280}
data: {source: text_files, path: PATH, seq_len: 8, holdout: 0.3}
train: {steps: 2, global_batch: 2, micro_batch: 1, device: cpu}
checkpoint: {every: 1}
log: {heartbeat: 0.001, tensorboard: false}
sample: {max_new_tokens: 0}
"""


def shape(value: Any) -> Any:
    """Types in place of values, key by key and in order."""
    return (
        [(key, shape(inner)) for key, inner in value.items()]
        if isinstance(value, dict)
        else type(value).__name__
    )


def by_kind(rows: list[dict[str, Any]]) -> dict[str, Any]:
    shapes: dict[str, Any] = {}
    for row in rows:
        assert shapes.setdefault(row["kind"], shape(row)) == shape(row)
    return shapes


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def emitted(tmp_path, monkeypatch) -> list[dict[str, Any]]:
    """The events of a run that succeeds, of one that fails, and of one that hangs and then loses its gradient."""
    text = tmp_path / "text"
    text.mkdir()
    for index in range(4):
        (text / f"{index}.txt").write_text(f"document {index} says: the quick brown fox jumps over it. " * 3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY.replace("PATH", str(text)))
    monkeypatch.setenv("ORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("ORCH_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "ORCH_ATTEMPT", "ORCH_CHECKPOINT_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["run", "--config", str(recipe)]) == 0
    monkeypatch.setenv("ORCH_ATTEMPT", "2")
    assert main(["run", "--config", str(recipe), "data.seq_len=9"]) == 1  # not the checkpoint's data
    monkeypatch.setenv("ORCH_ATTEMPT", "3")
    more = ["train.steps=4", "train.non_finite=stop", "log.hang_factor=1", "log.hang_floor=0.05", "checkpoint.every=0"]
    slow_then_nan(monkeypatch)
    assert main(["run", "--config", str(recipe), *more]) == 1
    return read(tmp_path / "run" / "events" / "rank-0.jsonl")


def slow_then_nan(monkeypatch) -> None:
    """The loss of the second step to come is late by more than the watchdog waits, and not a number."""
    original, calls = loss.summed_loss, []

    def summed_loss(logits: Any, labels: Any) -> Any:
        calls.append(1)
        if len(calls) <= 2:
            return original(logits, labels)
        time.sleep(0.3)
        return original(logits, labels) * float("nan")

    monkeypatch.setattr(loss, "summed_loss", summed_loss)


def test_emitted_events_have_the_golden_shape(emitted):
    golden = by_kind(read(GOLDEN))
    assert by_kind(emitted) == golden
    assert [row["attempt"] for row in emitted if row["kind"] == "start"] == [1, 2, 3]
    assert [row["status"] for row in emitted if row["kind"] == "end"] == ["succeeded", "failed", "failed"]
    assert {row["rank"] for row in emitted} == {0}
