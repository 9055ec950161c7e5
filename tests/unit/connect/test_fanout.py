from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from orchestrator.connect.fanout import fanout, raise_failures
from orchestrator.errors import AuthError, ConnectError, DeadlineError, NodesFailed, OrchError
from orchestrator.specs import Node

NODES = [Node(f"n{number}", "x") for number in range(5)]


class Stuck:
    """A function that waits for ever on some nodes, until the test ends."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.release = threading.Event()

    def __call__(self, node: Node) -> str:
        if node.name in self.names:
            self.release.wait(30)
        return node.name


def test_every_node_answers_in_the_order_given() -> None:
    assert list(fanout(reversed(NODES), lambda node: node.name, deadline=5, what="ask").items()) == [
        (node.name, node.name) for node in reversed(NODES)
    ]


def test_no_nodes_no_answers() -> None:
    assert fanout([], lambda node: 1, deadline=5, what="ask") == {}


def test_errors_are_results_and_get_their_node() -> None:
    def fn(node: Node) -> str:
        if node.name == "n1":
            raise ConnectError("refused")
        if node.name == "n2":
            raise ValueError("two\nlines")
        if node.name == "n3":
            sys.exit(3)
        return "ok"

    results = fanout(NODES, fn, deadline=5, what="look")
    assert [results["n0"], results["n4"]] == ["ok", "ok"]
    assert str(results["n1"]) == "n1: refused"
    assert str(results["n2"]) == "n2: look: unexpected ValueError: two"
    assert isinstance(results["n2"].__cause__, ValueError)
    assert "SystemExit" in str(results["n3"])


def test_a_late_node_has_missed_its_deadline_and_the_others_answer() -> None:
    stuck = Stuck("n2")
    began = time.monotonic()
    results = fanout(NODES, stuck, deadline=0.2, what="pull the image")
    assert time.monotonic() - began < 2
    assert isinstance(results["n2"], DeadlineError)
    assert str(results["n2"]) == "n2: pull the image: not done after 0.2 s"
    assert [name for name, result in results.items() if result == name] == ["n0", "n1", "n3", "n4"]
    stuck.release.set()


def test_a_node_whose_turn_did_not_come_says_so_and_is_not_started_later() -> None:
    stuck = Stuck("n0")
    seen: list[str] = []

    def fn(node: Node) -> str:
        seen.append(node.name)
        return stuck(node)

    results = fanout(NODES[:2], fn, deadline=0.2, what="x", width=1)
    assert "its turn had not come" in str(results["n1"])
    stuck.release.set()
    assert seen == ["n0"]


def test_no_more_threads_than_the_width() -> None:
    lock, busy, most = threading.Lock(), 0, 0
    gate = threading.Barrier(2, timeout=5)

    def fn(number: str) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        gate.wait()
        with lock:
            busy -= 1

    fanout([str(number) for number in range(8)], fn, deadline=10, what="x", width=2)
    assert most == 2


def test_ctrl_c_gets_through_at_once() -> None:
    program = (
        "import time, threading\n"
        "from orchestrator.connect.fanout import fanout\n"
        "print('go', flush=True)\n"
        "fanout(['a', 'b'], lambda n: threading.Event().wait(30), deadline=30, what='x')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    process.stdout.close()


def test_raise_failures() -> None:
    assert raise_failures({"a": 1, "b": 2}, "m") == {"a": 1, "b": 2}
    one = ConnectError("refused", node="b")
    with pytest.raises(ConnectError) as caught:
        raise_failures({"a": 1, "b": one}, "m")
    assert caught.value is one
    two = {"a": AuthError("no", node="a", hint="h"), "b": 1, "c": OrchError("x", node="c", hint="h")}
    with pytest.raises(NodesFailed) as several:
        raise_failures(two, "preflight failed")
    assert str(several.value) == "preflight failed on 2 of 3 nodes (a, c)"
    assert list(several.value.errors) == ["a", "c"]
    assert (several.value.exit_code, several.value.hint) == (3, "h")
