"""The history of runs: what is kept, found, and what happens when its file is not what it should be."""

from __future__ import annotations

import logging
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from orchestrator.errors import UsageError
from orchestrator.runs import History, Record, default_path
from orchestrator.specs import Node, Run, RunState, Storage


def record(run_id: str, started: float = 1.0, **more) -> Record:
    run = Run(run_id, "job", RunState.RUNNING, "ssh", ("n1", "n2"), started, image="r@sha256:1")
    nodes = (Node("n1", "h1", labels={"a": "b"}, gpus=2), Node("n2", "h2", user="u", port=2222, known_hosts="/kh"))
    return Record(run, nodes, run_dir="~/.orch/runs/x", operator="me@here", target="sim", inventory="/i.yaml", **more)


@pytest.fixture
def history(tmp_path):
    opened = History.open(tmp_path / "state" / "runs.sqlite")
    yield opened
    opened.close()


def test_a_record_comes_back_as_it_was(history):
    kept = record(
        "a $(x) 'q'\n",
        storage=Storage("shared", "/s", None, "/c"),
        spec={"command": ["a b", "$(c)"]},
        dirs={"n1": "/d"},
    )
    history.record(kept)
    assert history.get(kept.run.id) == kept
    assert history.get("a") is None


def test_update_changes_only_what_changes(history):
    kept = record("a")
    history.record(kept)
    history.update(kept.run.at(RunState.FAILED, exit_code=1, ended=5.0))
    history.update(record("unknown").run)
    assert history.get("a") == kept.at(RunState.FAILED, exit_code=1, ended=5.0)
    assert len(history.list()) == 1


def test_newest_first_and_limit(history):
    for number in (2, 3, 1):
        history.record(record(f"r{number}", float(number)))
    assert [each.run.id for each in history.list()] == ["r3", "r2", "r1"]
    assert [each.run.id for each in history.list(2)] == ["r3", "r2"]


def test_find(history):
    with pytest.raises(UsageError, match="there is no run yet"):
        history.find()
    for run_id, started in (("job-1", 1.0), ("job-12", 2.0), ("other_%", 0.0)):
        history.record(record(run_id, started))
    assert history.find().run.id == "job-12"
    assert history.find("job-1").run.id == "job-1"  # exact beats prefix
    assert history.find("ot").run.id == "other_%"
    with pytest.raises(UsageError, match="'job' begins 2 runs") as caught:
        history.find("job")
    assert caught.value.lines == ("job-12", "job-1") and caught.value.exit_code == 2
    for nothing in ("x", "%", "other__", "JOB-1"):
        with pytest.raises(UsageError, match="no run begins with"):
            history.find(nothing)


def test_delete(history):
    history.record(record("a"))
    history.delete("a")
    history.delete("a")
    assert history.list() == []


def test_the_latest_is_the_latest_that_was_started(history):
    history.record(record("a", 1.0))
    history.record(replace(record("b", 2.0), started=False))
    assert history.find(None).run.id == "a"
    assert history.find("b").started is False


def test_the_folder_and_the_file_are_private(history):
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.path.parent.stat().st_mode) == 0o700


def test_default_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("ORCH_STATE", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert str(default_path()) == "/home/me/.local/state/orch/runs.sqlite"
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert str(default_path()) == "/xdg/orch/runs.sqlite"
    monkeypatch.setenv("ORCH_STATE", "~/o")
    assert str(default_path()) == "/home/me/o/runs.sqlite"


@pytest.mark.parametrize("content", [b"this is not a database, it only looks like a file" * 40, "table"])
def test_a_damaged_file_is_set_aside_with_a_warning(tmp_path, caplog, content):
    path = tmp_path / "runs.sqlite"
    if content == "table":
        history = History.open(path)
        history.record(record("old"))
        history.close()
        damaged = bytearray(path.read_bytes())
        damaged[100:4096] = b"\xff" * 3996
        path.write_bytes(damaged)
        for extra in tmp_path.glob("runs.sqlite-*"):
            extra.unlink()
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "orch"):
        history = History.open(path)
    history.record(record("a"))
    assert history.path == path and history.find().run.id == "a"
    assert len(list(tmp_path.glob("runs.sqlite.damaged-*"))) == 1
    assert "was damaged" in caplog.text


def test_an_unusable_folder_costs_a_warning_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "orch"):
        history = History.open(tmp_path / "file" / "runs.sqlite")
    history.record(record("a"))
    assert history.path is None and history.find().run.id == "a"
    assert "going on without it" in caplog.text


def test_a_newer_history_is_left_alone(tmp_path, caplog):
    path = tmp_path / "runs.sqlite"
    History.open(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with caplog.at_level(logging.WARNING, "orch"):
        history = History.open(path)
    assert history.path is None and "of a newer orch" in caplog.text
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (99,)


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "runs.sqlite"
    code = (
        "import sys, pathlib\n"
        "from orchestrator.runs import *\n"
        "from orchestrator.specs import *\n"
        "history = History.open(pathlib.Path(sys.argv[1]))\n"
        "assert history.path\n"
        "for i in range(20):\n"
        "    run = Run(f'{sys.argv[2]}-{i}', 'j', RunState.RUNNING, 'ssh', ('n',), float(i))\n"
        "    history.record(Record(run)); history.update(run.at(RunState.FAILED))\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(number)], stderr=subprocess.PIPE)
        for number in range(4)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert (writer.returncode, errors) == (0, b"")
    assert len(History.open(path).list()) == 80
