"""Listing, status, stop, why and prune on a scripted backend and on fake nodes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from orchestrator.backends.base import NodeStatus
from orchestrator.backends.found import planned
from orchestrator.config import load
from orchestrator.errors import ConnectError, DeadlineError, NodesFailed, RemoteError
from orchestrator.runs import History, Record
from orchestrator.specs import NodeResult, RankError, RankResult, RunState
from orchestrator.workflows import backends, runs
from orchestrator.workflows.locate import Located

DOWN = ConnectError("no route to host", hint="is it on?")


def status(state: str, code: int | None = None, name: str = "n1", **more) -> NodeStatus:
    result = None if code is None else NodeResult(name, 0, RunState(state), code, ended_ns=60 * 10**9, **more)
    return NodeStatus(name, RunState(state), result, result.reason if result else "")


RUNNING = {"n1": status("running"), "n2": status("running")}
STOPPED = {"n1": status("stopped", 143), "n2": status("stopped", 143)}


@pytest.fixture
def history(tmp_path) -> History:
    return History.open(tmp_path / "runs.sqlite")


@pytest.fixture
def case(scripted, history):
    """case(status, status, …) → a located run whose nodes answer so, one after the other."""

    def make(*statuses):
        backend = scripted()
        backend.statuses = list(statuses)
        backend.read_file = lambda found, node, name: b""
        history.record(Record(run=backend.found.run, nodes=backend.nodes))
        return Located(backend.found, backend.nodes, backend, {})

    return make


@pytest.fixture
def time_flies(monkeypatch) -> list[float]:
    """Sleeping costs no time, only the clock's."""
    slept: list[float] = []
    clock = SimpleNamespace(
        monotonic=lambda: 1000.0 + sum(slept), sleep=slept.append, time=lambda: 2000.0, time_ns=lambda: 0
    )
    monkeypatch.setattr(runs, "time", clock)
    return slept


# -- stop ------------------------------------------------------------------------------------


def stop(located, history, *, kill: bool = False, wait: float = 60):
    told: list[str] = []
    return runs.stop_run(located, history, kill=kill, wait=wait, notify=told.append), told


def test_stop_waits_for_the_end_and_frees_the_nodes(case, history, time_flies) -> None:
    located = case(RUNNING, RUNNING, {**RUNNING, "n2": STOPPED["n2"]}, STOPPED)
    run, told = stop(located, history)
    assert (run.state, run.exit_code) == (RunState.STOPPED, 143)
    assert located.backend.calls == [("stop", False, ("n1", "n2")), ("remove", "r-1", ("n1", "n2"), False)]
    assert told == ["asked r-1 to stop; waiting for its checkpoint and its end"]
    assert history.get("r-1").run.state is RunState.STOPPED


def test_stop_without_waiting(case, history, time_flies) -> None:
    run, _ = stop(case(RUNNING), history, wait=0)
    assert run.state is RunState.STOPPING and time_flies == []


def test_stopping_what_has_ended_only_cleans_up(case, history) -> None:
    located = case(STOPPED)
    run, told = stop(located, history)
    assert run.state is RunState.STOPPED and told == []
    assert located.backend.calls == [("remove", "r-1", ("n1", "n2"), False)]


def test_a_run_that_does_not_stop(case, history, time_flies) -> None:
    located = case(RUNNING, {**RUNNING, "n1": STOPPED["n1"]})
    with pytest.raises(DeadlineError) as caught:
        stop(located, history, wait=30)
    assert caught.value.message == "r-1 has not ended within 30 s of being asked to (still on n2)"
    assert caught.value.exit_code == 3 and "--kill" in caught.value.hint
    assert sum(time_flies) == pytest.approx(30)
    assert located.backend.asked("end") == [] and located.backend.asked("remove") == []


def test_kill_ends_from_outside_what_does_not_heed_it(case, history, time_flies) -> None:
    located = case(RUNNING, *[RUNNING] * 30, STOPPED)
    run, told = stop(located, history, kill=True)
    assert run.state is RunState.STOPPED and told == ["asked r-1 to stop at once"]
    assert located.backend.asked("stop") == [("stop", True, ("n1", "n2"))]
    assert located.backend.asked("end") == [("end", ("n1", "n2"))]


def test_some_nodes_cannot_be_asked(case, history, time_flies) -> None:
    located = case(RUNNING, {"n1": STOPPED["n1"], "n2": DOWN})
    located.backend.errors = {"n2": DOWN}
    run, told = stop(located, history)
    assert told[0] == "n2: not asked to stop: no route to host"
    assert run.state is RunState.LOST


def test_no_node_can_be_asked(case, history) -> None:
    located = case(RUNNING)
    located.backend.errors = {"n1": DOWN, "n2": DOWN}
    with pytest.raises(NodesFailed, match="no node could be asked to stop") as caught:
        stop(located, history)
    assert caught.value.exit_code == 3
    with pytest.raises(NodesFailed, match="no node of this run answers"):
        stop(case({"n1": DOWN, "n2": DOWN}), history)


# -- status and why --------------------------------------------------------------------------


