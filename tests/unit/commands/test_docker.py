"""The Docker commands of a node: their words, and what they do to a (fake) engine."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.commands import docker, report
from orchestrator.commands.probe import STALE_CREATED_S
from orchestrator.commands.report import Report, parse_read
from orchestrator.connect.fake import FakeHost
from orchestrator.connect.fake_engine import state
from orchestrator.specs import Node

HOSTILE = ["a,b", 'say "hi"', "it's", "$(touch pwned)", "a b", '",readonly,"', "a\nb", "back\\slash", "`id`", "=x="]
IMAGE = "registry.example.com/team/job:v1"


def evaluate(text: str, home: str = "/home/me") -> str:
    """The word that a shell makes of `text`."""
    done = subprocess.run(["sh", "-c", f"printf '%s.' {text}"], env={"HOME": home}, capture_output=True, check=True)
    return done.stdout.decode().removesuffix(".")


def fields(value: str) -> dict[str, str]:
    """The fields of a --mount value, read as Docker reads them: one CSV record."""
    (record,) = csv.reader(io.StringIO(value, newline=""), strict=True)
    return {key: text for key, _, text in (field.partition("=") for field in record)}


paths = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1, max_size=12).map(
    lambda text: "/" + text
)


@settings(max_examples=60, deadline=None)
@given(source=paths, target=paths, readonly=st.booleans(), home=st.booleans())
def test_any_mount_survives(source: str, target: str, readonly: bool, home: bool) -> None:
    given_source = "~" + source if home else source
    found = fields(evaluate(docker.mount(given_source, target, readonly=readonly)))
    expected = {"type": "bind", "source": ("/home/me" if home else "") + source, "target": target}
    assert found == expected | ({"readonly": ""} if readonly else {})


def test_a_plain_mount_stays_readable() -> None:
    assert docker.mount("/data", "/d", readonly=True) == "type=bind,source=/data,target=/d,readonly"
    assert docker.mount("~/x", "/d") == 'type=bind,source="$HOME"/x,target=/d'


def create(**changes) -> str:
    values = {
        "run_dir": "~/runs/r-1",
        "mounts": [docker.mount("~/runs/r-1", "/orch/runs/r-1")],
        "labels": {"orch.run": "r-1"},
        "shm": "8g",
        "gpus": 0,
        "stop_timeout": 160,
    }
    return docker.create_argv(IMAGE, ["/orch/runs/r-1/launch.py", "/orch/runs/r-1"], **(values | changes))


def test_create(machine) -> None:
    machine.recording("docker", "")
    labels = {f"k{index}": value for index, value in enumerate(HOSTILE)} | {"orch.job": '{"name":"it\'s $(id)"}'}
    mounts = [docker.mount(f"/src/{value}", f"/dst/{value}", readonly=True) for value in HOSTILE]
    done = machine.run("set -eu\n" + create(labels=labels, mounts=mounts))
    assert (done.returncode, done.stderr) == (0, "")
    (words,) = machine.words
    user = subprocess.run("echo $(id -u):$(id -g)", shell=True, capture_output=True, text=True).stdout.strip()
    flags = dict(pairwise(words[2:-2]))
    assert words[:4] == ["docker", "create", "--name", "orch"]
    assert (flags["--entrypoint"], flags["--network"], flags["--restart"]) == ("python3", "host", "no")
    assert (flags["--user"], flags["--shm-size"], flags["--stop-timeout"]) == (user, "8g", "160")
    assert flags["--cidfile"] == f"{machine.home}/runs/r-1/container"
    assert "--init" in words and "--gpus" not in words
    assert [words[at + 1] for at, word in enumerate(words) if word == "--label"] == [
        f"{key}={value}" for key, value in labels.items()
    ]
    seen = [fields(words[at + 1]) for at, word in enumerate(words) if word == "--mount"]
    assert seen == [
        {"type": "bind", "source": f"/src/{value}", "target": f"/dst/{value}", "readonly": ""} for value in HOSTILE
    ]
    assert words[-3:] == [IMAGE, "/orch/runs/r-1/launch.py", "/orch/runs/r-1"]
    assert not list(machine.root.rglob("pwned"))


def test_create_with_gpus(machine) -> None:
    machine.recording("docker", "")
    machine.run("set -eu\n" + create(gpus=8))
    (words,) = machine.words
    assert words[words.index("--gpus") + 1] == "8"
    has_rdma = Path("/dev/infiniband").exists()
    assert ("/dev/infiniband" in words) is has_rdma and ("IPC_LOCK" in words) is has_rdma
    assert words[-3] == IMAGE


@pytest.mark.parametrize("image", [IMAGE, "r.example.com/a@sha256:" + "0" * 64])
def test_pull_only_what_is_not_there(machine, image: str) -> None:
    machine.recording("docker", "exit 0")
    assert machine.run("set -eu\n" + docker.pull(image, credentials=False)).returncode == 0
    assert [call[1:3] for call in machine.words] == [["image", "inspect"]]
    machine.recording("docker", '[ "$1" = pull ]')
    assert machine.run("set -eu\n" + docker.pull(image, credentials=False)).returncode == 0
    assert machine.words[-1] == ["docker", "pull", "--quiet", image]


@pytest.mark.parametrize("code", [0, 1])
def test_credentials_leave_nothing_behind(machine, code: int) -> None:
    login = b'{"auths": {"r": {"auth": "c2VjcmV0"}}}'
    (machine.root / "tmp").mkdir()
    machine.env["TMPDIR"] = str(machine.root / "tmp")
    seen = machine.root / "seen"
    then = (
        f'[ "$1" = pull ] || exit 1; stat -c %a "$DOCKER_CONFIG" "$DOCKER_CONFIG"/config.json >{seen}; '
        f'cat "$DOCKER_CONFIG"/config.json >>{seen}; exit {code}'
    )
    machine.recording("docker", then)
    done = machine.run("set -eu\n" + docker.pull(IMAGE, credentials=True), stdin=login)
    assert done.returncode == code
    assert seen.read_text() == "700\n600\n" + login.decode()
    assert not list((machine.root / "tmp").iterdir())
    assert "c2VjcmV0" not in str(machine.words)


# -- against the fake engine -----------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    made = FakeHost(Node("n1", "203.0.113.1"), tmp_path / "n1", images=[IMAGE])
    (made.home / "runs/r-1").mkdir(parents=True)
    yield made
    made.close()


def box(host: FakeHost, run: str, name: str = "orch", *, start: bool = False) -> str:
    done = host.run(f"docker create --name {name} --label orch.run={run} {IMAGE}")
    assert done.ok, done.stderr
    if start:
        host.run(f"docker start {name}")
    return done.stdout.strip()


def names(host: FakeHost) -> set[str]:
    return {each["Name"] for each in host.containers}


def age(host: FakeHost, seconds: int) -> None:
    """Makes all containers that much older."""
    stamp = host.run(f"date -u -d '-{seconds} seconds' +%Y-%m-%dT%H:%M:%S.000000000Z").stdout.strip()
    with state(host.root / "engine") as data:
        for each in data["containers"]:
            each["Created"] = stamp


def test_clear_ended_touches_no_live_container(host: FakeHost) -> None:
    box(host, "r-0", start=True)
    age(host, STALE_CREATED_S * 2)
    assert host.run("set -eu\n" + docker.clear_ended()).ok
    assert names(host) == {"/orch"}
    host.finish("orch", 1)
    box(host, "r-0", "orch-other")
    assert host.run("set -eu\n" + docker.clear_ended()).ok
    assert names(host) == {"/orch-other"}


def test_clear_ended_takes_a_created_one_only_when_it_is_old(host: FakeHost) -> None:
    box(host, "r-0")
    assert host.run("set -eu\n" + docker.clear_ended()).ok and names(host) == {"/orch"}
    age(host, STALE_CREATED_S + 60)
    assert host.run("set -eu\n" + docker.clear_ended()).ok and names(host) == set()


def test_clear_ended_without_containers(host: FakeHost) -> None:
    assert host.run("set -eu\n" + docker.clear_ended()).ok


@pytest.mark.parametrize(
    ("marks", "nodes", "kind", "code"),
    [
        (["n1"], 2, "local", 0),
        (["n1", "n2"], 2, "local", 41),
        (["n1", "n2"], 2, "shared", 0),
        (["n1"], 2, "shared", 41),
        (["n1"], 1, "shared", 0),
        (["n1", "n2"], 1, "local", 0),
    ],
)
def test_storage_is_what_the_configuration_says(machine, marks, nodes: int, kind: str, code: int) -> None:
    (machine.home / "runs/r/nodes").mkdir(parents=True)
    for mark in marks:
        (machine.home / "runs/r/nodes" / mark).touch()
    done = machine.run("set -eu\n" + docker.check_storage("~/runs/r", nodes, kind))
    assert (done.returncode, done.stdout) == (code, f"orch.marks {len(marks)}\n" if code else "")


def test_the_second_command_makes_a_container_and_starting_it_works(host: FakeHost) -> None:
    second = docker.pull_and_create(IMAGE, create(), run_dir="~/runs/r-1", storage_check="", credentials=False)
    assert host.run(second).ok
    (made,) = host.containers
    assert (host.home / "runs/r-1/container").read_text() == made["Id"]
    assert made["Config"]["Labels"] == {"orch.run": "r-1"}
    assert host.run(docker.start("~/runs/r-1")).ok
    assert host.containers[0]["State"]["Status"] == "running"
    (host.home / "runs/r-1/container").unlink()
    again = host.run(second)
    assert not again.ok and "is already in use by container" in again.stderr


def test_a_container_made_while_its_run_is_rolled_back_goes_too(machine) -> None:
    run = machine.home / "runs/r-1"
    run.mkdir(parents=True)
    (run / "container").write_text("abc")
    second = docker.pull_and_create(IMAGE, create(), run_dir="~/runs/r-1", storage_check="", credentials=False)
    machine.recording("docker", '[ "$1" != create ] || echo abc')
    assert machine.run(second).returncode == 0 and ["docker", "rm", "abc"] not in machine.words
    machine.recording("docker", f'[ "$1" != create ] || {{ rm -r {str(run)!r}; echo abc; }}')
    done = machine.run(second)
    assert (done.returncode, done.stderr) == (1, "it was rolled back\n")
    assert machine.words[-1] == ["docker", "rm", "abc"]


def test_rollback_removes_this_run_and_nothing_else(host: FakeHost) -> None:
    box(host, "r-1", "orch-a", start=True)
    box(host, "r-1", "orch-b")
    box(host, "r-10", "orch-c", start=True)
    box(host, "r", "orch-d")
    for name in ("runs/r-1/events", "runs/r-10", "checkpoints/r-1", "checkpoints/kept/step_1"):
        (host.home / name).mkdir(parents=True, exist_ok=True)
    (host.home / "runs/r-1/nodes").mkdir()
    (host.home / "runs/r-1/nodes/.fresh").touch()
    assert host.run(docker.rollback("r-1", "~/runs/r-1", "~/checkpoints/r-1")).ok
    assert names(host) == {"/orch-c", "/orch-d"}
    assert sorted(each.name for each in (host.home / "runs").iterdir()) == ["r-10"]
    assert host.run(docker.rollback("r-1", "~/runs/r-1", "~/checkpoints/kept")).ok
    assert sorted(each.name for each in (host.home / "checkpoints").iterdir()) == ["kept"]


def test_rollback_that_cannot_remove_the_container_says_so(host: FakeHost) -> None:
    box(host, "r-1")
    host.fail("rm", "Error response from daemon: device or resource busy")
    done = host.run(docker.rollback("r-1", "~/runs/r-1"))
    assert not done.ok and "busy" in done.stderr
    assert not (host.home / "runs/r-1").exists()


def test_rollback_with_the_engine_down_still_removes_the_folder(host: FakeHost) -> None:
    host.engine(up=False)
    assert host.run(docker.rollback("r-1", "~/runs/r-1")).ok
    assert not (host.home / "runs/r-1").exists()


def test_remove_ended_leaves_a_live_run(host: FakeHost) -> None:
    box(host, "r-1", start=True)
    assert host.run(docker.remove_ended("r-1", "~/runs/r-1")).ok and names(host) == {"/orch"}
    host.finish("orch", 0)
    assert host.run(docker.remove_ended("r-2", "~/runs/r-2")).ok and names(host) == {"/orch"}
    assert host.run(docker.remove_ended("r-1", "~/runs/r-1")).ok and names(host) == set()
    assert host.run(docker.remove_ended("r-1", "~/runs/r-1")).ok


def read(host: FakeHost) -> Report:
    return parse_read(host.run(report.read("~/runs/r-1", docker.probe("~/runs/r-1"))).stdout)


def test_what_a_container_does(host: FakeHost) -> None:
    assert read(host).state == "gone"
    identity = box(host, "r-1")
    (host.home / "runs/r-1/container").write_text(identity)
    assert read(host).state == "created"
    host.run("docker start orch")
    assert (read(host).state, read(host).tail) == ("running", ())
    host.finish("orch", 137)
    (host.root / "engine" / f"{identity}.log").write_text(
        "".join(
            json.dumps({"stream": "stderr", "log": text + "\n"}) + "\n"
            for text in ("first", "orch.state running", "end")
        )
    )
    found = read(host)
    assert (found.state, found.exit_code, found.oom) == ("exited", 137, False)
    assert found.tail == ("first", " orch.state running", "end", "")
    host.engine(up=False)
    found = read(host)
    assert found.state == "unknown" and "Is the docker daemon running?" in found.engine_error


def test_the_launchers_process(host: FakeHost) -> None:
    ask = f'pid={docker.pid("~/runs/r-1")}; if [ "${{pid:-0}}" -gt 0 ]; then echo alive; else echo none; fi'
    assert host.run(ask).stdout == "none\n"
    (host.home / "runs/r-1/container").write_text(box(host, "r-1"))
    assert host.run(ask).stdout == "none\n"


def test_the_pid_when_docker_prints_an_empty_line(machine) -> None:
    machine.command("docker", "echo; echo 'No such object' >&2; exit 1")
    ask = f'pid={docker.pid("~/r")}; if [ "${{pid:-0}}" -gt 0 ]; then echo alive; else echo none; fi'
    done = machine.run(ask)
    assert (done.stdout, done.stderr) == ("none\n", "")


def test_kill(host: FakeHost) -> None:
    run_dir = "~/runs/r-1"
    assert host.run(docker.kill(run_dir, 1)).ok  # nothing there
    (host.home / "runs/r-1/container").write_text(box(host, "r-1"))
    assert host.run(docker.kill(run_dir, 1)).ok
    assert names(host) == set()  # created and never started: `docker stop` does nothing to it
    (host.home / "runs/r-1/container").write_text(box(host, "r-1", start=True))
    assert host.run(docker.kill(run_dir, 1)).ok
    assert host.containers[0]["State"]["Status"] == "exited"


# -- discover --------------------------------------------------------------------------------

# recorded on a node of the simulated cluster, shortened
CONTAINER_LINE = (
    'orch_container {"state":{"Status":"exited","Running":false,"Pid":0,"ExitCode":127,"Error":"",'
    '"StartedAt":"2026-11-20T23:59:29.352780363Z","FinishedAt":"2026-11-20T23:59:29.356420676Z"},'
    '"labels":{"orch.dir":"~/.orch/runs/demo-1","orch.index":"0",'
    '"orch.job":"{\\"name\\":\\"demo\\",\\"attempt\\":1,\\"node_names\\":[\\"n1\\"]}",'
    '"orch.node":"n1","orch.operator":"me@here","orch.run":"demo-1","orch.schema":"1"}}'
)
FOLDER_LINE = (
    'orch_folder /home/orch/.orch/runs/demo-1\t1795219168\t0\t{"schema": 1, "run": "demo-1", "node": "n1"}\t'
    '{"state": "failed"}'
)


def test_a_recorded_discovery() -> None:
    containers, folders = docker.parse_discover(f"Welcome!\n{CONTAINER_LINE}\n{FOLDER_LINE}\n")
    assert containers[0]["labels"]["orch.run"] == "demo-1" and containers[0]["state"]["ExitCode"] == 127
    assert json.loads(containers[0]["labels"]["orch.job"])["node_names"] == ["n1"]
    assert folders == [
        {
            "dir": "/home/orch/.orch/runs/demo-1",
            "alive": False,
            "time": 1795219168.0,
            "job": {"schema": 1, "run": "demo-1", "node": "n1"},
            "result": {"state": "failed"},
        }
    ]


def test_lines_that_broke_off_are_passed_over() -> None:
    whole = docker.parse_discover(f"{CONTAINER_LINE}\n{FOLDER_LINE}\n")
    for cut in range(0, len(CONTAINER_LINE), 7):
        assert docker.parse_discover(CONTAINER_LINE[:cut]) == ([], [])
    for cut in range(0, FOLDER_LINE.index("}\t") + 1, 7):
        assert docker.parse_discover(f"{CONTAINER_LINE}\n{FOLDER_LINE[:cut]}") == (whole[0], [])
    assert docker.parse_discover("orch_folder\norch_container\norch_folder a\tb\tc\n\n") == ([], [])


def test_line_ends_of_unicode_in_a_result_do_not_hide_a_run() -> None:
    line = FOLDER_LINE.replace("failed", "fa\u2028il\x85ed")
    assert docker.parse_discover(line + "\n")[1][0]["result"] == {"state": "fa\u2028il\x85ed"}


def test_discovery_on_a_node(host: FakeHost) -> None:
    assert docker.parse_discover(host.run(docker.discover("~/runs")).stdout) == ([], [])
    box(host, "r-1", start=True)
    box(host, "", "foreign")
    (host.home / "runs/r-1/job.json").write_text(json.dumps({"run": "r-1", "node": "n1", "note": "a\tb"}, indent=1))
    (host.home / "runs/r-2/n1").mkdir(parents=True)
    (host.home / "runs/r-2/n1/job.json").write_text('{"run": "r-2"}')
    (host.home / "runs/r-2/n1/result.json").write_text('{"state": "succeeded"}\n')
    (host.home / "runs/empty").mkdir()
    containers, folders = docker.parse_discover(host.run(docker.discover("~/runs")).stdout)
    assert {each["labels"]["orch.run"] for each in containers} == {"", "r-1"}
    assert {each["dir"]: (each["job"]["run"], each["result"]) for each in folders} == {
        f"{host.home}/runs/r-1": ("r-1", None),
        f"{host.home}/runs/r-2/n1": ("r-2", {"state": "succeeded"}),
    }
    assert all(each["time"] > 1.7e9 and not each["alive"] for each in folders)
    host.engine(up=False)
    assert not host.run(docker.discover("~/runs")).ok


def test_folders_are_told_alive_by_the_given_command(machine) -> None:
    (machine.home / "runs/r 1").mkdir(parents=True)
    (machine.home / "runs/r 1/job.json").write_text("{}")
    done = machine.run(docker.folders("~/runs", alive='cat "$d"/pid 2>/dev/null || echo 0'))
    assert docker.parse_discover(done.stdout)[1][0]["alive"] is False
    (machine.home / "runs/r 1/pid").write_text("77\n")
    done = machine.run(docker.folders("~/runs", alive='cat "$d"/pid 2>/dev/null || echo 0'))
    assert docker.parse_discover(done.stdout)[1][0]["alive"] is True
