"""Watching: ends, failures that stop the others, silence, reconnection, loss."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from orchestrator.backends.base import Found
from orchestrator.errors import ConnectError, ConnectionLost, DeadlineError, OrchError, RemoteError
from orchestrator.specs import RankError, RankResult, Run, RunState
from orchestrator.workflows.watch import Timing, Watch

TIMING = Timing(heartbeat=20.0, lost=45.0, grace=1.0, kill=4.0, graceful=30.0, pause=0.001)


@pytest.fixture
def start(scripted, clock) -> Iterator:
    """start(backend, …) → (watch, what it told); all are closed in the end."""
    made: list[Watch] = []

    def begin(backend, **changes) -> tuple[Watch, list[tuple[str, str]]]:
        told: list[tuple[str, str]] = []
        values = {"timing": TIMING, "clock": clock} | changes
        watch = Watch(backend, backend.found, backend.nodes, lambda *each: told.append(each), **values)
        made.append(watch)
        watch.start()
        return watch, told

    yield begin
    for watch in made:
        watch.close()


def test_all_end_well(scripted, start, until) -> None:
    backend = scripted()
    watch, told = start(backend)
    backend.ends("n2")
    until(lambda: "n2" in watch.results, lambda: watch.step(0.001))
    assert not watch.done
    backend.ends("n1")
    until(lambda: watch.done, lambda: watch.step(0.001))
    assert {name: each.state.value for name, each in watch.results.items()} == {"n1": "succeeded", "n2": "succeeded"}
    assert (told, backend.calls, watch.failed_node) == ([], [], None)
    assert backend.line("n1").closed


def test_the_first_failure_stops_the_others(scripted, start, until, clock) -> None:
    backend = scripted(("n1", "n2", "n3"))
    watch, told = start(backend)
    error = RankError(3, "ValueError", "bad", "", 5)
    victim = RankError(2, "RuntimeError", "closed", "", 1)
    ranks = (RankResult(2, 0, -15, error=victim), RankResult(3, 1, 1, error=error))
    backend.ends("n2", "failed", 1, ranks=ranks)
    until(lambda: watch.failed_node, lambda: watch.step(0.001))
    assert told == [("n2", "failed: rank 3: ValueError; stopping the other nodes")]
    clock.now += 0.9
    watch.step(0.001)
    assert backend.calls == []  # they may still say why themselves
    clock.now += 0.2
    watch.step(0.001)
    until(lambda: backend.calls)
    assert backend.calls == [("stop", True, ("n1", "n3"))]
    backend.ends("n1", "stopped", 143)
    until(lambda: "n1" in watch.results, lambda: watch.step(0.001))
    clock.now += 3.9
    watch.step(0.001)
    assert len(backend.calls) == 1  # asked once
    clock.now += 0.2
    watch.step(0.001)
    until(lambda: len(backend.calls) == 2)
    assert backend.calls[-1] == ("end", ("n3",))
    clock.now += 100
    watch.step(0.001)
    backend.ends("n3", "failed", 1)
    until(lambda: watch.done, lambda: watch.step(0.001))
    assert len(backend.calls) == 2 and watch.failed_node == "n2"


def test_the_default_times_keep_the_promise_of_five_seconds() -> None:
    timing = Timing()
    assert timing.grace + timing.kill <= 5.0


@pytest.mark.parametrize(("state", "code"), [("preempted", 75), ("stopped", 143)])
def test_a_graceful_end_gives_the_others_time_for_their_checkpoint(
    scripted, start, until, clock, state: str, code: int
) -> None:
    backend = scripted()
    watch, told = start(backend)
    backend.ends("n1", state, code)
    until(lambda: watch.failed_node, lambda: watch.step(0.001))
    clock.now += 29
    watch.step(0.001)
    assert (backend.calls, told) == ([], [])
    clock.now += 2
    watch.step(0.001)
    until(lambda: backend.calls)
    assert backend.calls == [("stop", True, ("n2",))]


def test_a_mere_reader_stops_nobody(scripted, start, until, clock) -> None:
    backend = scripted()
    watch, told = start(backend, stop_others=False)
    backend.ends("n1", "failed", 1, reason="x")
    until(lambda: watch.results, lambda: watch.step(0.001))
    clock.now += 1000
    watch.step(0.001)
    assert (backend.calls, told) == ([], [])


def test_a_success_lets_the_others_go_on(scripted, start, until, clock) -> None:
    backend = scripted()
    watch, _ = start(backend)
    backend.ends("n1")
    until(lambda: watch.results, lambda: watch.step(0.001))
    clock.now += 1000
    watch.step(0.001)
    assert backend.calls == []


def test_silence_is_a_dropped_connection_and_a_new_one_is_made(scripted, start, until, new_line) -> None:
    backend = scripted(("n1",))
    backend.watches["n1"] = [new_line(b".", None), ConnectError("refused"), new_line(b".")]
    watch, told = start(backend)
    until(lambda: len(told) == 2, lambda: watch.step(0.001))
    assert told == [
        ("n1", "not answering (no heartbeat for 20 s); trying for 45 s"),
        ("n1", "answering again"),
    ]
    assert backend.watches["n1"][0].closed
    backend.ends("n1")
    until(lambda: watch.done, lambda: watch.step(0.001))
    assert watch.results["n1"].state is RunState.SUCCEEDED


@pytest.mark.parametrize(
    "error", [ConnectError("no route"), ConnectionLost("reset"), DeadlineError("no answer within 15 s")]
)
def test_a_node_that_stays_away_is_lost(scripted, start, until, clock, error) -> None:
    backend = scripted(("n1", "n2"))
    backend.watches["n1"] = [error]
    watch, told = start(backend)
    until(lambda: backend.opened["n1"] > 2, lambda: watch.step(0.001))
    assert watch.results == {}
    clock.now += 46
    until(lambda: "n1" in watch.results, lambda: watch.step(0.001))
    result = watch.results["n1"]
    assert (result.state, result.exit_code) == (RunState.LOST, 3)
    assert result.reason == f"the node is lost: {error.message}" and "resume" in result.hint
    assert result.ended_ns > 0
    assert told[0] == ("n1", f"not answering ({error.message}); trying for 45 s")
    assert told[1] == ("n1", f"lost: {result.reason}; stopping the other nodes")


def test_outages_are_not_added_up(scripted, start, until, clock, new_line) -> None:
    """A connection that is cut now and then over hours is not a lost node."""
    backend = scripted(("n1",))
    backend.watches["n1"] = [new_line(b".", ConnectionLost("cut")) for _ in range(12)] + [new_line(b".")]
    watch, told = start(backend)
    for cuts in range(1, 13):
        until(lambda cuts=cuts: backend.opened["n1"] > cuts, lambda: watch.step(0.001))
        clock.now += 44
    assert watch.results == {}
    backend.ends("n1")
    until(lambda: watch.done, lambda: watch.step(0.001))
    assert watch.results["n1"].state is RunState.SUCCEEDED
    assert [text for _, text in told if text == "answering again"]


def test_an_end_without_a_report_is_no_end(scripted, start, until, new_line) -> None:
    """The shell there was killed with its sshd: neither a result nor a reason to ask without pause or end."""
    backend = scripted(("n1",))
    backend.watches["n1"] = [new_line(b".", b""), new_line(b"."), new_line(b"")]
    watch, told = start(backend)
    until(lambda: told, lambda: watch.step(0.001))
    assert told[0] == ("n1", "not answering (the heartbeat ended without a report); trying for 45 s")
    assert watch.results == {}


def test_a_report_that_the_run_goes_on_is_no_end(scripted, start, until, new_line) -> None:
    backend = scripted(("n1",))
    backend.watches["n1"] = [new_line(b".\nthe report of n1", b""), new_line(b".")]
    watch, told = start(backend)
    until(lambda: backend.opened["n1"] == 2, lambda: watch.step(0.001))
    assert (watch.results, told) == ({}, [])
    backend.ends("n1")
    until(lambda: watch.done, lambda: watch.step(0.001))


def test_a_report_may_come_in_pieces(scripted, start, until, new_line) -> None:
    backend = scripted(("n1",))
    watch, _ = start(backend)
    backend.ends("n1")  # prepares the result
    backend.watches["n1"][0].acts = new_line(b"..", b".\nthe re", b"port of ", b"n1", b"").acts
    until(lambda: watch.done, lambda: watch.step(0.001))


@pytest.mark.parametrize("error", [RemoteError("sh: not found"), ValueError("a bug")])
def test_what_cannot_be_mended_ends_the_watch_of_that_node(scripted, start, until, error) -> None:
    """Also a bug: a thread that ended without a word would keep the operator waiting for ever."""
    backend = scripted(("n1",))
    backend.watches["n1"] = [error]
    watch, _ = start(backend)
    until(lambda: watch.done, lambda: watch.step(0.001))
    assert watch.results["n1"].state is RunState.LOST and str(error) in watch.results["n1"].reason


def test_closing_ends_the_threads(scripted, start, until) -> None:
    before = set(threading.enumerate())
    backend = scripted(("n1", "n2"))
    watch, _ = start(backend, timing=Timing(heartbeat=0.01, pause=0.001))
    mine = set(threading.enumerate()) - before
    assert {thread.name for thread in mine} == {"watch-n1", "watch-n2"}
    watch.close()
    until(lambda: not any(thread.is_alive() for thread in mine))
    assert watch.results == {}


def test_an_order_to_end_that_does_not_arrive_is_told() -> None:
    told: list[tuple[str, str]] = []
    found = Found(Run("r-1", "r", RunState.RUNNING, "ssh", ("n1",), 0.0), {"n1": "/r"})
    watched = Watch(None, found, (), lambda node, text: told.append((node, text)))
    watched._in_background(lambda: {"n1": OrchError("no space left")})
    watched._requests[0].join(5)
    assert told == [("n1", "could not be told to end its ranks: no space left")]