def test_status_of_a_run(case, history) -> None:
    located = case({"n1": status("failed", 1, reason="no interface"), "n2": DOWN})
    step = {"schema": 1, "kind": "step", "time": 5.0, "attempt": 1, "rank": 0, "step": 7, "loss": 2.5}
    kept = {"schema": 1, "kind": "checkpoint", "time": 6.0, "attempt": 1, "rank": 0, "step": 7, "path": "/c/step_7"}
    text = "\n".join(json.dumps(each) for each in (step | {"tokens_per_s": 12345.6}, kept)) + "\n"
    located.backend.read_file = lambda found, node, name: text.encode() if node.name == "n1" else b""
    view = runs.inspect(located, history)
    assert [row.cells() for row in view.nodes] == [
        ("n1", "failed", 1, "no interface"),
        ("n2", "unreachable", None, "no route to host"),
    ]
    assert view.progress == "step 7  loss 2.5000  12,346 tokens/s" and view.checkpoints == (
        "n1:/runs/n1/checkpoints/step_7",
    )
    shown = json.loads(json.dumps(view.to_json()))
    assert (shown["state"], shown["last_step"]["step"], shown["per_node"][1]["state"]) == ("failed", 7, "unreachable")
    assert history.get("r-1").run.state is RunState.FAILED


def test_status_of_a_step_without_numbers(case, history) -> None:
    """Numbers that the trainer did not write (or wrote as NaN) are None: see events.py."""
    located = case(RUNNING)
    located.backend.read_file = lambda *each: b'{"schema": 1, "kind": "step", "time": 5.0, "rank": 0, "step": 7}\n'
    assert runs.inspect(located, history).progress == "step 7"


def test_status_when_nobody_answers(case, history) -> None:
    with pytest.raises(NodesFailed):
        runs.inspect(case({"n1": DOWN, "n2": DOWN}), history)
    located = case({"n1": DOWN})
    with pytest.raises(ConnectError):
        runs.inspect(located, history)
    assert history.get("r-1").run.state is RunState.RUNNING


def test_why(case, history) -> None:
    rank = RankResult(1, 1, 1, error=RankError(1, "KeyError", "x", "T", 5))
    located = case({"n1": status("failed", 1, ranks=(rank,)), "n2": DOWN})
    run, cause = runs.explain(located, history)
    assert run.state is RunState.FAILED
    assert (cause.cause, cause.victims) == (
        "rank 1 on n1: KeyError: x",
        ("n2: UnreachableError: does not answer now: no route to host",),
    )
    assert runs.explain(case(STOPPED), history)[1] is None
    assert runs.explain(case(RUNNING), history)[1] is None


# -- what the nodes tell ---------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch, cluster):
    """A configuration whose one target is the fake cluster."""
    file = tmp_path / "orch.yaml"
    file.write_text("name: demo\ntargets: {default: sim, sim: {backend: ssh, inventory: inv.yaml}}\n")
    config = load(file)
    monkeypatch.setattr(backends, "make", lambda name, config, nodes: cluster.backend)
    inventory = SimpleNamespace(nodes=cluster.nodes)
    return SimpleNamespace(config=config, target=config.target(), inventory=lambda target: inventory)


def given(project):
    return project.config, project.target, project.inventory


def test_running_and_prune(cluster, project, monkeypatch) -> None:
    for name in ("old-20260131-120000-ab12", "new-20260131-120001-ab12"):
        plan = cluster.plan(name, nodes=cluster.nodes[:2])
        cluster.backend.submit(plan, cluster.tell)
        if name.startswith("old"):
            for node in ("n1", "n2"):
                cluster[node].finish("orch", 1)
    found, errors = runs.running(*given(project))
    assert [each.run.id for each in found] == ["new-20260131-120001-ab12"] and errors == {}
    assert dict(found[0].dirs).keys() == {"n1", "n2"}

    # the ended one left no result: it reads as a run whose image is still being pulled
    assert runs.prunable(*given(project), keep=0)[2] == []
    monkeypatch.setattr(runs, "PULL_S", 0.0)
    backend, nodes, ended = runs.prunable(*given(project), keep=1)
    assert ended == []
    backend, nodes, ended = runs.prunable(*given(project), keep=0)
    assert [each.run.id for each in ended] == ["old-20260131-120000-ab12"]
    assert runs.prune_runs(backend, nodes, ended) == {}
    assert cluster.containers()["n1"] == [("new-20260131-120001-ab12", "running")]
    assert [each for each in cluster.files() if ":runs/old" in each] == []
    assert [each for each in cluster.files() if ":runs/new" in each]


def test_prune_names_the_nodes_it_could_not_clean(cluster, project) -> None:
    plan = cluster.plan(nodes=cluster.nodes[:2])
    cluster.backend.submit(plan, cluster.tell)
    found = planned(plan, 0.0)
    for node in ("n1", "n2"):
        cluster[node].finish("orch", 0)
    cluster["n2"].fail("rm", "Error response from daemon: busy")
    errors = runs.prune_runs(cluster.backend, cluster.nodes, [found])
    assert list(errors) == ["n2"] and isinstance(errors["n2"], RemoteError)
    assert [each for each in cluster.files() if ":runs/" in each] == [f"n2:runs/{plan.spec.run_id}"]


def test_nodes_that_do_not_answer(cluster, project) -> None:
    cluster["n1"].down()
    found, errors = runs.running(*given(project))
    assert (found, list(errors)) == ([], ["n1"])
    cluster["n2"].down()
    cluster["n3"].down()
    with pytest.raises(NodesFailed, match="no node answered"):
        runs.running(*given(project))
