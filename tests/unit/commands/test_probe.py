"""The preflight: its script on real shells, its recorded answers, and what is made of them."""

from __future__ import annotations

import doctest
import socket
from pathlib import Path

import pytest

from orchestrator.commands import job, probe
from orchestrator.commands.probe import STALE_CREATED_S, Facts, Request, facts, judge, parse, preflight
from orchestrator.errors import LeaseError, PreflightError

# recorded on a node of the simulated cluster (Docker 26.1, GNU tar 1.35), with a container held by another run
RECORDED = """\
orch.clock 1795219168590233032
orch.home /home/orch
orch.user orch
orch.engine 26.1.5+dfsg1
orch.holder created|demo-20260131-120000-ab12|me@here|f9b82eecea4c|2026-11-20 23:59:28 +0000 UTC
orch.engine_disk_kb 63185112
orch.image no
orch.gpus 0
orch.cpus 2
orch.memory_kb 22788056
orch.text gpu_processes
orch.end
orch.unwritable /proc/nope
orch.disk_kb 65839720
orch.missing /no such
orch.listening 2
"""
CREATED_NS = 1795219168 * 10**9
HOSTILE = ["a b", "it's", 'say "hi"', "$(touch pwned)", "`touch pwned`", "a,b", "x;touch pwned", "-n", "é ü", "$HOME"]


def test_doctest() -> None:
    assert doctest.testmod(probe).failed == 0


def test_a_recorded_answer() -> None:
    found = facts(RECORDED, CREATED_NS, CREATED_NS + 180_466_064)
    assert found.get("engine") == "26.1.5+dfsg1"
    assert (found.number("cpus"), found.number("gpus"), found.number("none", 7)) == (2, 0, 7)
    assert found.texts == {"gpu_processes": ""}
    assert found.clock_offset_ns == 500_000_000
    problems = judge(found, node="n1", port=29400)
    assert [type(problem) for problem in problems] == [LeaseError, PreflightError, PreflightError, PreflightError]
    assert all(problem.node == "n1" and problem.hint and "\n" not in problem.message for problem in problems)
    assert problems[0].message == "busy: demo-20260131-120000-ab12 (created, started by me@here)"
    assert problems[1].message == "cannot write to /proc/nope"
    assert problems[2].message == "the mount source /no such does not exist"
    assert problems[3].message == "port 29400 (rendezvous) is taken"


def test_only_a_newline_ends_a_line() -> None:
    values, texts = parse("orch.error a\x85b\u2028orch.state gone\x0c\r\norch.text t\nx\u2028orch.state bad\ny\n")
    assert values == {"error": "a\x85b\u2028orch.state gone\x0c\r"}
    assert texts == {"t": "x\u2028orch.state bad\ny\n"}
    assert parse("") == ({}, {}) and parse("noise\norch.a") == ({"a": ""}, {})


