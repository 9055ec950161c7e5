"""INT, TERM and HUP: raised before the start, noted after it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from orchestrator.errors import Interrupted
from orchestrator.workflows.signals import Signals

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("signum", ALL)
def test_before_the_start_a_signal_interrupts(signum: int) -> None:
    with Signals(), pytest.raises(Interrupted) as caught:
        signal.raise_signal(signum)
    assert caught.value.exit_code == 128 + signum
    assert caught.value.message == f"interrupted by {signal.Signals(signum).name}"


def test_a_second_signal_does_not_break_the_rollback() -> None:
    with Signals() as signals:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert [signals.take(), signals.take(), signals.take()] == [signal.SIGINT, signal.SIGTERM, None]


def test_held_signals_are_noted_in_order() -> None:
    with Signals() as signals:
        signals.hold()
        assert signals.take() is None
        for signum in ALL:
            os.kill(os.getpid(), signum)
        assert signals.arrived.is_set()
        assert [signals.take() for _ in ALL] == ALL
        assert signals.take() is None and not signals.arrived.is_set()


def test_the_handlers_that_were_there_come_back() -> None:
    before = [signal.getsignal(each) for each in ALL]
    with pytest.raises(ValueError, match="x"), Signals():
        assert all(signal.getsignal(each) not in before for each in ALL)
        raise ValueError("x")
    assert [signal.getsignal(each) for each in ALL] == before


def test_in_another_thread_it_does_nothing() -> None:
    before = [signal.getsignal(each) for each in ALL]
    seen = []

    def work() -> None:
        with Signals():
            seen.extend(signal.getsignal(each) for each in ALL)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before
