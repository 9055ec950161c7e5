"""What is stopped and what is refused: an engine is only ours if everything about its process agrees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import DeadlineError, PreflightError
from orchestrator.sim import engine, process

# A stand-in for dockerd: says that it is ready, then waits to be told to end.
WAIT = "import sys; print('up', flush=True); sys.stdin.read()"
FOREVER = "import signal; signal.pause()"


def start(tmp_path: Path, argv: list[str]) -> engine.Started:
    return engine.start_by_hand(
        argv, root=str(tmp_path / "root"), run_dir=str(tmp_path / "run"), log=tmp_path / "log", record=tmp_path / "rec"
    )


@pytest.fixture(autouse=True)
def no_engine_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_answers_elsewhere", lambda ours: True)


def test_the_engine_we_started_is_stopped_and_forgotten(tmp_path: Path) -> None:
    started = start(tmp_path, [sys.executable, "-c", FOREVER])
    assert os.getsid(started.pid) == started.pid  # Ctrl-C of the terminal does not reach it
    said: list[str] = []
    assert engine.stop_ours(tmp_path / "rec", said.append) is True
    assert not (tmp_path / "rec").exists()
    assert str(started.pid) in said[0]
    assert engine.stop_ours(tmp_path / "rec", said.append) is False


@pytest.mark.parametrize("field, value", [("cmdline", ["dockerd"]), ("start_time", 1)])
def test_another_process_with_that_number_is_left_alone(tmp_path: Path, field: str, value: object) -> None:
    other = subprocess.Popen([sys.executable, "-c", WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        record = {"pid": other.pid, "start_time": engine._start_time(other.pid), "root": "/nowhere/a"}
        record |= {"cmdline": [sys.executable, "-c", WAIT], "run_dir": "/nowhere/b", "log": "x"}
        (tmp_path / "rec").write_text(json.dumps({**record, field: value}))
        assert engine.stop_ours(tmp_path / "rec", lambda text: None) is False
        assert other.poll() is None
    finally:
        other.communicate("")


def test_mounts_are_undone_from_the_deepest() -> None:
    table = "\n".join(
        [
            "/dev/vda / ext4 rw 0 0",
            "overlay /var/lib/docker/overlay2/aa/merged overlay rw 0 0",
            "tmpfs /var/lib/docker tmpfs rw 0 0",
            "x /var/lib/docker-other/y ext4 rw 0 0",
            r"x /var/lib/docker/with\040space/z ext4 rw 0 0",
        ]
    )
    assert engine.mounts_below(["/var/lib/docker"], table) == [
        "/var/lib/docker/overlay2/aa/merged",
        "/var/lib/docker/with space/z",
        "/var/lib/docker",
    ]


def test_too_little_disk_and_memory_are_named(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"too little disk: .* GB free at .*, 1000000 GB are needed"):
        engine.check_machine(tmp_path / "not" / "there", 10**15)
    with pytest.raises(PreflightError, match="too little memory: 2"):
        engine.check_machine(tmp_path, 1, memory=2 * 10**9)


@pytest.mark.parametrize(
    "problem, hint",
    [
        ("permission denied while trying to connect", "usermod -aG docker"),
        ("Cannot connect to the Docker daemon", "docker"),
    ],
)
def test_without_rights_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, problem: str, hint: str) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(engine, "_problem", lambda: problem)
    monkeypatch.setattr(engine.machine, "may_install", lambda: False)
    with pytest.raises(PreflightError) as caught:
        engine.ensure_engine(lambda text: None)
    assert hint in (caught.value.hint or "")


def test_a_remote_engine_is_never_replaced_by_a_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.9:2375")
    monkeypatch.setattr(engine, "_problem", lambda: "Cannot connect")
    with pytest.raises(PreflightError, match=r"DOCKER_HOST=tcp://192\.0\.2\.9:2375"):
        engine.ensure_engine(lambda text: None)


def test_run_turns_failures_into_one_line_and_keeps_the_last_lines() -> None:
    with pytest.raises(PreflightError, match="could not build it: the reason") as caught:
        process.run(["sh", "-c", "echo first >&2; echo the reason >&2; exit 3"], what="build it")
    assert caught.value.lines == ("first", "the reason")
    with pytest.raises(PreflightError, match="no program 'orch-no-such'"):
        process.run(["orch-no-such"])
    with pytest.raises(DeadlineError, match="no end after 0 s"):
        process.run(["sh", "-c", "exec sleep 30"], timeout=0.05)


def test_wait_until_names_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(process.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(process.time, "sleep", lambda seconds: None)
    with pytest.raises(DeadlineError, match="sshd on n1: still not there after 5 s"):
        process.wait_until(lambda: False, "sshd on n1", deadline=5)
