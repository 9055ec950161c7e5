"""Watches a started run on all its nodes until it has ended, and ends what outlives a failure.

One thread a node reads the node's heartbeat; the end of a launcher, an engine or a node arrives
here as that node's result. Nothing polls: the node itself waits and speaks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.backends.base import Backend, Found
from orchestrator.errors import OrchError, UnreachableError
from orchestrator.specs import Node, NodeResult, RunState

HEARTBEAT_S = 6.0
"""Silence after which a connection counts as dropped."""
LOST_S = 45.0
"""Time that a node may stay unreachable before it counts as lost."""
GRACE_AFTER_FAILURE_S = 1.0
"""How long the other nodes may go on after the first failure, so that they say why themselves."""
KILL_AFTER_S = 4.0
"""Time after the request to die until the containers are ended from outside."""

Notify = Callable[[str, str], None]


@dataclass(frozen=True)
class Timing:
    heartbeat: float = HEARTBEAT_S
    lost: float = LOST_S
    grace: float = GRACE_AFTER_FAILURE_S
    kill: float = KILL_AFTER_S


class Watch:
    """`results` fills as nodes end; `step` waits a little and acts, so that the caller keeps its own loop."""

    def __init__(
        self,
        backend: Backend,
        found: Found,
        nodes: Sequence[Node],
        notify: Notify,
        *,
        stop_others: bool = True,
        timing: Timing = Timing(),
    ) -> None:
        self.results: dict[str, NodeResult] = {}
        self._backend, self._found, self._nodes, self._notify = backend, found, nodes, notify
        self._stop_others, self._timing = stop_others, timing
        self._ended: queue.SimpleQueue[tuple[Node, NodeResult]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failed_at: float | None = None
        self._kill_asked_at: float | None = None
        self._forced = False
        self.failed_node: str | None = None

    def start(self) -> None:
        for index, node in enumerate(self._nodes):
            name = f"watch-{node.name}"
            threading.Thread(target=self._follow, args=(node, index), name=name, daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    @property
    def done(self) -> bool:
        return len(self.results) == len(self._nodes)

    def step(self, timeout: float) -> None:
        """Takes in what ended within `timeout` seconds; after a failure stops the rest in time."""
        try:
            node, result = self._ended.get(timeout=timeout)
        except queue.Empty:
            pass
        else:
            self._take(node, result)
        if self._stop_others and self._failed_at is not None and not self.done:
            self._end_others()

    def _take(self, node: Node, result: NodeResult) -> None:
        self.results[node.name] = result
        if result.state is RunState.SUCCEEDED:
            return
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            self.failed_node = node.name
            if result.state in (RunState.FAILED, RunState.LOST) and not self.done and self._stop_others:
                self._notify(node.name, f"{result.state}: {result.reason or 'see below'}; stopping the other nodes")

    def _end_others(self) -> None:
        now, timing = time.monotonic(), self._timing
        first = self.results[self.failed_node] if self.failed_node else None
        graceful = first is not None and first.state in (RunState.PREEMPTED, RunState.STOPPED)
        grace = 30.0 if graceful else timing.grace
        if self._kill_asked_at is None and now - self._failed_at > grace:
            self._kill_asked_at = now
            self._in_background(lambda: self._backend.stop(self._found, self._left(), kill=True))
        elif self._kill_asked_at is not None and not self._forced and now - self._kill_asked_at > timing.kill:
            self._forced = True
            self._in_background(lambda: self._backend.end(self._found, self._left(), grace=1))

    def _left(self) -> list[Node]:
        return [node for node in self._nodes if node.name not in self.results]

    @staticmethod
    def _in_background(action: Callable[[], object]) -> None:
        threading.Thread(target=action, daemon=True).start()

    # -- one node -----------------------------------------------------------------------------

    def _follow(self, node: Node, index: int) -> None:
        lost_since: float | None = None
        while not self._closing.is_set():
            try:
                result = self._listen(node, index)
                if result:
                    self._ended.put((node, result))
                    return
                lost_since = None
            except UnreachableError as error:
                now = time.monotonic()
                if lost_since is None:
                    lost_since = now
                    self._notify(node.name, f"not answering ({error.message}); trying for {self._timing.lost:.0f} s")
                if now - lost_since > self._timing.lost:
                    self._ended.put((node, self._lost(node, index, error)))
                    return
            except OrchError as error:
                self._ended.put((node, self._lost(node, index, error)))
                return
            self._closing.wait(0.5)

    def _listen(self, node: Node, index: int) -> NodeResult | None:
        """One connection's worth of heartbeats, and the report that follows them."""
        stream = self._backend.watch(self._found, node)
        received = b""
        try:
            while not self._closing.is_set():
                chunk = stream.read(self._timing.heartbeat)
                if chunk is None:
                    raise UnreachableError(f"no heartbeat for {self._timing.heartbeat:.0f} s", node=node.name)
                if chunk == b"":
                    beats, newline, text = received.partition(b"\n")
                    return self._backend.ended(text, node, index) if newline else None
                received = (received + chunk).lstrip(b".")
        finally:
            stream.close()
        return None

    def _lost(self, node: Node, index: int, error: OrchError) -> NodeResult:
        return NodeResult(
            node=node.name,
            index=index,
            state=RunState.LOST,
            exit_code=error.exit_code,
            ended_ns=time.time_ns(),
            reason=f"the node is lost: {error.message}",
            hint=error.hint
            or "bring it back, then deploy again with the same --name to resume from the last checkpoint",
        )
