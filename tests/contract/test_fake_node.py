"""The fake node answers as a real engine does: one sequence of commands, run on both.

Standard output and exit codes must be the same to the letter (ids and paths apart); of error
messages, whose wording changes between engine versions, the part that orch reads.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.connect.base import Completed, Host
from orchestrator.connect.fake import FakeHost
from orchestrator.connect.local import LocalHost
from orchestrator.specs import Node

NAME = f"orch-contract-{os.getpid()}"
IMAGE = f"{NAME}:shell"
TOOLS = ["/bin/sh", "/bin/cat", "/bin/sleep", "/bin/echo", "/usr/bin/env", "/usr/bin/id"]


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """An image with a shell, made of this machine's own programs: no registry is needed."""
    files = set()
    for tool in TOOLS:
        out = subprocess.run(["ldd", tool], capture_output=True, text=True, check=True).stdout
        files |= {tool, *re.findall(r"(/\S+) \(0x", out)}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        for name in sorted(files):
            tar.add(name)
    subprocess.run(["docker", "import", "-", IMAGE], input=archive.getvalue(), check=True, capture_output=True)
    yield IMAGE
    subprocess.run(["docker", "image", "rm", IMAGE], capture_output=True)


@pytest.fixture(params=["fake", pytest.param("engine", marks=pytest.mark.integration)])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """A host whose HOME is a folder of the test's, and whose engine has IMAGE."""
    if request.param == "fake":
        host = FakeHost(Node("n1", "203.0.113.1"), tmp_path, images=[IMAGE], execute=True)
        yield host
        host.close()
        return
    request.getfixturevalue("image")
    home = tmp_path / "home"
    home.mkdir()
    yield LocalHost(Node("n1", "127.0.0.1"), {**os.environ, "HOME": str(home)})
    subprocess.run(["docker", "rm", "-f", NAME], capture_output=True)


def create(command: str, *, name: str = NAME, image: str = IMAGE, extra: str = "") -> str:
    return (
        f"docker create --name {name} --init --entrypoint sh --network host --shm-size 1g "
        f'--user "$(id -u):$(id -g)" --restart no --stop-timeout 5 --log-opt max-size=8m --log-opt max-file=2 '
        f"--label orch.run=r-1 --label 'orch.job={{\"name\":\"a b\"}}' --env 'GREETING=hello, you' {extra} "
        f"{image} -c '{command}'"
    )


def ask(node: Host, command: str) -> Completed:
    """The answer with what differs from run to run replaced."""
    done = node.run(command, timeout=60)

    def clean(text: str) -> str:
        return re.sub(r"\b[0-9a-f]{64}\b", "ID", re.sub(rf"{NAME}(?!:)", "NAME", text))

    return Completed(done.returncode, clean(done.stdout), clean(done.stderr))


def expect(node: Host, command: str, code: int = 0, out: str | None = None, err: str = "") -> None:
    done = ask(node, command)
    assert (done.returncode, out if out is not None else done.stdout) == (code, done.stdout), (command, done)
    assert re.search(err, done.stderr), (command, done)


def test_a_container_from_create_to_removal(node: Host) -> None:
    ps = f"docker ps -aq --no-trunc --filter name='^/?{NAME}$'"
    expect(node, "docker version --format '{{.Server.Version}}' | grep -c '^[0-9][0-9]*[.][0-9]'", out="1\n")
    expect(node, "[ -d \"$(docker info --format '{{.DockerRootDir}}')\" ]")
    expect(node, f"docker image inspect {IMAGE} >/dev/null")
    expect(node, "docker image inspect nothing:here", 1, "[]\n", "No such image: nothing:here")
    run = 'echo "$GREETING"; cat /orch/run/file; echo bad >&2; : >/orch/run/made; exec sleep 60'
    expect(node, "mkdir -p ~/run && echo content >~/run/file")
    mount = '--mount type=bind,source="$HOME"/run,target=/orch/run --cidfile "$HOME"/run/container'
    expect(node, create(run, extra=mount), out="ID\n")
    expect(node, 'cat "$HOME"/run/container', out="ID")
    expect(node, create(run, extra=mount), 1, "", "container ID file found")
    expect(node, create(run), 1, "", r'name "/NAME" is already in use by container "ID"')

    state = "docker inspect --format '{{.State.Status}}|{{.State.ExitCode}}|{{.State.OOMKilled}}|{{.State.Error}}'"
    expect(node, f"{state} {NAME}", out="created|0|false|\n")
    expect(node, f"{ps} --filter status=exited --filter status=dead", out="")
    expect(node, f"{ps} --filter status=created", out="ID\n")
    expect(node, f"docker kill {NAME}", 1, "", "is not running")
    expect(node, f'docker start "$(cat ~/run/container)" && {ps}', out="ID\nID\n")
    expect(
        node,
        "i=0; until [ -e ~/run/made ] || [ $i -gt 100 ]; do sleep 0.1; i=$((i+1)); done; ls ~/run/made | wc -l",
        out="1\n",
    )

    expect(node, f"{state} {NAME}", out="running|0|false|\n")
    expect(node, f"kill -0 $(docker inspect --format '{{{{.State.Pid}}}}' {NAME}) && echo alive", out="alive\n")
    expect(node, f"docker logs {NAME}", out="hello, you\ncontent\n", err="^bad\n$")
    expect(node, f"docker logs --tail 1 {NAME} 2>/dev/null | wc -l | tr -d ' '")
    row = '\'{{.State}}|{{.Label "orch.run"}}|{{.Label "none"}}|{{.ID}}|{{.Names}}|{{.Image}}\''
    expect(
        node,
        f"docker ps -a --no-trunc --filter label=orch.run=r-1 --filter name=^/{NAME}$ --format {row}",
        out=f"running|r-1||ID|NAME|{IMAGE}\n",
    )
    expect(node, f"docker ps -q --filter label=orch.run=r-2 --filter name={NAME}", out="")
    labels = "docker inspect --format '{{json .Config.Labels}} {{index .Config.Labels \"orch.run\"}}'"
    expect(node, f"{labels} {NAME}", out='{"orch.job":"{\\"name\\":\\"a b\\"}","orch.run":"r-1"} r-1\n')
    expect(
        node,
        "docker inspect --format '{{.Config.Image}} {{.HostConfig.NetworkMode}} {{.HostConfig.ShmSize}}' " + NAME,
        out=f"{IMAGE} host 1073741824\n",
    )
    expect(node, f"docker exec {NAME} sh -c 'echo in; exit 7'", 7, "in\n")
    expect(node, f"docker rm {NAME}", 1, "", "running container|container.*is running")

    expect(node, f"docker stop -t 5 {NAME}", out="NAME\n")
    expect(node, f"docker wait {NAME}", out="143\n")
    expect(node, f"{state} {NAME}", out="exited|143|false|\n")
    expect(node, f"docker rm {NAME}", out="NAME\n")
    expect(node, f"docker inspect {NAME}", 1, "[]\n", "No such (object|container): NAME")
    expect(node, ps, out="")


