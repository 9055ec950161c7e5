from __future__ import annotations

import json
import threading
import time

import pytest

from trainer.events import Events
from trainer.watchdog import Watchdog


@pytest.fixture
def make(tmp_path):
    made = []

    def build(factor=5.0, floor=0.05):
        events = Events(tmp_path, 3, 1)
        made.append(Watchdog(tmp_path, 3, events, factor=factor, floor=floor))
        return made[-1], events

    yield build
    for watchdog in made:
        watchdog.close()


def _hangs(events):
    return [row for row in map(json.loads, events.path.read_text().splitlines()) if row["kind"] == "hang"]


def _until(events, count, deadline=5.0):
    end = time.monotonic() + deadline
    while len(_hangs(events)) < count:
        assert time.monotonic() < end, f"no hang number {count} within {deadline} s"
        time.sleep(0.005)


def the_function_that_hangs(release):
    release.wait(10)


def test_stacks_of_all_threads_once_per_hang(make, tmp_path, capsys):
    watchdog, events = make()
    release = threading.Event()
    thread = threading.Thread(target=the_function_that_hangs, args=(release,))
    thread.start()
    watchdog.step(0.001)
    events.step = 1
    _until(events, 1)
    time.sleep(0.12)
    (hang,) = _hangs(events)
    text = (tmp_path / "stacks" / "rank-3.txt").read_text()
    assert "the_function_that_hangs" in text and "test_watchdog.py" in text and "after step 1" in text
    assert hang["seconds"] >= 0.05 and hang["file"] == str(tmp_path / "stacks" / "rank-3.txt")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rank 3: no step for" in error
    watchdog.step(0.001)
    _until(events, 2)
    release.set()
    thread.join()


def test_not_before_the_first_step_nor_within_a_pause(make):
    watchdog, events = make(floor=0.02)
    time.sleep(0.1)
    with watchdog.pause():
        time.sleep(0.06)
    time.sleep(0.06)
    assert _hangs(events) == []
    watchdog.step(0.001)
    with watchdog.pause():
        with watchdog.pause():
            time.sleep(0.04)
        time.sleep(0.06)
    assert _hangs(events) == []
    _until(events, 1)


def test_steps_in_time_are_no_hang(make):
    watchdog, events = make(floor=0.2)
    for _ in range(30):
        watchdog.step(0.01)
        time.sleep(0.01)
    assert _hangs(events) == []


def test_limit_follows_the_median_without_the_first_step(make):
    watchdog, _ = make(factor=10, floor=1)
    watchdog.step(60)  # compilation
    assert watchdog.limit == 600
    for seconds in (2, 3, 1, 2, 50):
        watchdog.step(seconds)
    assert watchdog.limit == 20
    for _ in range(10):
        watchdog.step(0.001)
    assert watchdog.limit == 1


def test_never_with_factor_0(make):
    watchdog, events = make(factor=0, floor=0.01)
    watchdog.step(0.001)
    time.sleep(0.05)
    assert _hangs(events) == [] and not any(thread.name == "watchdog" for thread in threading.enumerate())
