"""The fake node's own features; that it answers like a real one is shown in tests/contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.connect.fake import FakeConnector, FakeHost
from orchestrator.connect.fake_client import Failure, TemplateError, options, render
from orchestrator.errors import ConnectError, ConnectionLost, DeadlineError
from orchestrator.specs import Node

NODE = Node("n1", "10.0.0.1", gpus=2)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    made = FakeHost(NODE, tmp_path / "n1", images=["job:v1"], registry=["r.example.com/job:v2"])
    yield made
    made.close()


def test_a_home_of_its_own_and_the_commands_kept(host: FakeHost) -> None:
    assert host.run("echo hi > ~/file; cat", stdin=b"x").stdout == "x"
    assert (host.home / "file").read_text() == "hi\n"
    assert host.commands == ["echo hi > ~/file; cat"]


def test_images_are_pulled_from_the_registry_it_was_given(host: FakeHost) -> None:
    assert host.run("docker pull -q r.example.com/job:v2").stdout == "r.example.com/job:v2\n"
    assert host.images == ["job:v1", "r.example.com/job:v2"]
    done = host.run("docker pull r.example.com/job:v3")
    assert (done.returncode, "manifest unknown" in done.stderr) == (1, True)


def test_a_container_that_does_not_run_really(host: FakeHost) -> None:
    host.run("docker create --name orch --gpus 2 job:v1 && docker start orch")
    assert host.containers[0]["State"]["Status"] == "running"
    host.finish("orch", 75)
    assert host.run("docker wait orch").stdout == "75\n"
    assert host.run("nvidia-smi -L").stdout.count("GPU ") == 2


def test_state_stays_with_the_folder(host: FakeHost) -> None:
    host.run("docker create --name orch job:v1")
    again = FakeHost(NODE, host.root)
    assert again.run("docker ps -aq --no-trunc").stdout.strip() == host.containers[0]["Id"]


def test_ordered_faults(host: FakeHost) -> None:
    host.fail("pull", "toomanyrequests", times=2)
    assert [host.run("docker pull r.example.com/job:v2").returncode for _ in range(3)] == [1, 1, 0]
    host.engine(up=False)
    assert "Is the docker daemon running?" in host.run("docker version").stderr
    host.engine(up=True)
    assert host.run("docker version").ok


def test_down_hang_and_cut(host: FakeHost) -> None:
    connector = FakeConnector({"n1": host})
    stream = connector.connect(NODE).stream("echo a; sleep 60")
    assert stream.read(5) == b"a\n"
    host.cut()
    with pytest.raises(ConnectionLost):
        stream.read(5)
    host.hang()
    with pytest.raises(DeadlineError, match=r"n1: the command did not end within 7 s"):
        host.run("true", timeout=7)
    host.down()
    with pytest.raises(ConnectError, match="no route to host"):
        connector.connect(NODE)
    host.up()
    assert host.run("echo back").stdout == "back\n"
    with pytest.raises(ConnectError, match="cannot be resolved"):
        connector.connect(Node("n9", "x"))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{.A.B}}|{{ .N }}", "x y|<nil>"),
        ("{{json .A}}", '{"B":"x y","T":true}'),
        ('{{index .A "B"}}{{index .L 1}}', "x y2"),
        ("{{.A}} {{.L}} {{len .L}}", "map[B:x y T:true] [1 2] 2"),
        ("{{range .L}}<{{.}}>{{end}}!", "<1><2>!"),
        ("{{range .E}}<{{.}}>{{end}}!", "!"),
        ("{{if .E}}no{{end}}{{if .L}}yes {{.A.B}}{{end}}", "yes x y"),
        ("{{range .L}}{{println .}}{{end}}", "1\n2\n"),
    ],
)
def test_go_templates(template: str, text: str) -> None:
    assert render(template, {"A": {"B": "x y", "T": True}, "N": None, "L": [1, 2], "E": []}) == text


@pytest.mark.parametrize("template", ["{{.X}}", "{{nonsense .A}}", "{{end}}", "{{range .L}}", "{{.A | json}}"])
def test_templates_that_are_not_understood_are_errors(template: str) -> None:
    with pytest.raises(TemplateError):
        render(template, {"A": {}, "L": [1]})


def test_options_as_the_client_reads_them() -> None:
    short = {"a": "all", "q": "quiet", "f": "filter"}
    found, rest = options(
        ["-aq", "-f", "a=b", "--filter=c=d", "x", "-q", "--", "-y"], {"filter"}, {"all", "quiet"}, short
    )
    assert (found, rest) == (
        {"all": ["true"], "quiet": ["true", "true"], "filter": ["a=b", "c=d"]},
        ["x", "-y"],
    )
    assert options(["-q", "image", "-q"], set(), {"quiet"}, short, stop=True)[1] == ["image", "-q"]
    for wrong in (["--nope"], ["-z"], ["--filter"]):
        with pytest.raises(Failure):
            options(wrong, {"filter"}, set(), short)
