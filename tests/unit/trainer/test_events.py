from __future__ import annotations

import json
import math
import threading

from trainer.events import Events


def _rows(events: Events) -> list[dict]:
    return [json.loads(line) for line in events.path.read_text(encoding="utf-8").splitlines()]


def test_header_and_fields(tmp_path):
    events = Events(tmp_path, 3, 2, clock=lambda: 12.3456789)
    events.step = 7
    events.emit("eval", loss=1.5, note="naïve\nline")
    assert _rows(events) == [
        {
            "schema": 1,
            "kind": "eval",
            "time": 12.345679,
            "attempt": 2,
            "rank": 3,
            "step": 7,
            "loss": 1.5,
            "note": "naïve\nline",
        }
    ]
    assert events.path.name == "rank-3.jsonl" and events.path.read_text().count("\n") == 1


def test_values_that_are_not_json_become_null(tmp_path):
    events = Events(tmp_path, 0, 1)
    events.emit("step", loss=math.nan, grad_norm=math.inf, lr=-math.inf)
    assert [_rows(events)[0][key] for key in ("loss", "grad_norm", "lr")] == [None, None, None]


def test_surrogates_do_not_stop_the_stream(tmp_path):
    events = Events(tmp_path, 0, 1)
    events.emit("error", message="\udcff bad")
    assert _rows(events)[0]["message"].endswith("bad")


def test_second_attempt_appends(tmp_path):
    for attempt in (1, 2):
        events = Events(tmp_path, 0, attempt)
        events.emit("start")
        events.close()
    assert [row["attempt"] for row in _rows(events)] == [1, 2]


def test_lines_of_several_threads_stay_whole(tmp_path):
    events = Events(tmp_path, 0, 1)

    def write(name: str) -> None:
        for index in range(200):
            events.emit("step", name=name * 50, index=index)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = _rows(events)
    for letter in "abcd":
        assert [row["index"] for row in rows if row["name"] == letter * 50] == list(range(200))


def test_heartbeats_until_close(tmp_path):
    events = Events(tmp_path, 0, 1)
    events.heartbeats(0.001)
    while not events.path.read_text():
        pass
    events.close()
    assert {row["kind"] for row in _rows(events)} == {"heartbeat"}
    size = events.path.stat().st_size
    events.emit("step")
    assert events.path.stat().st_size == size


def test_error_has_type_message_and_traceback(tmp_path):
    events = Events(tmp_path, 0, 1)
    try:
        raise KeyError("gone")
    except KeyError as error:
        events.error(error)
    row = _rows(events)[0]
    assert row["type"] == "KeyError" and row["message"] == "'gone'" and "raise KeyError" in row["traceback"]
