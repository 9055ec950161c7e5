"""The host's half of the event contract: it reads what the trainer's test wrote (`fixtures/events.jsonl`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import events

FIXTURE = Path(__file__).parent / "fixtures" / "events.jsonl"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return FIXTURE.read_text(encoding="utf-8").splitlines()


def test_every_line_is_understood(lines):
    read = events.read(FIXTURE.read_bytes())
    assert len(read) == len(lines)
    for line, event in zip(lines, read, strict=True):
        row = json.loads(line)
        assert row.pop("schema") == 1
        assert event.extra == {}, f"fields unknown to the host in {line}"
        for key, value in row.items():
            assert getattr(event, key) == (value if value is not None else getattr(event, key)), (key, line)


def test_every_kind_of_the_contract_occurs(lines):
    assert {json.loads(line)["kind"] for line in lines} == set(events.KINDS)


def test_what_the_host_asks_of_the_stream_is_there(lines):
    read = events.read("\n".join(lines))
    step = events.last_step(read)
    assert step is not None and step.loss is not None and step.tokens_per_s is not None
    checkpoint = events.last_checkpoint(read)
    assert checkpoint is not None and checkpoint.path and checkpoint.bytes
    error = events.first_error(read)
    assert error is not None and error.type and error.traceback
    assert events.of(read, events.End)[-1].status in ("succeeded", "failed", "preempted")
