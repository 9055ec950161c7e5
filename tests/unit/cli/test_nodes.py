"""`orch nodes` over a connector that answers from a table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.cli import main as frame
from orchestrator.cli import nodes as command
from orchestrator.connect.base import Completed
from orchestrator.connect.known_hosts import HostKey, host_name, pin
from orchestrator.errors import ConnectError
from orchestrator.workflows import nodes as workflow

OLD = HostKey("ssh-ed25519", "AAAA")
NEW = HostKey("ssh-ed25519", "BBBB")


class Machines:
    """Answers for `SshConnector`: what each node prints, which keys it shows, which nodes are down."""

    def __init__(self, pins: Path) -> None:
        self.answers: dict[str, Completed] = {}
        self.keys: dict[str, HostKey] = {}
        self.down: set[str] = set()
        self.lines: list[tuple[str, str, float]] = []
        self.pins = pins
        self.closed = False

    def _reach(self, node) -> None:
        if node.name in self.down:
            raise ConnectError("no route to host", node=node.name, hint="is it on?")

    def connect(self, node, *, timeout=15.0):
        self._reach(node)

        def run(line, *, stdin=None, timeout=60.0):
            self.lines.append((node.name, line, timeout))
            return self.answers.get(node.name, Completed(0, "same\n", ""))

        return SimpleNamespace(run=run, node=node)

    def scan(self, node, *, timeout=15.0):
        self._reach(node)
        return [self.keys.get(node.name, OLD)]

    def endpoint(self, node):
        return SimpleNamespace(alias=host_name(node.address), known_hosts=(self.pins,))

    def trust(self, node, keys, *, replace=False):
        return pin(host_name(node.address), keys, self.pins, node=node.name, replace=replace)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def machines(tmp_path, monkeypatch):
    (tmp_path / "orch.yaml").write_text("targets: {sim: {inventory: inv.yaml, gpus: 2}}\n")
    (tmp_path / "inv.yaml").write_text(
        "nodes: {n1: {gpus: 8, labels: {rack: a}}, n2: , n3: }\ngroups: {pair: [n1, n2]}\n"
    )
    monkeypatch.chdir(tmp_path)
    made = Machines(tmp_path / "pins")
    monkeypatch.setattr(command, "_connector", lambda inventory: made)
    return made


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        frame.main(["nodes", *argv])
    return caught.value.code


def test_list(machines, capsys):
    assert run("list", "pair", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["n1", "n2"]
    assert rows[0]["labels"] == {"rack": "a"} and rows[0]["groups"] == ["pair"]
    assert run("list") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["n1", "n1", "-", "-", "8", "pair", "rack=a"]


def test_exec_folds_what_is_the_same_and_ends_with_the_worst_code(machines, capsys):
    machines.answers["n2"] = Completed(3, "other\n", "oops\x1b[2J\n")
    assert run("exec", "--", "nvidia-smi", "-L", "a b") == 3
    captured = capsys.readouterr()
    assert captured.out == "n[1,3] | same\nn2     | other\n"
    assert captured.err == "n2     | oops\\x1b[2J\nn2     | exit code 3\n"
    assert {line for _, line, _ in machines.lines} == {"nvidia-smi -L 'a b'"}
    assert machines.closed


def test_one_word_is_a_line_for_the_shell(machines):
    assert run("exec", "--nodes", "n1", "--timeout", "5", "df -h | tail -1") == 0
    assert machines.lines == [("n1", "df -h | tail -1", 5.0)]


def test_exec_with_a_node_down(machines, capsys):
    machines.down.add("n3")
    assert run("exec", "true") == 3
    captured = capsys.readouterr()
    assert captured.out == "n[1-2] | same\n" and "error: n3: no route to host\nhint: is it on?" in captured.err
    machines.down |= {"n2"}
    assert run("exec", "--json", "true") == 3
    captured = capsys.readouterr()
    assert [row["error"] for row in json.loads(captured.out)] == [None, "no route to host", "no route to host"]
    assert "on 2 of 3 nodes (n2, n3)" in captured.err


def test_exec_needs_a_command_and_enough_nodes(machines, capsys):
    assert run("exec") == 2
    assert run("exec", "--nodes", "8", "true") == 2
    assert "--nodes 8: " in capsys.readouterr().err


def test_trust_pins_after_a_yes_only(machines, capsys):
    assert run("trust", "n1") == 2
    assert not machines.pins.exists()
    assert "nothing was pinned" in capsys.readouterr().err
    assert run("trust", "n1", "n2", "--yes", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["node"], len(row["pinned"])) for row in rows] == [("n1", 1), ("n2", 1)]
    assert run("trust", "n1") == 0  # nothing to ask
    assert "already pinned" in capsys.readouterr().err


def test_trust_replaces_a_changed_key_only_when_told(machines, capsys):
    assert run("trust", "--yes") == 0
    machines.keys["n2"] = NEW
    assert run("trust", "--yes") == 3
    error = capsys.readouterr().err
    assert "CHANGED" in error and "has changed" in error
    assert run("trust", "--yes", "--replace") == 0
    assert "BBBB" in machines.pins.read_text()


def test_trust_pins_the_others_when_one_is_down(machines, capsys):
    machines.down.add("n2")
    assert run("trust", "--yes") == 3
    assert "error: n2: no route to host" in capsys.readouterr().err
    assert machines.pins.read_text().count("ssh-ed25519") == 2


def test_check_passes_the_configuration_on_and_ends_with_the_worst_code(machines, monkeypatch, capsys):
    asked = {}

    def check(nodes, connector, **more):
        asked.update(more, nodes=[node.name for node in nodes])
        return [workflow.NodeReport(node, error=ConnectError("no route to host", hint="is it on?")) for node in nodes]

    monkeypatch.setattr(workflow, "check", check)
    assert run("check", "n[1-2]") == 3
    assert asked["nodes"] == ["n1", "n2"] and asked["gpus"] == 2 and asked["port"] == 29400
    captured = capsys.readouterr()
    assert "no answer" in captured.out and "hint: is it on?" in captured.err
    assert run("check", "--gpus", "4", "--json") == 3
    assert asked["gpus"] == 4 and len(json.loads(capsys.readouterr().out)) == 3
