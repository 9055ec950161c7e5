"""One connection per node, and one attempt for all who wait for it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.connect.ssh import SshHost
from orchestrator.errors import ConnectError
from orchestrator.specs import Node

NODE = Node(name="n1", address="192.0.2.1")


class Line:
    """A connector whose attempts end when the test says so."""

    def __init__(self) -> None:
        self.attempts = 0
        self.tried = threading.Event()
        self.answer = threading.Event()
        self.up = False

    def open_transport(self, node: Node, deadline: float) -> Any:
        self.attempts += 1
        self.tried.set()
        assert self.answer.wait(10)
        if not self.up:
            raise ConnectError("no route", node=node.name)
        return SimpleNamespace(is_active=lambda: True)


def ask(host: SshHost, into: list[Any]) -> threading.Thread:
    def call() -> None:
        try:
            into.append(host.transport(time.monotonic() + 10))
        except ConnectError as error:
            into.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("up", [True, False])
def test_who_waits_for_an_attempt_shares_its_outcome(up: bool) -> None:
    line, got = Line(), []
    line.up = up
    host = SshHost(NODE, line, 15.0)  # type: ignore[arg-type]
    first = ask(host, got)
    assert line.tried.wait(10)
    entered = threading.Event()
    acquire = host._lock.acquire
    host._lock = SimpleNamespace(  # type: ignore[assignment]
        acquire=lambda **options: (entered.set(), acquire(**options))[1], release=host._lock.release
    )
    second = ask(host, got)
    assert entered.wait(10)
    line.answer.set()
    first.join(10)
    second.join(10)
    assert line.attempts == 1 and len(got) == 2
    assert got[0] is got[1] if up else [str(error) for error in got] == ["n1: no route"] * 2
    assert up or got[0] is not got[1]  # each may be worded further by its caller


def test_a_later_use_tries_again() -> None:
    line, got = Line(), []
    line.answer.set()
    host = SshHost(NODE, line, 15.0)  # type: ignore[arg-type]
    ask(host, got).join(10)
    line.up = True
    ask(host, got).join(10)
    assert isinstance(got[0], ConnectError) and got[1].is_active() and line.attempts == 2
