"""Runs as the nodes tell them: merging, states, exit codes."""

from __future__ import annotations

import json
from itertools import combinations, permutations

import pytest

from orchestrator.backends.base import NodePlan, NodeStatus, Plan
from orchestrator.backends.found import conclude, exit_code, merge, node_status, overall, planned
from orchestrator.commands.report import Report
from orchestrator.errors import ConnectError
from orchestrator.specs import ImageRef, JobSpec, Node, NodeResult, Run, RunState

STATES = {state.value: state for state in RunState}
RUN = Run("r-1", "r", RunState.RUNNING, "ssh", ("n1", "n2"), 100.0)


def result(state: str, code: int, ended: float = 0, node: str = "n1") -> NodeResult:
    return NodeResult(node, 0, STATES[state], code, ended_ns=int(ended * 1e9))


def status(state: str, code: int | None = None, ended: float = 0) -> NodeStatus:
    return NodeStatus("n1", STATES[state], None if code is None else result(state, code, ended))


# -- states ----------------------------------------------------------------------------------

ORDER = ["running", "starting", "failed", "lost", "stopped", "preempted", "succeeded"]


@pytest.mark.parametrize(("stronger", "weaker"), list(combinations(ORDER, 2)))
def test_of_two_states_the_first_in_order_counts(stronger: str, weaker: str) -> None:
    for pair in permutations([STATES[stronger], STATES[weaker]]):
        assert overall(pair) is STATES[stronger]


def test_nothing_known_is_lost() -> None:
    assert overall([]) is RunState.LOST


@pytest.mark.parametrize(
    ("state", "results", "code"),
    [
        ("running", [], None),
        ("starting", [], None),
        ("succeeded", [("succeeded", 0)], 0),
        ("preempted", [("preempted", 75), ("succeeded", 0)], 75),
        ("failed", [("succeeded", 0), ("failed", 127)], 127),
        ("failed", [("stopped", 143), ("failed", 4)], 4),
        ("failed", [("failed", 0)], 1),
        ("stopped", [("stopped", 143), ("succeeded", 0)], 143),
        ("lost", [("succeeded", 0)], 3),
        ("lost", [("lost", 3)], 3),
        ("lost", [], 3),
    ],
)
def test_exit_codes(state: str, results: list, code: int | None) -> None:
    assert exit_code(STATES[state], [None, *(result(*each) for each in results)]) == code


@pytest.mark.parametrize(
    ("statuses", "state", "code", "ended"),
    [
        ([status("succeeded", 0, 5), status("succeeded", 0, 7)], "succeeded", 0, 7.0),
        ([status("succeeded", 0, 5), status("running")], "running", None, None),
        ([status("starting"), status("failed", 1, 5)], "starting", None, None),
        ([status("failed", 1, 5), status("stopped", 143, 6)], "failed", 1, 6.0),
        ([status("preempted", 75, 5), status("preempted", 75, 6)], "preempted", 75, 6.0),
        ([status("succeeded", 0, 5), ConnectError("down")], "lost", 3, 5.0),
        ([status("failed", 2, 5), ConnectError("down")], "failed", 2, 5.0),
        ([status("running"), ConnectError("down")], "running", None, None),
        ([status("lost")], "lost", 3, None),
    ],
)
def test_conclude(statuses: list, state: str, code: int | None, ended: float | None) -> None:
    for order in permutations(statuses):
        run = conclude(RUN, {f"n{index}": each for index, each in enumerate(order)})
        assert (run.state.value, run.exit_code, run.ended) == (state, code, ended)
        assert (run.id, run.started) == ("r-1", 100.0)


def test_conclude_without_any_answer_changes_nothing() -> None:
    assert conclude(RUN, {"n1": ConnectError("down")}) is RUN
    assert conclude(RUN, {}) is RUN


@pytest.mark.parametrize(
    ("report", "state", "detail"),
    [
        (Report("created", None, None), "starting", ""),
        (Report("running", None, None), "running", ""),
        (Report("gone", None, None), "lost", "the container or process is gone and left no result"),
        (Report("exited", 0, result("preempted", 75)), "preempted", ""),
    ],
)
def test_node_status(report: Report, state: str, detail: str) -> None:
    found = node_status(report, "n2", 1)
    assert (found.node, found.state.value, found.detail) == ("n2", state, detail)
    assert (found.result is None) is (state in ("starting", "running"))


def test_planned() -> None:
    node = Node("n1", "203.0.113.1")
    spec = JobSpec("r-1", "r", (node,), 1, ("x",), image=ImageRef("a", "b"), operator="me", attempt=3)
    found = planned(Plan(spec, (NodePlan(node, 0, {}, "~/runs/r-1", ()),)), 7.0)
    assert found.run == Run("r-1", "r", RunState.PENDING, "ssh", ("n1",), 7.0, image="a:b", attempt=3)
    assert found.dirs == {"n1": "~/runs/r-1"} and found.operator == "me"


# -- merge -----------------------------------------------------------------------------------


def job(run: str = "r-1", node: str = "n1", names: tuple[str, ...] = ("n1", "n2")) -> dict:
    return {
        "run": run,
        "name": "demo",
        "node": node,
        "node_names": list(names),
        "backend": "ssh",
        "image": "i:1",
        "attempt": 2,
        "operator": "me@here",
    }


