"""From a prefix to a run: the history first, the nodes where it does not know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestrator.backends.base import Found
from orchestrator.config import load
from orchestrator.errors import ConnectError, UsageError
from orchestrator.runs import History, Record
from orchestrator.specs import Node, Run, RunState
from orchestrator.workflows import backends
from orchestrator.workflows.locate import locate, nodes_of

NODES = tuple(Node(name, "203.0.113.1") for name in ("n1", "n2"))


def run(name: str, started: float = 1.0, nodes=("n1", "n2")) -> Run:
    return Run(name, "demo", RunState.RUNNING, "ssh", tuple(nodes), started)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty history, and nodes that know `found`; `asked` counts the questions to them."""
    file = tmp_path / "orch.yaml"
    file.write_text("name: demo\ntargets: {default: sim, sim: {backend: ssh, inventory: inv.yaml}}\n")
    config = load(file)
    case = SimpleNamespace(history=History.open(tmp_path / "runs.sqlite"), found=[], errors={}, asked=0)

    def discover(nodes, runs):
        case.asked += 1
        assert [node.name for node in nodes] == ["n1", "n2"]
        return case.found, case.errors

    case.backend = SimpleNamespace(discover=discover)
    monkeypatch.setattr(backends, "make", lambda name, config, nodes: case.backend)
    inventory = SimpleNamespace(nodes=NODES)
    case.locate = lambda prefix: locate(prefix, config, case.history, config.target(), lambda target: inventory)
    return case


def remember(case, *runs_: Run) -> None:
    for each in runs_:
        case.history.record(Record(run=each, nodes=NODES, run_dir=f"~/runs/{each.id}", target="sim", spec={"procs": 2}))


def test_the_history_answers_without_a_question_to_the_nodes(place) -> None:
    remember(place, run("a-1", 5.0), run("b-2", 9.0))
    located = place.locate("a")
    assert (located.found.run.id, located.nodes, located.target) == ("a-1", NODES, "sim")
    assert dict(located.found.dirs) == {"n1": "~/runs/a-1", "n2": "~/runs/a-1"} and located.spec == {"procs": 2}
    assert place.locate(None).found.run.id == "b-2"
    assert place.locate("a-1").found.run.id == "a-1"
    assert place.asked == 0


def test_a_prefix_of_several_runs_is_refused_at_once(place) -> None:
    remember(place, run("demo-1"), run("demo-2"))
    with pytest.raises(UsageError, match="'demo' begins 2 runs") as caught:
        place.locate("demo")
    assert sorted(caught.value.lines) == ["demo-1", "demo-2"] and caught.value.exit_code == 2
    assert place.asked == 0


def test_without_a_history_the_nodes_are_asked(place) -> None:
    place.found = [
        Found(run("demo-2", 9.0, ("n2", "n1")), {"n1": "/r/2", "n2": "/r/2"}, "ann"),
        Found(run("demo-1", 5.0), {"n2": "/r/1"}, "ann"),
    ]
    located = place.locate("demo-1")
    assert (located.found.run.id, [node.name for node in located.nodes]) == ("demo-1", ["n2"])
    newest = place.locate(None)
    assert (newest.found.run.id, [node.name for node in newest.nodes]) == ("demo-2", ["n2", "n1"])
    with pytest.raises(UsageError, match="'demo' begins 2 runs: demo-2, demo-1"):
        place.locate("demo")


def test_nobody_knows_it(place) -> None:
    with pytest.raises(UsageError, match=r"no run begins with 'x', nor do the nodes know it$"):
        place.locate("x")
    place.errors = {"n2": ConnectError("down")}
    with pytest.raises(UsageError, match=r"nor do the nodes know it \(no answer from n2\)") as caught:
        place.locate("x")
    assert caught.value.exit_code == 2 and caught.value.hint
    with pytest.raises(UsageError, match="there is no run yet"):
        place.locate(None)


def test_a_prefix_is_no_pattern(place) -> None:
    remember(place, run("demo-1"))
    for prefix in ("demo_1", "%", "*", "d.*"):
        with pytest.raises(UsageError):
            place.locate(prefix)


def test_the_nodes_of_a_run() -> None:
    found = Found(run("a", nodes=("n2", "n1")), {"n1": "x", "n2": "y"})
    assert [node.name for node in nodes_of(found, NODES)] == ["n2", "n1"]
    assert [node.name for node in nodes_of(Found(found.run, {"n1": "x"}), NODES)] == ["n1"]
    renamed = Found(run("a", nodes=("gpu1",)), {"n2": "x"})
    assert [node.name for node in nodes_of(renamed, NODES)] == ["n2"]
