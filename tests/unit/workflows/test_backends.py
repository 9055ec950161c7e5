"""Which backend is made, and when it connects."""

from __future__ import annotations

import threading

import pytest

from orchestrator.config import Config
from orchestrator.connect.ssh import SshConnector
from orchestrator.errors import ConfigError, ConnectError
from orchestrator.specs import Node
from orchestrator.workflows import backends

NODES = [Node(name="n1", address="192.0.2.1"), Node(name="n2", address="192.0.2.2")]


def test_it_connects_to_all_nodes_at_once_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=10)

    def connect(self: SshConnector, node: Node, **_: float) -> None:
        together.wait()
        raise ConnectError("no route", node=node.name)  # shows at the node's first use, not here

    monkeypatch.setattr(SshConnector, "connect", connect)
    assert backends.make("ssh", Config(), NODES, connect=True).name == "ssh"
    together.wait()


def test_it_contacts_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SshConnector, "open", lambda *_: pytest.fail("connected"))
    assert backends.make("ssh", Config(), NODES).name == "ssh"
    assert backends.make("local", Config(), NODES[:1], connect=True).name == "local"


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="'k8s' is not available"):
        backends.make("k8s", Config(), NODES)
