"""The cause that an attached operator was told stays the cause, whatever a lost node says when it is back."""

from __future__ import annotations

from types import SimpleNamespace

from orchestrator.backends.base import Found, NodeStatus
from orchestrator.runs import History, Record
from orchestrator.specs import Node, NodeResult, Run, RunState
from orchestrator.workflows.deploy import conclude
from orchestrator.workflows.locate import Located
from orchestrator.workflows.runs import explain, inspect

NODES = (Node("n1", "10.0.0.1"), Node("n2", "10.0.0.2"))


def test_a_told_cause_is_told_again(tmp_path) -> None:
    history = History.open(tmp_path / "runs.sqlite")
    run = Run("demo-20260131-120000-ab12", "demo", RunState.RUNNING, "ssh", ("n1", "n2"), 1.0)
    found = Found(run, {"n1": "/r", "n2": "/r"})
    history.record(Record(run, NODES, run_dir="/r", spec={"command": ["train.py"]}))
    stopped = NodeResult("n1", 0, RunState.STOPPED, 143, ended_ns=5)
    lost = NodeResult("n2", 1, RunState.LOST, 1, ended_ns=4, reason="the Docker engine stopped answering")
    backend = SimpleNamespace(
        remove=lambda *_, **__: {},
        status=lambda *_, **__: {
            "n1": NodeStatus("n1", RunState.STOPPED, stopped),
            "n2": NodeStatus("n2", RunState.STOPPED, stopped),
        },
        read_file=lambda *_: b"",
    )
    ended = conclude(backend, found, NODES, history, {"n1": stopped, "n2": lost})
    assert ended.diagnosis is not None and ended.diagnosis.node == "n2"

    located = Located(found, NODES, backend, {})
    assert explain(located, history) == (ended.run, ended.diagnosis)
    assert inspect(located, history).run == ended.run
    assert history.get(run.id).spec["command"] == ["train.py"]

    history.delete(run.id)  # the nodes alone know no better than what they say now
    assert explain(located, history)[1] is None
