"""Why a run failed: the first cause, told apart from those who only lost their partner. Pure.

When one rank dies, all the others complain that a connection was closed or timed out. Those are
victims. Among the rest the earliest counts, on one clock: each node's times are corrected by the
offset of its clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import OrchError
from orchestrator.specs import NodeResult, RankResult, RunState

VICTIM = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by peer|broken pipe|peer closed|socket closed"
    r"|timed? ?out|timeout|remote (process|end)|NCCL (communicator was aborted|error.*(remote|system))"
    r"|ProcessGroup\w*.*(abort|watchdog)|ncclRemoteError|ncclSystemError|Rendezvous\w*(Closed|Connection|Timeout)Error"
    r"|SignalException|got signal: (15|2)|Gloo.*(connect|recv|send|read|write)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Diagnosis:
    """The object of `orch why --json`."""

    run: str
    cause: str
    node: str | None = None
    rank: int | None = None
    exception: str = ""
    message: str = ""
    lines: tuple[str, ...] = ()
    remedy: str = ""
    victims: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"lines": list(self.lines), "victims": list(self.victims)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diagnosis:
        return cls(**{**data, "lines": tuple(data["lines"]), "victims": tuple(data["victims"])})


@dataclass(frozen=True)
class _Complaint:
    node: str
    rank: int | None
    type: str
    message: str
    lines: tuple[str, ...]
    time_ns: int
    victim: bool
    hint: str = ""

    @property
    def who(self) -> str:
        return f"{self.node}/{self.rank}" if self.rank is not None and self.rank >= 0 else self.node


def diagnose(run: str, results: Mapping[str, NodeResult | OrchError]) -> Diagnosis | None:
    """The first cause of `run`'s failure from its nodes' results; None if nothing failed."""
    complaints = [each for node, result in results.items() for each in _complaints(node, result)]
    if not complaints:
        return None
    first = min(complaints, key=lambda each: (each.victim, each.time_ns, each.node, each.rank or 0))
    same = [each for each in complaints if (each.type, each.message, each.victim) == (first.type, first.message, False)]
    others = [each for each in complaints if each is not first and each not in same]
    return Diagnosis(
        run=run,
        cause=_cause(first) + (f" (and {len(same) - 1} more say the same)" if len(same) > 1 else ""),
        node=first.node,
        rank=first.rank if first.rank is not None and first.rank >= 0 else None,
        exception=first.type,
        message=first.message,
        lines=first.lines,
        remedy=first.hint or remedy(first.type, first.message, first.rank),
        victims=tuple(sorted({f"{each.who}: {_short(each)}" for each in others})),
    )


def _complaints(node: str, result: NodeResult | OrchError) -> list[_Complaint]:
    if isinstance(result, OrchError):
        return [
            _Complaint(node, None, type(result).__name__, result.message, result.lines, _LATE, False, result.hint or "")
        ]
    if result.state not in (RunState.FAILED, RunState.LOST):
        return []
    offset = result.clock_offset_ns
    found = [
        _rank_complaint(node, rank, offset)
        for rank in result.ranks
        if rank.rank >= 0 and rank.exit_code not in (0, None, 75)
    ]
    own = result.reason and not found
    if own or (result.reason and result.state is RunState.LOST):
        lines = next((rank.last_lines for rank in result.ranks if rank.rank < 0), ())
        when = _moment(result.ended_ns, offset)
        victim = bool(VICTIM.search(result.reason)) and result.state is not RunState.LOST
        found.append(_Complaint(node, None, "", result.reason, lines, when, victim, result.hint))
    if not found:
        found.append(
            _Complaint(
                node, None, "", f"ended with exit code {result.exit_code}", (), _moment(result.ended_ns, offset), True
            )
        )
    return found


_LATE = 2**63


def _moment(time_ns: int, offset: int) -> int:
    """A node's time on the operator's clock; an unknown one comes after all others."""
    return time_ns - offset if time_ns else _LATE


def _rank_complaint(node: str, rank: RankResult, offset: int) -> _Complaint:
    """The launcher gives every rank that ended by itself an error; one without was told to end, so it is a victim."""
    error = rank.error
    when = _moment((error.time_ns if error else 0) or rank.ended_ns, offset)
    if error:
        lines = tuple(error.traceback.splitlines()) or rank.last_lines
        victim = bool(VICTIM.search(f"{error.type}: {error.message}")) or _ended_by_us(rank, error.type)
        return _Complaint(node, rank.rank, error.type, error.message, lines, when, victim)
    code = rank.exit_code or 0
    message = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return _Complaint(node, rank.rank, "", message, rank.last_lines, when, True)


def _ended_by_us(rank: RankResult, kind: str) -> bool:
    """torchrun ends the neighbours of a failed rank with SIGTERM; that is no cause."""
    return rank.exit_code in (-15, 143) and kind in ("Signal", "SignalException", "Terminated")


def _cause(first: _Complaint) -> str:
    where = f"rank {first.rank} on {first.node}" if first.rank is not None and first.rank >= 0 else first.node
    return f"{where}: {_short(first)}"


def _short(complaint: _Complaint) -> str:
    text = complaint.message.strip().splitlines()[0] if complaint.message.strip() else ""
    return f"{complaint.type}: {text}" if complaint.type and text else complaint.type or text


_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"CUDA out of memory|OutOfMemoryError",
        "use a smaller micro-batch, shorter sequences or activation checkpointing",
    ),
    (r"out of memory|\boom\b", "give the job less to hold (smaller micro-batch, fewer workers) or a larger machine"),
    (r"ModuleNotFoundError|No module named", "add the package to requirements.txt beside orch.yaml, then deploy again"),
    (r"not in the image", "check the path; the image holds what git lists and .dockerignore lets through"),
    (r"No space left|ENOSPC", "free disk on that node: `orch prune`, `docker image prune`"),
    (
        r"Address already in use|EADDRINUSE|\bport .*\btaken\b",
        "end what listens there, or set another run.port in orch.yaml",
    ),
    (r"CUDA driver|no NVIDIA|nvidia", "check `nvidia-smi` there, or deploy with --gpus 0"),
    (r"\bSIGKILL\b|\bsignal 9\b", "often the kernel's out-of-memory killer: see `dmesg` there"),
    (r"rendezvous", "check that the nodes reach each other: `orch nodes check`"),
    (r"unknown (key|recipe)\b|ConfigError", "correct the key named above"),
    (r"\bnan\b|\binf\b|not finite", "lower the learning rate or look at the batch named above"),
)


def remedy(kind: str, message: str, rank: int | None = None) -> str:
    """What to do next, for the failures whose remedy is known; else where to look."""
    text = f"{kind}: {message}"
    for pattern, advice in _REMEDIES:
        if re.search(pattern, text, re.IGNORECASE):
            return advice
    which = f" --rank {rank}" if rank is not None and rank >= 0 else ""
    return f"`orch logs{which}` shows everything that it printed"