def test_ends_of_a_container(node: Host) -> None:
    wait = f"docker start {NAME} >/dev/null && docker wait {NAME} && docker rm {NAME}"
    expect(node, f"{create('exit 3')} >/dev/null && {wait}", out="3\nNAME\n")
    expect(node, f"{create('kill -9 $$')} >/dev/null && {wait}", out="137\nNAME\n")
    expect(
        node,
        f"{create('exec sleep 60')} >/dev/null && docker start {NAME} && docker kill {NAME} && docker wait {NAME}",
        out="NAME\nNAME\n137\n",
    )
    expect(
        node, f"docker start {NAME} && docker kill --signal TERM {NAME} && docker wait {NAME}", out="NAME\nNAME\n143\n"
    )
    expect(
        node, f"docker start {NAME} && docker rm -f {NAME} && docker ps -aq --filter name={NAME}", out="NAME\nNAME\n"
    )


def test_refusals(node: Host) -> None:
    expect(
        node,
        create("true", image="orch-contract-nothing:v1", extra="--pull never"),
        1,
        "",
        "No such image: orch-contract-nothing:v1",
    )
    expect(
        node,
        create("true", extra="--mount type=bind,source=/no/such/folder,target=/x"),
        1,
        "",
        "bind source path does not exist: /no/such/folder",
    )
    expect(node, create("true", extra="--mount type=bind,source=/tmp,target=x"), 1, "", "mount path must be absolute")
    expect(node, create("true", extra="--no-such-flag"), 125, "", "unknown flag: --no-such-flag")
    expect(node, f"docker start {NAME}", 1, "", "No such container: NAME")
    expect(node, f"docker stop {NAME}", 1, "", "No such container: NAME")
    expect(node, f"docker rm {NAME}", 1, "", "No such container: NAME")
    expect(node, f"docker wait {NAME}", 1, "", "No such container: NAME")
    expect(node, f"docker logs {NAME}", 1, "", "No such container: NAME")
    expect(node, "docker ps --filter nonsense=1", 1, "", "nonsense")


def test_a_program_that_is_not_in_the_image(node: Host) -> None:
    """With --init it is a container that starts and ends with 127; without, one that does not start."""
    missing = f"--entrypoint no-such-program {IMAGE} a"
    expect(node, f"docker create --name {NAME} --init {missing}", out="ID\n")
    expect(node, f"docker start {NAME} && docker wait {NAME}", out="NAME\n127\n")
    expect(node, f"docker logs {NAME}", err="no-such-program.*No such file or directory")
    expect(node, f"docker rm {NAME} && docker create --name {NAME} {missing}", out="NAME\nID\n")
    expect(node, f"docker start {NAME}", 1, "", "failed to start containers: NAME")
    state = "docker inspect --format '{{.State.Status}}|{{.State.ExitCode}}|{{.State.Error}}'"
    done = ask(node, f"{state} {NAME}")
    assert re.match(r'created\|127\|.*exec: "no-such-program": executable file not found', done.stdout), done


def test_a_csv_mount_and_a_shared_log(node: Host) -> None:
    """A folder whose name holds a comma, quotes and a space; and lines of both streams."""
    source = 'a,b "c" d'
    expect(node, f"mkdir -p ~/'{source}' && echo inside >~/'{source}/f'")
    mount = '--mount type=bind,\'"source=\'"$HOME"/\'a,b ""c"" d"\',target=/orch/odd,readonly'
    expect(node, f"docker create --name {NAME} --init --entrypoint cat {mount} {IMAGE} /orch/odd/f", out="ID\n")
    expect(node, f"docker start {NAME} >/dev/null && docker wait {NAME} && docker logs {NAME}", out="0\ninside\n")
    expect(
        node,
        f"docker rm {NAME} >/dev/null; " + create("for i in 1 2 3; do echo out $i; done; echo end >&2"),
        out="ID\n",
    )
    expect(node, f"docker start {NAME} >/dev/null && docker wait {NAME}", out="0\n")
    expect(node, f"docker logs {NAME}", out="out 1\nout 2\nout 3\n", err="^end\n$")
    expect(node, f"docker logs --tail 2 {NAME} 2>&1 | wc -l | tr -d ' '", out="2\n")
