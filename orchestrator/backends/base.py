"""The interface that every backend implements, and the plan it shares with the dry run.

A plan is made without contacting anything and is the exact object that `submit` carries out,
so what `--dry-run` prints is what would be run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.connect.base import Completed, Stream
from orchestrator.errors import OrchError
from orchestrator.specs import JobSpec, Node, NodeResult, Run, RunState


@dataclass(frozen=True)
class Step:
    """One remote command. `stdin` is described, never shown: it may carry secrets."""

    title: str
    command: str
    timeout: float
    stdin: str = ""
    """What is sent on standard input, in words; empty for nothing."""


@dataclass(frozen=True)
class NodePlan:
    """What one node gets: the launcher's job, the staged files and the commands, in order."""

    node: Node
    index: int
    job: Mapping[str, Any]
    run_dir: str
    steps: tuple[Step, ...]
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Plan:
    spec: JobSpec
    nodes: tuple[NodePlan, ...]


@dataclass(frozen=True)
class NodeStatus:
    """What one node says of a run: `result` once its launcher has finished."""

    node: str
    state: RunState
    result: NodeResult | None = None
    detail: str = ""


@dataclass(frozen=True)
class Found:
    """A run and where it lies: `dirs` is node name → run folder on that node.

    Made from a plan, from the history, or from what the nodes themselves say (labels, folders).
    """

    run: Run
    dirs: Mapping[str, str]
    operator: str = ""

    def dir(self, node: str) -> str:
        return self.dirs[node]


Report = Callable[[str, str], None]
"""Called with (node, what is happening now) while a run is being submitted."""

Errors = dict[str, OrchError]
"""Node name → why it did not do as asked."""


class Backend(Protocol):
    name: str

    def plan(self, spec: JobSpec) -> Plan:
        """Everything that `submit` will do. Contacts nothing; deterministic."""
        ...

    def submit(self, plan: Plan, report: Report) -> None:
        """Starts the run on all nodes or on none; on any failure removes what it made, then raises."""
        ...

    def discover(self, nodes: Sequence[Node], runs: str) -> tuple[list[Found], Errors]:
        """All runs that the nodes know (`runs` is the folder of run folders there)."""
        ...

    def status(self, found: Found, nodes: Sequence[Node], *, timeout: float = 20) -> dict[str, NodeStatus | OrchError]:
        """Each node's word on the run, or the error of a node that did not answer."""
        ...

    def open_log(self, found: Found, node: Node, offset: int) -> Stream:
        """The run's log on `node` from byte `offset` on; ends when the launcher has ended."""
        ...

    def open_log_so_far(self, found: Found, node: Node, offset: int) -> Stream:
        """The same, but it ends with what there is now."""
        ...

    def read_file(self, found: Found, node: Node, name: str) -> bytes:
        """One file of the run folder; empty if it is not there."""
        ...

    def watch(self, found: Found, node: Node) -> Stream:
        """A heartbeat byte `.` about each second; after the launcher's end, a line end and its report."""
        ...

    def ended(self, report: bytes, node: Node, index: int) -> NodeResult | None:
        """Reads what followed the heartbeats of `watch`; None if the launcher still runs."""
        ...

    def stop(self, found: Found, nodes: Sequence[Node], *, kill: bool) -> Errors:
        """Asks for a stop (or has the ranks killed at once); does not wait."""
        ...

    def end(self, found: Found, nodes: Sequence[Node], *, grace: int = 2) -> Errors:
        """Ends the launchers from outside, where `stop` was not heeded."""
        ...

    def remove(self, found: Found, nodes: Sequence[Node], *, files: bool = False) -> Errors:
        """Removes the run's ended containers, and with `files` its folder; a live run is left alone."""
        ...

    def checkpoints(self, found: Found, node: Node) -> list[str]:
        """Names of the whole checkpoints (those with a manifest) that the run can see on `node`."""
        ...

    def attach(self, found: Found, node: Node, command: Sequence[str]) -> list[str]:
        """The argv that runs `command` beside the job on `node`, in the operator's terminal."""
        ...

    def execute(self, found: Found, node: Node, command: Sequence[str], *, timeout: float = 3600) -> Completed:
        """Runs `command` beside the job on `node`, without a terminal."""
        ...

    def fetch(self, found: Found, node: Node, paths: Sequence[str]) -> Stream:
        """A tar archive of the run's `paths` (below its folder, or its checkpoints) from `node`."""
        ...
