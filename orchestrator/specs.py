"""The vocabulary that every layer shares: frozen values, no I/O.

The formats that leave the process (labels, run ids, `orch runs --json`, result.json) are
described in docs/contracts.md; this module is their only spelling in the host's code.
"""

from __future__ import annotations

import enum
import re
import secrets as _secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

SCHEMA = 1

CONTAINER = "orch"
"""The constant container name: the engine itself refuses a second run on a node."""

LABEL_RUN = "orch.run"
LABEL_NODE = "orch.node"
LABEL_INDEX = "orch.index"
LABEL_OPERATOR = "orch.operator"
LABEL_SCHEMA = "orch.schema"
LABEL_DIR = "orch.dir"
"""The run folder on the node, so that any operator finds it without our orch.yaml."""
LABEL_JOB = "orch.job"
"""Name, attempt, number of nodes and image of the run, as compact JSON."""


class RunState(enum.StrEnum):
    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    PREEMPTED = "preempted"
    LOST = "lost"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = {RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.PREEMPTED, RunState.LOST}


class Secret:
    """A value that never shows itself: `repr`, `str` and f-strings give `***`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True)
class Node:
    """One machine of the inventory. `private` is where the other nodes reach it."""

    name: str
    address: str
    private: str = ""
    user: str | None = None
    port: int = 22
    key: str | None = None
    jump: str | None = None
    gpus: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    known_hosts: str | None = None

    def __post_init__(self) -> None:
        if not self.private:
            object.__setattr__(self, "private", self.address)

    def __hash__(self) -> int:
        return hash((self.name, self.address, self.port, self.user))


@dataclass(frozen=True)
class ImageRef:
    """`repository:tag`, pinned by `digest` (`sha256:…`) once pushed."""

    repository: str
    tag: str = "latest"
    digest: str | None = None

    @property
    def tagged(self) -> str:
        return f"{self.repository}:{self.tag}"

    @property
    def pinned(self) -> str:
        """`repository@digest`, what nodes pull; the tag where there is no digest yet."""
        return f"{self.repository}@{self.digest}" if self.digest else self.tagged

    @property
    def registry(self) -> str:
        """Host and port of the registry, `docker.io` where the name gives none."""
        first, slash, _ = self.repository.partition("/")
        return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"

    @property
    def local_port(self) -> int | None:
        """The port of a registry on the operator's own machine (`localhost:PORT/…`), else None."""
        host, _, port = self.registry.partition(":")
        return int(port or 80) if host in ("localhost", "127.0.0.1") else None

    def __str__(self) -> str:
        return self.pinned


@dataclass(frozen=True)
class Mount:
    source: str
    target: str
    readonly: bool = False


@dataclass(frozen=True)
class Storage:
    """Where runs, checkpoints and caches lie on the nodes (`~` is the node's own home)."""

    kind: str = "local"
    runs: str = "~/.orch/runs"
    checkpoints: str | None = None
    cache: str = "~/.orch/cache"

    @property
    def checkpoint_root(self) -> str:
        """`checkpoints`, or the folder of that name beside the runs."""
        return self.checkpoints or self.runs.rstrip("/").rpartition("/")[0] + "/checkpoints"


@dataclass(frozen=True)
class JobSpec:
    """All that a backend needs to plan one attempt of one run."""

    run_id: str
    name: str
    nodes: tuple[Node, ...]
    procs: int
    """Processes per node."""
    command: tuple[str, ...]
    """What follows torchrun's own options: `train.py --lr 1e-4` or `-m pkg …`."""
    gpus: int = 0
    """GPUs per node that the container gets; 0 trains on the CPU."""
    attempt: int = 1
    series: str = ""
    """Whose checkpoints these are: the `--name` that was given, else the run's own id (a fresh start)."""
    launcher: str = "torchrun"
    """`torchrun`, or `none`: run the command once per node."""
    stop: str = "signal"
    """`file`: the job polls ORCH_RUN_DIR/stop (our trainer); `signal`: SIGTERM, grace, SIGKILL."""
    image: ImageRef | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    storage: Storage = field(default_factory=Storage)
    port: int = 29400
    shm: str = "8g"
    grace: int = 30
    """Seconds between asking a job to stop and killing it."""
    operator: str = ""
    backend: str = "ssh"

    def __post_init__(self) -> None:
        if not self.series:
            object.__setattr__(self, "series", self.run_id)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def world_size(self) -> int:
        return len(self.nodes) * (self.procs if self.launcher == "torchrun" else 1)


