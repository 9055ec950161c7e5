"""The operator's terminal on a run: logs, Ctrl-C, detaching, closed pipes."""

from __future__ import annotations

import threading

import pytest

from orchestrator.errors import ConnectionLost, Detached
from orchestrator.logs import Sink, View
from orchestrator.specs import RunState
from orchestrator.workflows import attach, watch
from orchestrator.workflows.attach import Attachment
from orchestrator.workflows.signals import Signals

INT, TERM, HUP = 2, 15, 1


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr(attach, "SECOND_CTRL_C_S", 0.03)


class Terminal:
    """An attachment to a scripted backend, and what its operator sees and types."""

    def __init__(self, backend, **changes) -> None:
        self.backend = backend
        self.written = bytearray()
        self.told: list[tuple[str, str]] = []
        self.signals = Signals()
        self.on_tell = lambda text: None
        self.sink = Sink(self.written.extend)
        self.attachment = Attachment(
            backend,
            backend.found,
            backend.nodes,
            sink=self.sink,
            view=View(names=backend.found.run.nodes, color=False),
            notify=self.tell,
            signals=self.signals,
            **changes,
        )

    def tell(self, node: str, text: str) -> None:
        self.told.append((node, text))
        self.on_tell(text)

    def type(self, *signums: int) -> None:
        """As if these signals had arrived; `run` finds them at its next look."""
        self.signals.hold()
        for signum in signums:
            self.signals._handle(signum, None)

    def types_when(self, *rows: tuple[str, int]) -> None:
        """Each signal when the operator reads the text that begins so."""
        waiting = list(rows)

        def react(text: str) -> None:
            if waiting and text.startswith(waiting[0][0]):
                self.type(waiting.pop(0)[1])

        self.on_tell = react

    def run(self):
        return self.attachment.run()


@pytest.fixture
def terminal(scripted):
    made: list[Terminal] = []

    def make(names=("n1", "n2"), **changes) -> Terminal:
        made.append(Terminal(scripted(names), **changes))
        return made[-1]

    yield make
    for each in made:
        each.attachment._closing.set()


def test_to_the_end(terminal) -> None:
    one = terminal()
    one.backend.ends("n1")
    one.backend.ends("n2")
    results = one.run()
    assert {name: each.state for name, each in results.items()} == {"n1": RunState.SUCCEEDED, "n2": RunState.SUCCEEDED}
    assert sorted(line.split()[0] for line in bytes(one.written).decode().splitlines()) == ["n1/0", "n2/0"]
    assert one.attachment.logs().cursors == {"n1": 8, "n2": 8}
    assert one.backend.calls == [] and one.told == []


def test_a_failure_stops_the_others(terminal) -> None:
    one = terminal()
    one.attachment._watch._timing = watch.Timing(grace=0.0, kill=0.0)
    one.backend.on_stop = lambda kill: one.backend.ends("n2", "stopped", 143)
    one.backend.ends("n1", "failed", 1, reason="x")
    results = one.run()
    assert (results["n1"].state, results["n2"].state) == (RunState.FAILED, RunState.STOPPED)
    assert one.backend.asked("stop")[0] == ("stop", True, ("n2",))


def test_one_ctrl_c_stops_the_run_after_a_while(terminal) -> None:
    one = terminal()
    one.backend.on_stop = lambda kill: [one.backend.ends(name, "preempted", 75) for name in ("n1", "n2")]
    one.type(INT)
    results = one.run()
    assert {each.state for each in results.values()} == {RunState.PREEMPTED}
    assert one.backend.calls == [("stop", False, ("n1", "n2"))]
    assert one.told[0] == ("", "Ctrl-C again within 0 s detaches; otherwise the run is stopped")
    assert one.told[1][1].startswith("stopping the run")


@pytest.mark.parametrize("second", [INT, TERM, HUP])
def test_a_second_one_in_time_detaches(terminal, second: int, monkeypatch) -> None:
    monkeypatch.setattr(attach, "SECOND_CTRL_C_S", 10.0)
    one = terminal()
    one.types_when(("Ctrl-C again within", second))
    one.type(INT)
    with pytest.raises(Detached) as caught:
        one.run()
    assert one.backend.calls == []
    assert caught.value.exit_code == 128 + second
    assert caught.value.hint == "`orch logs -f r-1` picks it up, `orch stop r-1` stops it"


def test_a_second_one_while_it_is_stopping_kills(terminal) -> None:
    one = terminal()
    one.backend.on_stop = lambda kill: kill and [one.backend.ends(name, "stopped", 143) for name in ("n1", "n2")]
    one.types_when(("stopping the run", INT))
    one.type(INT)
    assert {each.state for each in one.run().values()} == {RunState.STOPPED}
    assert one.backend.calls == [("stop", False, ("n1", "n2")), ("stop", True, ("n1", "n2"))]


def test_a_third_one_detaches(terminal) -> None:
    one = terminal()
    one.types_when(("stopping the run", INT), ("killing the ranks", INT))
    one.type(INT)
    with pytest.raises(Detached, match="detached while the run is being stopped"):
        one.run()
    assert [call[:2] for call in one.backend.asked("stop")] == [("stop", False), ("stop", True)]


@pytest.mark.parametrize("signum", [TERM, HUP])
def test_term_and_hup_detach_at_once(terminal, signum: int) -> None:
    one = terminal()
    one.type(signum)
    with pytest.raises(Detached) as caught:
        one.run()
    assert caught.value.exit_code == 128 + signum and one.backend.calls == []
    assert one.attachment._closing.is_set()


def test_a_run_that_ends_in_the_meantime_is_not_stopped(terminal, monkeypatch) -> None:
    monkeypatch.setattr(attach, "SECOND_CTRL_C_S", 10.0)
    one = terminal(("n1",))
    one.on_tell = lambda text: one.backend.ends("n1")
    one.type(INT)
    assert one.run()["n1"].state is RunState.SUCCEEDED
    assert one.backend.calls == []


def test_a_closed_pipe_detaches(terminal) -> None:
    one = terminal()

    def broken(data: bytes) -> None:
        raise BrokenPipeError

    one.sink._write = broken
    with pytest.raises(Detached, match="nobody reads the output any more") as caught:
        one.run()
    assert caught.value.exit_code == 129 and one.backend.calls == []


def test_a_node_that_cannot_be_asked_to_stop_is_named(terminal) -> None:
    one = terminal()
    one.backend.errors = {"n2": ConnectionLost("the connection broke", node="n2")}
    told = threading.Event()
    one.on_tell = lambda text: told.set() if text.startswith("could not") else None
    one.backend.on_stop = lambda kill: [one.backend.ends(name, "stopped", 143) for name in ("n1", "n2")]
    one.type(INT)
    one.run()
    assert told.wait(5)
    assert ("n2", "could not be asked to stop: the connection broke") in one.told


def test_logs_that_drop_are_told_of(terminal, new_line) -> None:
    one = terminal(("n1",))
    cut = new_line(b"0\tone\n", ConnectionLost("cut"))
    one.backend.logs["n1"] = [cut, new_line(b"0\ttwo\n", b"")]
    one.backend.ends("n1")
    one.run()
    assert one.backend.offsets == [0, 6]
    assert one.told == [
        ("n1", "log connection dropped (cut); reconnecting"),
        ("n1", "log connection is back; no line was lost"),
    ]
    assert bytes(one.written).count(b"one") == bytes(one.written).count(b"two") == 1