def test_a_torn_or_foreign_answer_is_no_crash() -> None:
    assert facts("orch.clock soon\norch.gpus many\n", 1, 2).clock_offset_ns == 0
    assert facts("orch.gpus many\n").number("gpus") == 0
    assert judge(facts(""), node="n1", docker=False) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_no_value_becomes_syntax(machine, name: str) -> None:
    machine.recording("docker", "exit 1")
    folder = f"~/{name}/deep"
    asked = Request(folders=(folder,), mounts=(f"{machine.root}/{name}",), image=name, reach=(name, 1))
    done = machine.run(preflight(asked))
    values, _ = parse(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (machine.home / name / "deep").is_dir()
    assert values["missing"] == f"{machine.root}/{name}"
    assert int(values["disk_kb"]) > 0
    assert ["docker", "image", "inspect", name] in machine.words
    assert not list(machine.root.rglob("pwned"))


def test_newlines_in_a_path_stay_in_it(machine) -> None:
    done = machine.run(preflight(Request(docker=False, folders=("~/a\nb",), mounts=("/no\norch.holder x",))))
    assert done.returncode == 0 and (machine.home / "a\nb").is_dir()
    assert "holder" not in judge(facts(done.stdout), node="n")[0].message


def test_what_a_node_says_of_itself(machine) -> None:
    machine.command(
        "nvidia-smi", '[ "$1" = -L ] && { echo "GPU 0: H"; echo "GPU 1: H"; } || echo "41, 900 MiB, python"'
    )
    machine.command(
        "docker",
        'case "$1" in info) echo "28.2.2|/";; '
        'ps) echo "running|other-run|ann@lab|abc|x";; *) exit 1;; esac',
    )
    found = facts(machine.run(preflight(Request(folders=("~/runs",), image="i:1"))).stdout)
    assert found.get("home") == str(machine.home)
    assert (found.get("engine"), found.number("gpus"), found.get("image")) == ("28.2.2", 2, "no")
    assert found.get("clock").isdigit() and found.number("memory_kb") > 0 and found.number("engine_disk_kb") > 0
    assert probe.stray_gpu_processes(found) == ["41, 900 MiB, python"]
    lease, stray = judge(found, node="n1", gpus=2)
    assert isinstance(lease, LeaseError) and lease.exit_code == 4
    assert lease.message == "busy: other-run (running, started by ann@lab)"
    assert stray.message == "1 other process(es) hold its GPUs: 41, 900 MiB, python"


@pytest.mark.parametrize("info", ["exit 1", "echo '|'"])  # how newer and older clients say that no engine answers
def test_an_engine_that_is_silent(machine, info: str) -> None:
    machine.command(
        "docker", f'case "$1" in info) {info};; *) echo "Warning: x" >&2; echo "Cannot connect" >&2; exit 1;; esac'
    )
    found = facts(machine.run(preflight(Request(image="i:1"))).stdout)
    (problem,) = judge(found, node="n1")
    assert problem.message == "the Docker engine does not answer: Cannot connect"


def test_what_is_slow_is_asked_at_once(machine) -> None:
    """Each waits until the other has begun: one after the other, neither would end."""
    wait = 'touch "$HOME"/{mine}; until [ -e "$HOME"/{other} ]; do :; done; echo {mine}'
    machine.command("docker", 'if [ "$1" = ps ]; then ' + wait.format(mine="ps", other="gpu") + "; fi")
    machine.command("nvidia-smi", '[ "$1" = -L ] || { ' + wait.format(mine="gpu", other="ps") + "; }")
    done = machine.run(preflight(Request(image="i:1")))
    found = facts(done.stdout)
    assert done.returncode == 0 and found.get("holder") == "ps"
    assert probe.stray_gpu_processes(found) == ["gpu"]


def test_a_folder_that_cannot_be_made(machine) -> None:
    (machine.home / "file").write_text("")
    found = facts(machine.run(preflight(Request(docker=False, folders=("~/file/x",)))).stdout)
    assert found.get("unwritable") == f"{machine.home}/file/x"


def test_without_an_engine(machine) -> None:
    found = facts(machine.run(preflight(Request(image="i:1"))).stdout)
    assert [problem.message for problem in judge(found, node="n1")] == [
        "the Docker engine does not answer: sh: 1: docker: not found"
    ]
    assert judge(found, node="n1")[0].hint == "install a Docker engine there"


def test_a_port_that_is_taken(machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = preflight(Request(docker=False, listen_port=port))
        assert judge(facts(machine.run(script).stdout), node="n1", port=port)[0].message.startswith(f"port {port} ")
    assert judge(facts(machine.run(script).stdout), node="n1", port=port) == []


def test_reaching_the_head(machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = preflight(Request(docker=False, reach=("127.0.0.1", port)))
        assert facts(machine.run(script).stdout).get("reach") == "yes"
    assert facts(machine.run(script).stdout).get("reach") == "yes"  # refused: the way is open
    machine.command("timeout", "exit 124")
    found = facts(machine.run(script).stdout)
    (problem,) = judge(found, node="n2", reach=("10.0.0.1", 29400))
    assert problem.message == "cannot reach the head node at 10.0.0.1:29400: timed out"
    machine.command("timeout", "echo 'bash: connect: No route to host' >&2; exit 1")
    assert facts(machine.run(script).stdout).get("reach") == "bash: connect: No route to host"


def test_staging(machine) -> None:
    data = job.archive({"job.json": b"{}", "nodes/n1": b""})
    done = machine.run(probe.SAY + "\n" + probe.stage("~/runs/r 1"), data)
    root = machine.home / "runs/r 1"
    assert parse(done.stdout)[0] == {"staged": str(root)}
    assert root.stat().st_mode & 0o777 == 0o700
    assert (root / "job.json").stat().st_mode & 0o777 == 0o600
    assert (root / "nodes").stat().st_mode & 0o777 == 0o700
    # `orch ps` takes the time of job.json as the run's start, so it must be the node's own
    assert abs((root / "job.json").stat().st_mtime - Path(machine.bin).stat().st_mtime) < 60


@pytest.mark.parametrize("how", ["no folder", "no archive"])
def test_staging_that_fails_says_why(machine, how: str) -> None:
    (machine.home / "file").write_text("")
    root, data = ("~/file/r", job.archive({"a": b""})) if how == "no folder" else ("~/r", b"x" * 700)
    done = machine.run(probe.SAY + "\n" + probe.stage(root), data)
    assert done.returncode == 0
    (problem,) = judge(facts(done.stdout), node="n1")
    assert isinstance(problem, PreflightError) and problem.message.startswith("cannot write the run's files: ")
    assert ("directory" in problem.message.lower()) if how == "no folder" else ("tar" in problem.message)


def one(**values: str) -> Facts:
    return Facts(values, {})


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        (one(engine_error="Cannot connect to the Docker daemon"), {}, "the Docker engine does not answer: Cannot"),
        (one(holder="running|||ab|x"), {}, "busy: a container named 'orch' that is not a run (running"),
        (one(holder="paused|r-1||ab"), {}, "busy: r-1 (paused, started by unknown)"),
        (one(gpus="3"), {"gpus": 8}, "3 GPUs found, 8 asked for"),
        (one(unwritable="/data"), {}, "cannot write to /data"),
        (one(missing="/data"), {}, "the mount source /data does not exist"),
        (one(disk_kb="500000"), {}, "the run folder's disk has 0.5 GB free, 1 GB needed"),
        (one(engine_disk_kb="500000"), {}, "the engine's disk has 0.5 GB free, 1 GB needed"),
        (one(engine_disk_kb="100000", image="yes"), {}, "the engine's disk has 0.1 GB free, 0.2 GB needed"),
        (Facts({}, {}, 61 * 10**9), {}, "its clock is +61 s off this machine's"),
        (Facts({}, {}, -90 * 10**9), {}, "its clock is -90 s off"),
        (one(listening="1"), {"port": 29400}, "port 29400 (rendezvous) is taken"),
        (one(reach="timed out"), {"reach": ("10.0.0.1", 5)}, "cannot reach the head node at 10.0.0.1:5: timed out"),
        (one(stage_error="No space left"), {}, "cannot write the run's files: No space left"),
        (Facts({"gpus": "1"}, {"gpu_processes": "7, 1 MiB, x\n"}), {"gpus": 1}, "1 other process(es) hold its GPUs"),
    ],
)
def test_every_problem(found: Facts, asked: dict, message: str) -> None:
    (problem,) = judge(found, node="n1", **asked)
    assert problem.message.startswith(message)
    assert problem.exit_code == 4 and problem.hint and problem.node == "n1"


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        (one(holder="exited|r-1|me|ab|x"), {}),
        (one(holder="dead|r-1|me|ab|x"), {}),
        (one(holder="running|r-1|me|ab|x"), {"lease": False}),
        (one(holder="running|r-1|me|ab|x", engine_error="down"), {"docker": False}),
        (one(gpus="8"), {"gpus": 8}),
        (one(disk_kb="1000001", engine_disk_kb="300000", image="yes"), {}),
        (Facts({}, {}, 59 * 10**9), {}),
        (one(listening="1"), {"port": 0}),
        (one(listening="0"), {"port": 29400}),
        (one(reach="timed out"), {}),
        (Facts({}, {"gpu_processes": "7, x\n"}), {"gpus": 0}),
    ],
)
def test_no_problem(found: Facts, asked: dict) -> None:
    assert judge(found, node="n1", **asked) == []


