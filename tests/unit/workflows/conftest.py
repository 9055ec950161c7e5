"""A backend that does what the test has written down."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence

import pytest

from orchestrator.backends.base import Errors, Found, NodeStatus
from orchestrator.errors import OrchError
from orchestrator.specs import Node, NodeResult, Run, RunState

Act = bytes | None | Exception


class Line:
    """A stream whose chunks the test sends; `b""` ends it, an exception breaks it, None is silence."""

    def __init__(self, *acts: Act) -> None:
        self.acts: queue.SimpleQueue[Act] = queue.SimpleQueue()
        self.returncode: int | None = None
        self.stderr = ""
        self.closed = False
        self.send(*acts)

    def send(self, *acts: Act) -> None:
        for act in acts:
            self.acts.put(act)

    def read(self, timeout: float | None = None) -> bytes | None:
        try:
            act = self.acts.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(act, Exception):
            raise act
        if act == b"":
            self.returncode = 0
        return act

    def close(self) -> None:
        self.closed = True
        self.acts.put(b"")  # as closing a channel does: whoever reads there gets the end


class Scripted:
    """Backend of backends/base.py, as far as a run that was started needs it."""

    name = "scripted"

    def __init__(self, names: Sequence[str] = ("n1", "n2")) -> None:
        self.nodes = tuple(Node(name, "203.0.113.1") for name in names)
        run = Run("r-1", "r", RunState.RUNNING, "scripted", tuple(names), 100.0)
        self.found = Found(run, {name: f"/runs/{name}" for name in names})
        self.watches: dict[str, list[Line | Exception]] = {name: [Line(b".")] for name in names}
        """Per node: what each further `watch` gives; the last one is given again and again."""
        self.logs: dict[str, list[Line]] = {name: [Line(b"0\thello\n", b"")] for name in names}
        """Per node: what each further `open_log` gives."""
        self.offsets: list[int] = []
        self.opened: dict[str, int] = dict.fromkeys(names, 0)
        self.results: dict[str, NodeResult | None] = {}
        self.statuses: list[dict[str, NodeStatus | OrchError]] = []
        self.calls: list[tuple] = []
        """What was asked for, in order: ("stop", kill, nodes), ("end", nodes), ("remove", run, nodes, files)."""
        self.errors: Errors = {}
        self.on_stop: Callable[[bool], object] = lambda kill: None

    # -- what the test does

    def ends(self, node: str, state: str = "succeeded", code: int = 0, **more) -> None:
        """The launcher on `node` ends now."""
        self.results[node] = NodeResult(
            node, self.found.run.nodes.index(node), RunState(state), code, ended_ns=time.time_ns(), **more
        )
        self.line(node).send(b".", b"\n", b"the report of " + node.encode(), b"")

    def line(self, node: str) -> Line:
        last = self.watches[node][-1]
        assert isinstance(last, Line)
        return last

    def asked(self, verb: str) -> list[tuple]:
        return [call for call in self.calls if call[0] == verb]

    # -- Backend

    def watch(self, found: Found, node: Node) -> Line:
        script = self.watches[node.name]
        step = script[min(self.opened[node.name], len(script) - 1)]
        self.opened[node.name] += 1
        if isinstance(step, Exception):
            raise step
        return step

    def ended(self, report: bytes, node: Node, index: int) -> NodeResult | None:
        assert report == b"the report of " + node.name.encode()
        return self.results.get(node.name)

    def open_log(self, found: Found, node: Node, offset: int) -> Line:
        self.offsets.append(offset)
        return self.logs[node.name].pop(0)

    def stop(self, found: Found, nodes: Sequence[Node], *, kill: bool) -> Errors:
        self.calls.append(("stop", kill, tuple(node.name for node in nodes)))
        self.on_stop(kill)
        return self.errors

    def end(self, found: Found, nodes: Sequence[Node], *, grace: int = 2) -> Errors:
        self.calls.append(("end", tuple(node.name for node in nodes)))
        return {}

    def remove(self, found: Found, nodes: Sequence[Node], *, files: bool = False) -> Errors:
        self.calls.append(("remove", found.run.id, tuple(node.name for node in nodes), files))
        return self.errors

    def status(self, found: Found, nodes: Sequence[Node], *, timeout: float = 20) -> dict:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


class Clock:
    """Time that passes only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def scripted() -> Callable[..., Scripted]:
    return Scripted


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new_line() -> type[Line]:
    return Line


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits for a condition, calling `meanwhile` in between; fails after ten seconds."""

    def wait(condition: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "it did not come to pass"
            meanwhile()
            time.sleep(0.002)

    return wait
