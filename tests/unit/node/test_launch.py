"""The launcher's decisions, without starting anything."""

from __future__ import annotations

import ast
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.node import launch
from orchestrator.node.launch import Launcher, Log, Rank, Refused

OWNED = [
    ("lo", "127.0.0.1"),
    ("eth0", "10.0.0.11"),
    ("eth0", "10.0.0.99"),
    ("eth1", "192.168.1.4"),
    ("eth1", "fd00::4"),
]


def test_the_launcher_needs_only_the_standard_library_of_python_3_9() -> None:
    source = Path(launch.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 9))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.11", "eth0"),
        ("10.0.0.99", "eth0"),
        ("fd00::4", "eth1"),
        ("fd00:0:0:0:0:0:0:4", "eth1"),
        ("127.0.0.1", "lo"),
        ("127.0.0.2", "lo"),
    ],
)
def test_the_interface_that_owns_the_address_is_found(address: str, name: str) -> None:
    assert launch.find_interface(address, OWNED) == name


def test_a_host_name_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.1.4", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert launch.find_interface("gpu1", OWNED) == "eth1"


@pytest.mark.parametrize("own", ["127.0.0.1", "127.0.1.1"])
def test_a_host_name_that_is_only_loopback_here_is_refused(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (own, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    with pytest.raises(Refused, match=rf"no interface of this node owns gpu1 \({own} here\)"):
        launch.find_interface("gpu1", OWNED)


def test_an_address_that_nothing_owns_names_what_there_is() -> None:
    with pytest.raises(Refused) as caught:
        launch.find_interface("203.0.113.9", OWNED)
    assert caught.value.code == 4
    assert "203.0.113.9" in str(caught.value) and "10.0.0.99 on eth0, 192.168.1.4 on eth1" in str(
        caught.value
    )
    assert "127.0.0.1" not in str(caught.value)
    assert "private:" in caught.value.hint


def test_this_machines_own_addresses_are_found() -> None:
    found = launch.interfaces()
    assert ("lo", "127.0.0.1") in found
    names = {name for _, name in socket.if_nameindex()}
    assert {name for name, _ in found} <= names


def test_a_taken_port_is_refused_and_names_its_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(Refused, match=f"port {port} is taken") as caught:
            launch.check_port(port)
    assert caught.value.code == 4 and "run.port" in caught.value.hint
    launch.check_port(port)


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (["-m", "pkg", "x"], [sys.executable, "-m", "pkg", "x"]),
        (["train.py", "--lr", "1"], [sys.executable, "train.py", "--lr", "1"]),
        (["script", "a b"], [sys.executable, "script", "a b"]),
        (["python3", "train.py"], [sys.executable, "train.py"]),
        (["./run.sh", "$x"], ["./run.sh", "$x"]),
        (["sh", "-c", "x"], ["/bin/sh", "-c", "x"]),
    ],
)
def test_what_a_command_runs(
    command: list[str], argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/bin")
    for name, mode in (("train.py", 0o644), ("script", 0o644), ("run.sh", 0o755)):
        (tmp_path / name).touch(mode)
    assert launch.resolve(command) == (argv, "")


def test_a_missing_script_is_said_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.py").touch()
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/.dockerenv")
    _, why = launch.resolve(["train.py"])
    assert why == f"train.py: not in the image (working directory {tmp_path} has: main.py)"
    assert launch.resolve(["no-such-program"])[1] == "no-such-program: no such program in the image"


def test_a_full_disk_costs_lines_and_says_so(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"))
    disk, log.file = log.file, os.open("/dev/full", os.O_WRONLY)
    log.put(b"0\tone\n0\ttwo\n")
    log.flush()
    os.close(log.file)
    log.file = disk
    log.put(b"0\tthree\n")
    log.flush()
    assert (tmp_path / "log").read_bytes() == b"-\tthe log lost 2 lines: it could not be written\n0\tthree\n"


def test_the_index_says_where_in_the_log_a_second_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, clock = Log(str(tmp_path / "log")), [100.5]
    monkeypatch.setattr(launch.time, "time", lambda: clock[0])
    for moment in (100.5, 100.9, 103.0, 102.0, 104.2):
        clock[0] = moment
        log.put(b"0\tx\n")
        log.flush()
    assert (tmp_path / "log.index").read_text() == "100 0\n103 8\n104 16\n"


def test_the_first_error_event_of_this_attempt_counts(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    rows: list[dict[str, Any]] = [
        {"kind": "error", "attempt": 1, "type": "Old", "message": "", "time": 1.0},
        {"kind": "step", "attempt": 2, "loss": 1.0},
        {
            "kind": "error",
            "attempt": 2,
            "type": "NaN",
            "message": "loss",
            "traceback": "tb",
            "time": 1700000000.5,
        },
        {"kind": "error", "attempt": 2, "type": "Later", "message": "", "time": 1700000001},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "error", "att')
    expected = {"type": "NaN", "message": "loss", "traceback": "tb", "time_ns": 1700000000500000000}
    assert launch.event_error(str(path), 2) == expected
    assert launch.event_error(str(path), 3) == {}
    assert launch.event_error(str(tmp_path / "none"), 1) == {}


# ---- how a rank's end and a node's end are read ------------------------------------------------


def rank(code: int, ended: int = 100, number: int = 0, output: bytes = b"", **values: Any) -> Rank:
    made = Rank({"rank": number, "local_rank": number, "started_ns": 1}, None, [])
    made.code, made.ended_ns = code, ended
    made.lines.feed(output, 0.0)
    if made.lines.tracebacks.last:
        made.lines.tracebacks.last["time_ns"] = values.pop("seen", ended - 1)
    for name, value in values.items():
        setattr(made, name, value)
    return made


BOOM = b'Traceback (most recent call last):\n  File "a.py", line 1\nValueError: boom\n'
SECOND = 10**9


@pytest.mark.parametrize(
    ("it", "kind", "message"),
    [
        (rank(1, output=BOOM), "ValueError", "boom"),
        (rank(3, output=b"no disk\n"), "ExitCode", "exit code 3: no disk"),
        (rank(-9), "SIGKILL", "killed by SIGKILL"),
        (rank(-9, oom=True), "OutOfMemory", "killed by the kernel: out of memory"),
        (rank(-11, output=BOOM), "SIGSEGV", "killed by SIGSEGV"),
        (rank(-6, output=BOOM), "ValueError", "boom"),
        (rank(3, 99 * SECOND, output=BOOM, seen=SECOND), "ExitCode", "exit code 3: ValueError: boom"),
        (rank(1, ordered="peer", output=BOOM), "ValueError", "boom"),
        (rank(127, missing="train.py: not in the image"), "ExitCode", "train.py: not in the image"),
    ],
)
def test_a_ranks_own_error(it: Rank, kind: str, message: str) -> None:
    error = it.error("/none", 1)
    assert (error["type"], error["message"]) == (kind, message)


@pytest.mark.parametrize(
    "it",
    [
        rank(0, output=BOOM),
        rank(75),
        rank(-15, ordered="peer"),
        rank(-9, ordered="stop"),
        rank(1, ordered="stop"),
    ],
)
def test_a_rank_that_was_told_to_end_has_no_error_of_its_own(it: Rank) -> None:
    assert it.error("/none", 1) == {}


def outcome(tmp_path: Path, *ranks: Rank, stop: str = "", procs: int = 2, **values: Any) -> tuple[str, int]:
    job = {
        "index": 0,
        "nodes": 1,
        "launcher": "torchrun",
        "procs": procs,
        "torchrun": [],
        "stop": stop or "file",
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    it = Launcher(str(tmp_path))
    it.ranks = {number: each for number, each in enumerate(ranks)}
    for number, each in it.ranks.items():
        each.rank = number
    if stop:
        it.stop_at, it.stop_ns, it.stop_stage = 1.0, 50, values.pop("stage", "file")
    it.agent_code = values.pop("agent", 0)
    for name, value in values.items():
        setattr(it, name, value)
    errors = {each.rank: error for each in ranks if (error := each.error("/none", 1))}
    return it.outcome(errors)[:2]


def test_how_a_node_ends(tmp_path: Path) -> None:
    ok, told, boom = rank(0), rank(-15, ordered="stop"), rank(1, output=BOOM)
    assert outcome(tmp_path, rank(0), ok) == ("succeeded", 0)
    assert outcome(tmp_path, rank(75), rank(75)) == ("preempted", 75)
    assert outcome(tmp_path, rank(75, 90), rank(-6, 100)) == ("preempted", 75)
    assert outcome(tmp_path, rank(1, 90, output=BOOM), rank(75, 100)) == ("failed", 1)
    assert outcome(tmp_path, boom, rank(-15, ordered="peer")) == ("failed", 1)
    assert outcome(tmp_path, rank(127, missing="x")) == ("failed", 127)
    assert outcome(tmp_path, told, rank(-9, ordered="stop"), stop="signal", stage="term") == ("stopped", 143)
    assert outcome(tmp_path, rank(0), rank(0), stop="signal", stage="term") == ("stopped", 143)
    assert outcome(tmp_path, rank(0, 40), rank(0, 41), stop="signal", stage="term") == ("succeeded", 0)
    assert outcome(tmp_path, rank(0), rank(0), stop="file") == ("succeeded", 0)
    assert outcome(tmp_path, boom, told, stop="file") == ("failed", 1)
    assert outcome(tmp_path, rank(1, 40, output=BOOM), told, stop="signal", stage="term") == ("failed", 1)
    assert outcome(tmp_path, stop="signal") == ("stopped", 143)
    assert outcome(tmp_path, refused=Refused(4, "no interface")) == ("failed", 4)
    assert outcome(tmp_path, rank(0), agent=1) == ("failed", 1)


def test_torchruns_own_failures_are_worded(tmp_path: Path) -> None:
    outcome(tmp_path, rank(0))
    it = Launcher(str(tmp_path))
    it.endpoint, it.agent_code = "10.0.0.1:29400", 1
    it.agent_lines.feed(
        BOOM.replace(b"ValueError: boom", b"ModuleNotFoundError: No module named 'torch'"), 0.0
    )
    failure = it.agent_failure()
    assert failure.code == 127 and "torch is not installed" in str(failure)
    it.agent_lines.feed(BOOM.replace(b"ValueError: boom", b"a.b.RendezvousTimeoutError: too late"), 0.0)
    assert str(it.agent_failure()) == "rendezvous at 10.0.0.1:29400: too late"
    it.ranks = {0: rank(-15, ordered="peer")}
    assert "connection closed" in str(it.agent_failure())
    it.agent_lines.feed(BOOM, 0.0)
    assert str(it.agent_failure()) == "torchrun ended with exit code 1: ValueError: boom"
    it.agent_lines, it.agent_code = launch.Lines("-", []), -9
    assert str(it.agent_failure()) == "torchrun was killed by SIGKILL"


def test_a_run_folder_that_cannot_be_read_is_exit_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main([str(tmp_path)]) == 4
    assert "job.json" in capsys.readouterr().err
    (tmp_path / "job.json").write_text("{")
    assert launch.main([str(tmp_path)]) == 4
