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

from orchestrator.backends.base import Backend, Errors, Found
from orchestrator.errors import DeadlineError, OrchError, UnreachableError
from orchestrator.specs import Node, NodeResult, RunState

HEARTBEAT_S = 6.0
"""Silence after which a connection counts as dropped."""
LOST_S = 45.0
"""Time that a node may stay unreachable before it counts as lost."""
GRACE_AFTER_FAILURE_S = 1.0
"""How long the other nodes may go on after the first failure, so that they say why themselves."""
GRACE_AFTER_STOP_S = 30.0
"""The same after a node that was stopped or preempted: the others may still be writing a checkpoint."""
KILL_AFTER_S = 4.0
"""Time after the request to die until the containers are ended from outside."""

Notify = Callable[[str, str], None]


@dataclass(frozen=True)
class Timing:
    heartbeat: float = HEARTBEAT_S
    lost: float = LOST_S
    grace: float = GRACE_AFTER_FAILURE_S
    kill: float = KILL_AFTER_S
    graceful: float = GRACE_AFTER_STOP_S
    pause: float = 0.5
    """Seconds between two attempts to reach a node."""


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.results: dict[str, NodeResult] = {}
        self._backend, self._found, self._nodes, self._notify = backend, found, nodes, notify
        self._stop_others, self._timing, self._clock = stop_others, timing, clock
        self._ended: queue.SimpleQueue[tuple[Node, NodeResult]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failed_at: float | None = None
        self._kill_asked_at: float | None = None
        self._forced = False
        self._requests: list[threading.Thread] = []
        self.failed_node: str | None = None

    def start(self) -> None:
        for index, node in enumerate(self._nodes):
            name = f"watch-{node.name}"
            threading.Thread(target=self._follow, args=(node, index), name=name, daemon=True).start()

    def close(self) -> None:
        """Ends the watching; a request to stop that is under way gets a few seconds to arrive."""
        self._closing.set()
        until = self._clock() + self._timing.kill
        for thread in self._requests:
            thread.join(max(0.0, until - self._clock()))

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
        if result.state is RunState.LOST and self._stop_others:
            # Its engine may be dead and its ranks alive: the launcher heeds the stop file without an engine.
            self._in_background(lambda: self._backend.stop(self._found, [node], kill=True))
        if self._failed_at is None:
            self._failed_at = self._clock()
            self.failed_node = node.name
            if result.state in (RunState.FAILED, RunState.LOST) and not self.done and self._stop_others:
                self._notify(node.name, f"{result.state}{_why(result)}; stopping the other nodes")

    def _end_others(self) -> None:
        now, timing = self._clock(), self._timing
        first = self.results[self.failed_node] if self.failed_node else None
        graceful = first is not None and first.state in (RunState.PREEMPTED, RunState.STOPPED)
        grace = timing.graceful if graceful else timing.grace
        if self._kill_asked_at is None and now - self._failed_at > grace:
            self._kill_asked_at = now
            self._in_background(lambda: self._backend.stop(self._found, self._left(), kill=True))
        elif self._kill_asked_at is not None and not self._forced and now - self._kill_asked_at > timing.kill:
            self._forced = True
            self._in_background(lambda: self._backend.end(self._found, self._left(), grace=1))

    def _left(self) -> list[Node]:
        return [node for node in self._nodes if node.name not in self.results]

    def _in_background(self, action: Callable[[], Errors]) -> None:
        def act() -> None:
            for node, error in action().items():
                self._notify(node, f"could not be told to end its ranks: {error.message}")

        thread = threading.Thread(target=act, daemon=True)
        self._requests.append(thread)
        thread.start()

    # -- one node -----------------------------------------------------------------------------

    def _follow(self, node: Node, index: int) -> None:
        outage = _Outage()
        while not self._closing.is_set():
            try:
                result = self._listen(node, index, outage)
                if result:
                    self._ended.put((node, result))
                    return
            except (UnreachableError, DeadlineError) as error:
                if outage.begin(self._clock()):
                    self._notify(node.name, f"not answering ({error.message}); trying for {self._timing.lost:.0f} s")
                if outage.seconds(self._clock()) > self._timing.lost:
                    self._ended.put((node, self._lost(node, index, error)))
                    return
            except OrchError as error:
                self._ended.put((node, self._lost(node, index, error)))
                return
            except Exception as error:  # a bug must not end a thread without a word: nobody would ever be done
                wrapped = OrchError(f"watching it failed: {type(error).__name__}: {error}", node=node.name)
                self._ended.put((node, self._lost(node, index, wrapped)))
                return
            self._closing.wait(self._timing.pause)

    def _listen(self, node: Node, index: int, outage: _Outage) -> NodeResult | None:
        """One connection's worth of heartbeats, and the report that follows them; None if that is not the end."""
        stream = self._backend.watch(self._found, node)
        received = b""
        try:
            while not self._closing.is_set():
                chunk = stream.read(self._timing.heartbeat)
                if chunk is None:
                    raise UnreachableError(f"no heartbeat for {self._timing.heartbeat:.0f} s", node=node.name)
                if chunk == b"":
                    _, newline, text = received.partition(b"\n")
                    if not newline:
                        raise UnreachableError("the heartbeat ended without a report", node=node.name)
                    return self._backend.ended(text, node, index)
                if outage.end():
                    self._notify(node.name, "answering again")
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


class _Outage:
    """Since when a node has been silent; any sign of life ends it."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self, now: float) -> bool:
        """True if it was answering until now."""
        fresh = self._since is None
        if fresh:
            self._since = now
        return fresh

    def end(self) -> bool:
        """True if it was silent until now."""
        silent, self._since = self._since is not None, None
        return silent

    def seconds(self, now: float) -> float:
        return 0.0 if self._since is None else now - self._since


def _why(result: NodeResult) -> str:
    """`: rank 3: ValueError`, as far as the node knows it itself."""
    failed = [rank for rank in result.ranks if rank.error and rank.exit_code not in (-15, 143)]
    first = min(failed, key=lambda rank: rank.error.time_ns, default=None)
    if first and first.error:
        return f": rank {first.rank}: {first.error.type}"
    return f": {result.reason}" if result.reason else ""
