"""Reads the trainer's event stream, `events/rank-R.jsonl` of a run folder.

The reader may be older or newer than the writer, and may read while it writes: unknown kinds and keys, torn last
lines and lines that are not JSON are passed over, missing numbers are None. See docs/contracts.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orchestrator.specs import RankError

KINDS: dict[str, type[Event]] = {}
"""Event kind → its class."""


@dataclass(frozen=True)
class Event:
    """What every event has. `time` in seconds since the epoch by the writer's clock; `step` counts finished steps."""

    kind: str
    time: float
    attempt: int = 1
    rank: int = 0
    step: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Fields that this version does not know."""


@dataclass(frozen=True)
class Start(Event):
    """A rank came up."""

    world: int | None = None
    host: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    config_hash: str = ""


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step, from rank 0. Times in seconds, `memory` in bytes, `mfu` and `sparsity` as fractions.

    `data_s`, `wait_s` (the first collective: waiting for the slowest rank) and `compute_s` make up `step_s`.
    """

    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    tokens_per_s_device: float | None = None
    step_s: float | None = None
    data_s: float | None = None
    wait_s: float | None = None
    compute_s: float | None = None
    mfu: float | None = None
    memory: float | None = None
    weight_decay: float | None = None
    loss_scale: float | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class BadStep(Event):
    """A step whose gradient was not finite: `rows` name its data on the ranks whose own loss was not."""

    grad_norm: str = ""
    rows: list[str] = field(default_factory=list)
    data_ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Hang(Event):
    """No step for `seconds`; the stacks of all threads are in `file`."""

    seconds: float | None = None
    file: str = ""


@dataclass(frozen=True)
class Eval(Event):
    """An evaluation on held-out data: mean loss and perplexity over `tokens`, taken in `seconds`."""

    loss: float | None = None
    perplexity: float | None = None
    tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Checkpoint(Event):
    """A checkpoint is complete. `blocked_s` is how long training waited for it."""

    path: str = ""
    bytes: int | None = None
    seconds: float | None = None
    blocked_s: float | None = None


@dataclass(frozen=True)
class Heartbeat(Event):
    """The rank is alive."""


@dataclass(frozen=True)
class Error(Event):
    """The exception that ended the rank."""

    type: str = ""
    message: str = ""
    traceback: str = ""

    def to_rank_error(self) -> RankError:
        return RankError(self.rank, self.type, self.message, self.traceback, round(self.time * 1e9))


@dataclass(frozen=True)
class End(Event):
    """The rank has ended; `status` is succeeded, failed or preempted."""

    status: str = ""


KINDS.update(start=Start, step=Step, bad_step=BadStep, hang=Hang, eval=Eval)
KINDS.update(checkpoint=Checkpoint, heartbeat=Heartbeat, error=Error, end=End)

_Kind = TypeVar("_Kind", bound=Event)
_CHECKS: dict[str, Any] = {
    "str": lambda value: value if isinstance(value, str) else None,
    "int": lambda value: value if isinstance(value, int) and not isinstance(value, bool) else None,
    "float": lambda value: float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None,
    "list[str]": lambda value: value if isinstance(value, list) else None,
    "list[int]": lambda value: value if isinstance(value, list) else None,
    "Mapping[str, str]": lambda value: value if isinstance(value, dict) else None,
}


def read(text: str | bytes) -> list[Event]:
    """The events in `text`, in order."""
    return list(_events(text))


def _events(text: str | bytes) -> Iterator[Event]:
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    for line in text.split("\n"):
        event = parse(line)
        if event is not None:
            yield event


def parse(line: str) -> Event | None:
    """The event on one line; None for a line that is none, or is of a kind that is not known here."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kind = KINDS.get(row.get("kind")) if isinstance(row, dict) and isinstance(row.get("kind"), str) else None
    if kind is None or _CHECKS["float"](row.get("time")) is None:
        return None
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in row.items():
        known = kind.__dataclass_fields__.get(key)
        if known is None or key == "extra":
            if key != "schema":
                extra[key] = value
            continue
        checked = _CHECKS[str(known.type).removesuffix(" | None")](value)
        if checked is not None:
            values[key] = checked
    return kind(**values, extra=extra)


def of(events: Iterable[Event], kind: type[_Kind]) -> list[_Kind]:
    """The events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def last_step(events: Iterable[Event]) -> Step | None:
    """The latest `step` event of the latest attempt."""
    steps = of(events, Step)
    return max(steps, key=lambda event: (event.attempt, event.step), default=None)


def last_checkpoint(events: Iterable[Event]) -> Checkpoint | None:
    """The newest complete checkpoint."""
    return max(of(events, Checkpoint), key=lambda event: event.time, default=None)


def first_error(ranks: Mapping[int, Iterable[Event]] | Iterable[Event]) -> Error | None:
    """The earliest `error` of the latest attempt, over rank → events, or over events of several ranks together."""
    streams = ranks.values() if isinstance(ranks, Mapping) else [ranks]
    every = [event for events in streams for event in events]
    latest = max((event.attempt for event in every), default=0)
    errors = [event for event in of(every, Error) if event.attempt == latest]
    return min(errors, key=lambda event: event.time, default=None)
