"""What a node says of a run: reading, judging, waiting, tailing, fetching; on real shells."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.commands import docker, report
from orchestrator.commands.report import Report, parse_read, verdict
from orchestrator.specs import RunState

RESULT = {
    "schema": 1,
    "run": "r-1",
    "attempt": 1,
    "node": "n1",
    "index": 0,
    "host": "box",
    "state": "failed",
    "exit_code": 1,
    "started_ns": 10,
    "ended_ns": 20,
    "reason": "",
    "hint": "",
    "ranks": [
        {
            "rank": 0,
            "local_rank": 0,
            "exit_code": 1,
            "started_ns": 11,
            "ended_ns": 19,
            "error": {"type": "ValueError", "message": "x\u2028orch.y", "traceback": "T", "time_ns": 18},
            "last_lines": ["a", "orch.state running"],
        }
    ],
}

# recorded on a node of the simulated cluster: the image had no python3
EXITED = """\
orch.clock 1795219169954804177
orch.text tail
[FATAL tini (7)] exec python3 failed: No such file or directory

orch.end
orch.state exited
orch.code 127
orch.oom false
orch.error 
orch.engine 
orch.whole yes
"""  # noqa: W291
STATE = "state=exited code=1 oom=false"


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def write_result(machine, text: str) -> None:
    (machine.home / "r").mkdir(exist_ok=True)
    (machine.home / "r/result.json").write_text(text)


# -- read ------------------------------------------------------------------------------------


def test_a_recorded_answer() -> None:
    found = parse_read(EXITED)
    assert (found.state, found.exit_code, found.result, found.oom) == ("exited", 127, None, False)
    assert found.tail == ("[FATAL tini (7)] exec python3 failed: No such file or directory", "")
    done = verdict(found, "n1", 0)
    assert done and (done.state, done.exit_code, done.reason) == (RunState.FAILED, 127, "python3 is not in the image")
    assert done.ranks[0].last_lines == found.tail


def test_result_and_clock(machine) -> None:
    write_result(machine, json.dumps(RESULT, ensure_ascii=False) + "\n")
    before = time.time_ns()
    done = machine.run(report.read("~/r", STATE))
    found = parse_read(done.stdout, before - 3 * 10**9, before - 3 * 10**9)
    assert (found.state, found.exit_code) == ("exited", 1)
    assert found.result and found.result.state is RunState.FAILED
    assert found.result.ranks[0].error and found.result.ranks[0].error.message == "x\u2028orch.y"
    assert 3e9 <= found.result.clock_offset_ns < 23e9
    assert parse_read(done.stdout).result.clock_offset_ns == 0  # without times nothing is made up


def test_an_answer_that_broke_off_says_nothing(machine) -> None:
    """At whatever byte it broke off; otherwise a lost connection would read as a failed launcher."""
    write_result(machine, json.dumps(RESULT) + "\n")
    text = machine.run(report.read("~/r", STATE)).stdout
    whole = parse_read(text)
    for cut in range(len(text) - 1):
        found = parse_read(text[:cut])
        assert found.state == "unknown" and verdict(found, "n1", 0) is None, text[:cut]
    assert parse_read(text[:-1]) == whole


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"state": "odd"}', json.dumps({**RESULT, "ranks": 3})])
def test_a_result_that_is_none(machine, text: str) -> None:
    write_result(machine, text)
    found = parse_read(machine.run(report.read("~/r", STATE)).stdout)
    assert (found.state, found.result) == ("exited", None)
    assert verdict(found, "n1", 0).reason == "the launcher ended with exit code 1 and left no result"


def test_errors_with_shell_in_them(machine) -> None:
    found = parse_read(machine.run(report.read("~/r", "state=exited code=-9 error='$(touch pwned) `x` \"y\"'")).stdout)
    assert (found.exit_code, found.start_error) == (-9, '$(touch pwned) `x` "y"')
    assert not (machine.home / "pwned").exists()


# -- verdict ---------------------------------------------------------------------------------


def said(state: str, code: int | None = None, **more: object) -> Report:
    return Report(state, code, None, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["running", "created", "restarting", "paused", "unknown"])
def test_no_verdict_on_a_run_that_may_live(state: str) -> None:
    assert verdict(said(state), "n1", 0) is None


@pytest.mark.parametrize(
    ("found", "state", "code", "reason"),
    [
        (said("unknown", engine_error="no answer"), "lost", 1, "the Docker engine stopped answering: no answer"),
        (said("gone"), "lost", 1, "the container or process is gone and left no result"),
        (said("exited", 137, oom=True), "failed", 1, "the launcher was killed (out of memory)"),
        (said("exited", 1, oom=True), "failed", 1, "the launcher was killed (out of memory)"),
        (said("exited", 137), "failed", 1, "the launcher was killed (SIGKILL, often"),
        (said("exited", 128, start_error="no such device"), "failed", 1, "the container did not start: no such device"),
        (said("exited", 255), "lost", 1, "the container died with its engine or machine (exit code 255)"),
        (said("exited", 127), "failed", 127, "python3 is not in the image"),
        (said("exited", 1, tail=("sh: python3: not found",)), "failed", 127, "python3 is not in the image"),
        (said("exited", 1), "failed", 1, "the launcher ended with exit code 1 and left no result"),
        (said("dead", None), "failed", 1, "the launcher ended with exit code None and left no result"),
    ],
)
def test_verdicts_without_a_result(found: Report, state: str, code: int, reason: str) -> None:
    done = verdict(found, "n2", 1, last_lines=("last",))
    assert done is not None
    assert (done.node, done.index, done.state.value, done.exit_code) == ("n2", 1, state, code)
    assert done.reason.startswith(reason) and done.hint
    assert done.ranks[0].rank == -1 and done.ranks[0].last_lines == (found.tail or ("last",))


def test_the_launchers_own_result_counts_whatever_the_engine_says(machine) -> None:
    write_result(machine, json.dumps({**RESULT, "state": "preempted", "exit_code": 75}))
    found = parse_read(machine.run(report.read("~/r", "state=gone engine='no answer'")).stdout)
    assert verdict(found, "n1", 0).state is RunState.PREEMPTED


# -- watch -----------------------------------------------------------------------------------


def members(session: int) -> list[str]:
    """The processes of a session that still live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def test_watch_beats_until_the_end_and_then_reports(machine) -> None:
    done = machine.run(report.watch("exec sleep 0.05", "echo the report"))
    beats, newline, text = done.stdout.partition("\n")
    assert (set(beats), newline, text) == ({"."}, "\n", "the report\n")