def folder(content: dict, time: float = 50.0, outcome: dict | None = None, alive: bool = False, at: str = "") -> dict:
    return {"dir": at or f"/runs/{content.get('run')}", "time": time, "alive": alive, "job": content, "result": outcome}


def container(run: str = "r-1", state: str = "running", names: tuple[str, ...] = ("n1", "n2")) -> dict:
    summary = {"name": "demo", "attempt": 2, "backend": "ssh", "image": "i:1", "node_names": list(names)}
    labels = {
        "orch.run": run,
        "orch.dir": f"~/runs/{run}",
        "orch.operator": "me@here",
        "orch.job": json.dumps(summary),
    }
    return {"state": {"Status": state, "StartedAt": "2026-11-20T23:59:29.352780363Z"}, "labels": labels}


def ended(state: str, code: int, node: str = "n1", at: float = 60) -> dict:
    return {"node": node, "index": 0, "state": state, "exit_code": code, "ended_ns": int(at * 1e9)}


def test_a_run_on_two_nodes_is_one_run() -> None:
    (found,) = merge(
        {
            "n1": ([container()], [folder(job())]),
            "n2": ([container()], [folder(job(node="n2"), time=51.0)]),
        }
    )
    assert found.run == Run("r-1", "demo", RunState.RUNNING, "ssh", ("n1", "n2"), 50.0, image="i:1", attempt=2)
    assert (dict(found.dirs), found.operator) == ({"n1": "/runs/r-1", "n2": "/runs/r-1"}, "me@here")


def test_runs_come_newest_first() -> None:
    runs = [folder(job(run), time) for run, time in (("a", 5.0), ("c", 9.0), ("b", 7.0))]
    assert [each.run.id for each in merge({"n1": ([], runs)})] == ["c", "b", "a"]


def test_an_ended_run() -> None:
    (found,) = merge(
        {
            "n1": ([], [folder(job(), outcome=ended("succeeded", 0))]),
            "n2": ([], [folder(job(node="n2"), outcome=ended("failed", 4, "n2", 70))]),
        }
    )
    assert (found.run.state, found.run.exit_code, found.run.ended) == (RunState.FAILED, 4, 70.0)


@pytest.mark.parametrize(
    ("containers", "row", "state"),
    [
        ([container()], folder(job()), "running"),
        ([container(state="created")], folder(job()), "starting"),
        ([container(state="paused")], folder(job()), "running"),
        ([container(state="exited")], folder(job()), "lost"),
        ([], folder(job()), "lost"),
        ([], folder(job(), alive=True), "running"),
        ([container()], folder(job(), outcome=ended("preempted", 75)), "preempted"),
        ([], folder(job(), outcome={"state": "odd"}), "failed"),
        ([], folder(job(), outcome=[1]), "failed"),  # type: ignore[arg-type]
        ([container("other")], folder(job()), "lost"),
    ],
)
def test_the_state_on_one_node(containers: list, row: dict, state: str) -> None:
    found = {each.run.id: each for each in merge({"n1": (containers, [row])})}
    assert found["r-1"].run.state.value == state


def test_a_container_without_its_folder() -> None:
    (found,) = merge({"n1": ([container()], [])})
    assert found.run.name == "demo" and found.run.nodes == ("n1", "n2")
    assert found.run.started == 1795219169.0
    assert dict(found.dirs) == {"n1": "~/runs/r-1"} and found.operator == "me@here"


def test_a_container_that_never_started_has_no_start() -> None:
    row = container(state="created")
    row["state"]["StartedAt"] = "0001-01-01T00:00:00Z"
    (found,) = merge({"n1": ([row], [])})
    assert (found.run.started, found.run.state) == (0.0, RunState.STARTING)
    row["labels"]["orch.job"] = "{torn"
    (found,) = merge({"n1": ([row], [])})
    assert (found.run.name, found.run.nodes) == ("r-1", ())


def test_on_shared_storage_each_node_tells_only_of_itself() -> None:
    rows = [
        folder(job(node=node), at=f"/nfs/r-1/{node}", outcome=ended("succeeded", 0, node) if node == "n2" else None)
        for node in ("n1", "n2")
    ]
    (found,) = merge({"n1": ([container()], rows), "n2": ([], rows)})
    assert dict(found.dirs) == {"n1": "/nfs/r-1/n1", "n2": "/nfs/r-1/n2"}
    assert found.run.state is RunState.RUNNING
    (found,) = merge({"n1": ([container()], rows)})
    assert dict(found.dirs) == {"n1": "/nfs/r-1/n1"}


def test_under_another_inventory_with_other_names_a_run_is_still_found() -> None:
    (found,) = merge({"gpu7": ([container()], [folder(job())])})
    assert dict(found.dirs) == {"gpu7": "/runs/r-1"} and found.run.nodes == ("n1", "n2")


def test_what_is_no_run_is_passed_over() -> None:
    assert merge({"n1": ([{"labels": {}, "state": {}}], [folder({})])}) == []
    assert merge({}) == []