@dataclass(frozen=True)
class Run:
    """One row of the history; `to_json` is the object of `orch runs --json`."""

    id: str
    name: str
    state: RunState
    backend: str
    nodes: tuple[str, ...]
    started: float
    exit_code: int | None = None
    ended: float | None = None
    image: str | None = None
    attempt: int = 1

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        row["state"] = self.state.value
        row["nodes"] = list(self.nodes)
        row["started"] = iso(self.started)
        row["ended"] = iso(self.ended)
        order = ("id", "name", "state", "exit_code", "backend", "nodes", "started", "ended", "image", "attempt")
        return {key: row[key] for key in order}

    def at(self, state: RunState, **changes: Any) -> Run:
        return replace(self, state=state, **changes)


@dataclass(frozen=True)
class RankError:
    """The first error of one rank, as the launcher or the trainer's event stream recorded it."""

    rank: int
    type: str
    message: str
    traceback: str = ""
    time_ns: int = 0


@dataclass(frozen=True)
class RankResult:
    rank: int
    local_rank: int
    exit_code: int | None
    started_ns: int = 0
    ended_ns: int = 0
    error: RankError | None = None
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeResult:
    """What one node's launcher wrote in result.json, or that it never came to write one.

    `state` is succeeded, failed, stopped or preempted; `reason` is the launcher's own word
    for a failure outside the ranks (rendezvous, no interface, command not found).
    """

    node: str
    index: int
    state: RunState
    exit_code: int
    host: str = ""
    started_ns: int = 0
    ended_ns: int = 0
    clock_offset_ns: int = 0
    """This node's clock minus the operator's, from the preflight."""
    reason: str = ""
    hint: str = ""
    ranks: tuple[RankResult, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NodeResult:
        ranks = []
        for row in data.get("ranks", ()):
            error = row.get("error")
            ranks.append(
                RankResult(
                    rank=row["rank"],
                    local_rank=row["local_rank"],
                    exit_code=row["exit_code"],
                    started_ns=row.get("started_ns", 0),
                    ended_ns=row.get("ended_ns", 0),
                    error=RankError(
                        row["rank"],
                        error["type"],
                        error["message"],
                        error.get("traceback", ""),
                        error.get("time_ns", 0),
                    )
                    if error
                    else None,
                    last_lines=tuple(row.get("last_lines", ())),
                )
            )
        return cls(
            node=data["node"],
            index=data["index"],
            state=RunState(data["state"]),
            exit_code=data["exit_code"],
            host=data.get("host", ""),
            started_ns=data.get("started_ns", 0),
            ended_ns=data.get("ended_ns", 0),
            clock_offset_ns=data.get("clock_offset_ns") or 0,
            reason=data.get("reason", ""),
            hint=data.get("hint", ""),
            ranks=tuple(ranks),
        )


_SAFE = re.compile(r"[^a-z0-9_.-]+")


def safe_name(name: str, limit: int = 80) -> str:
    """`name` as it may stand in a run id or a folder: lower case, `[a-z0-9_.-]`, at most `limit` characters."""
    return _SAFE.sub("-", name.lower()).strip("-.")[:limit].rstrip("-.") or "run"


def new_run_id(name: str, now: datetime | None = None, suffix: str | None = None) -> str:
    """`<name>-<YYYYMMDD-HHMMSS>-<4 hex>`, UTC."""
    now = now or datetime.now(UTC)
    return f"{safe_name(name, 40)}-{now:%Y%m%d-%H%M%S}-{suffix or _secrets.token_hex(2)}"


def iso(time: float | None) -> str | None:
    """Seconds since the epoch as `2026-01-31T12:00:00Z`."""
    if time is None:
        return None
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