def test_watch_ends_with_its_reader(machine) -> None:
    """A second after the reader has gone nothing is left on the node, neither the waiter nor the beat."""
    machine.command("docker", "exec sleep 987")
    process = machine.popen(report.watch(docker.wait("~/r"), "echo the report"))
    assert process.stdout is not None and process.stdout.read(1) == b"."
    until(lambda: any("987" in each for each in members(process.pid)))
    process.stdout.close()
    try:
        until(lambda: not members(process.pid))
        process.wait(5)
    finally:
        with_group_killed(process)


def with_group_killed(process: subprocess.Popen[bytes]) -> None:
    if members(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(5)


# -- logs ------------------------------------------------------------------------------------


def test_log_of_an_ended_run(machine) -> None:
    (machine.home / "r").mkdir()
    assert machine.run(report.tail_log("~/r", 0, "0")).stdout == ""  # no log at all
    (machine.home / "r/log").write_text("0\tone\n1\ttwo\n")
    assert machine.run(report.tail_log("~/r", 0, "0")).stdout == "0\tone\n1\ttwo\n"
    assert machine.run(report.tail_log("~/r", 6, "0")).stdout == "1\ttwo\n"
    done = machine.run(report.tail_log("~/r", 12, "0"))
    assert (done.stdout, done.returncode) == ("", 0)


def test_log_of_a_live_run_is_read_to_its_very_end(machine) -> None:
    (machine.home / "r").mkdir()
    log = machine.home / "r/log"
    log.write_text("0\tone\n")
    job = subprocess.Popen(["sleep", "987"])
    process = machine.popen(report.tail_log("~/r", 2, f"$(echo {job.pid})"))
    assert process.stdout is not None
    try:
        assert os.read(process.stdout.fileno(), 100) == b"one\n"
        with log.open("a") as file:
            file.write("0\ttwo\n")
        assert os.read(process.stdout.fileno(), 100) == b"0\ttwo\n"
        assert process.poll() is None
        with log.open("a") as file:
            file.write("0\tlast words\n")
        job.kill()
        job.wait()
        assert process.stdout.read() == b"0\tlast words\n"
        assert process.wait(5) == 0
    finally:
        job.kill()
        with_group_killed(process)


def test_log_that_comes_later(machine) -> None:
    (machine.home / "r").mkdir()
    job = subprocess.Popen(["sleep", "987"])
    process = machine.popen(report.tail_log("~/r", 0, str(job.pid)))
    assert process.stdout is not None
    try:
        (machine.home / "r/log").write_text("-\thello\n")
        assert os.read(process.stdout.fileno(), 100) == b"-\thello\n"
    finally:
        job.kill()
        job.wait()
        with_group_killed(process)


# -- steer and fetch -------------------------------------------------------------------------


def test_request_stop(machine) -> None:
    run = machine.home / "a $(touch pwned) 'b'"
    run.mkdir()
    assert machine.run(report.request_stop(str(run), kill=False)).returncode == 0
    assert (run / "stop").read_text() == ""
    assert machine.run(report.request_stop(str(run), kill=True)).returncode == 0
    assert (run / "stop").read_text() == "kill"
    assert [each.name for each in run.iterdir()] == ["stop"]
    assert machine.run(report.request_stop("~/none", kill=True)).returncode != 0
    assert not (machine.home / "pwned").exists()


def unpack(machine, script: str) -> dict[str, bytes | None]:
    done = subprocess.run(
        [machine.shell, "-c", script], env=machine.env, cwd=machine.home, capture_output=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        return {each.name: file.read() if (file := tar.extractfile(each)) else None for each in tar}


def test_archive(machine) -> None:
    run = machine.home / "runs/r"
    (run / "events").mkdir(parents=True)
    (run / "events/rank-0.jsonl").write_text("{}\n")
    (run / "-log").write_text("dash")
    (run / "a b").write_text("space")
    (machine.home / "checkpoints/step_1").mkdir(parents=True)
    (machine.home / "checkpoints/step_1/manifest.json").write_text("{}")
    (run / "checkpoints").symlink_to("../../checkpoints")
    found = unpack(machine, report.archive("~/runs/r", ["events", "-log", "a b", "none", "checkpoints/step_1"]))
    assert {name: data for name, data in found.items() if data is not None} == {
        "events/rank-0.jsonl": b"{}\n",
        "-log": b"dash",
        "a b": b"space",
        "checkpoints/step_1/manifest.json": b"{}",
    }


def test_nothing_to_archive(machine) -> None:
    (machine.home / "r").mkdir()
    assert machine.run(report.archive("~/none", ["log"])).returncode == 44
    assert machine.run(report.archive("~/r", ["log", "$(touch pwned)"])).returncode == 45
    assert not list(machine.home.rglob("pwned"))


def test_whole_checkpoints_only(machine) -> None:
    assert machine.run(report.list_checkpoints("~/r")).stdout == ""
    for step, whole in (("step_00000010", True), ("step_00000020", False), ("other", True)):
        (machine.home / "r/checkpoints" / step).mkdir(parents=True)
        if whole:
            (machine.home / "r/checkpoints" / step / "manifest.json").write_text("{}")
    assert machine.run(report.list_checkpoints("~/r")).stdout == "step_00000010\n"
