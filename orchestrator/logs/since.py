"""`--since`: from what the operator wrote to a byte offset in a log without times. Pure.

The launcher writes `log.index` beside the log: `<unix seconds> <byte offset>` lines, at most one a second,
each before the output that it announces. So: bytes before the offset are no younger than the entry.
"""

from __future__ import annotations

import re
import time
from datetime import datetime

from orchestrator.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+")
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_EXAMPLES = "write a duration (90s, 10m, 1h30m, 2d) or a time (2026-01-31T10:00, in your zone, or …Z for UTC)"


def parse_since(text: str, *, now: float | None = None) -> float:
    """Seconds since the epoch. `10m`: that long before `now`; or an ISO date or time, local without a zone.

    Raises UsageError.
    """
    text = text.strip()
    if _DURATION.fullmatch(text):
        ago = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
        return max((time.time() if now is None else now) - ago, 0.0)
    # fromisoformat also reads 20260131 and week dates: a bare number is likelier a forgotten unit.
    if "-" in text:
        try:
            return datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            pass
    raise UsageError(f"cannot read the time {text!r}", hint=_EXAMPLES)


def offset_since(index_text: str, t: float) -> int:
    """Where to start reading so that every line written at `t` or later is seen.

    `t` is in the node's clock (add the node's clock offset). Errs on the side of more: up to about one second
    of older output, and everything if the index is missing or its clock went backwards.
    """
    offset = 0
    for line in index_text.split("\n")[:-1]:  # after the last newline: nothing, or a torn entry
        seconds, _, position = line.partition(" ")
        try:
            # Whole seconds may have been rounded down: take the end of that second.
            when, where = float(seconds) + ("." not in seconds), int(position)
        except ValueError:
            continue
        if not when <= t:
            break
        offset = max(where, 0)
    return offset