@pytest.mark.parametrize(
    ("age", "created", "busy"),
    [
        (STALE_CREATED_S - 1, "2026-11-20 23:59:28 +0000 UTC", True),
        (STALE_CREATED_S + 1, "2026-11-20 23:59:28 +0000 UTC", False),
        (STALE_CREATED_S + 1, "2026-11-21 00:59:28 +0100 CET", False),
        (STALE_CREATED_S + 1, "an unknown form", True),
        (STALE_CREATED_S + 1, "", True),
    ],
)
def test_a_container_left_half_made_does_not_hold_its_node_for_ever(age: int, created: str, busy: bool) -> None:
    holder = f"created|r-1|me|ab|{created}"
    found = one(clock=str(CREATED_NS + age * 10**9), holder=holder)
    assert bool(judge(found, node="n1")) is busy
    running = one(clock=str(CREATED_NS + age * 10**9), holder=holder.replace("created|", "running|"))
    assert judge(running, node="n1")


def test_hints_for_an_engine_that_does_not_answer() -> None:
    denied = judge(one(engine_error="permission denied while trying", user="bob"), node="n1")[0]
    assert denied.hint == "add bob to the docker group there: `sudo usermod -aG docker bob`"
    assert "start docker" in (judge(one(engine_error="Is it running?"), node="n1")[0].hint or "")
