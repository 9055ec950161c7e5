"""Start and end of a run, and the rows of the history, on fake nodes."""

from __future__ import annotations

import json
import os
import signal

import pytest

from orchestrator.errors import Interrupted, LeaseError, OrchError, PreflightError, RemoteError
from orchestrator.logs import Sink, View
from orchestrator.runs import History
from orchestrator.specs import NodeResult, RankError, RankResult, RunState, Secret
from orchestrator.workflows import deploy
from orchestrator.workflows.signals import Signals

RUN = "demo-20260131-120000-ab12"


@pytest.fixture
def history(tmp_path) -> History:
    return History.open(tmp_path / "runs.sqlite")


def start(cluster, history, **changes):
    return deploy.start(
        cluster.backend, cluster.plan(**changes), history, cluster.tell, target="sim", inventory="inventory/sim.yaml"
    )


def row(history) -> tuple[str, int | None, bool]:
    (record,) = history.list()
    return record.run.state.value, record.run.exit_code, record.run.ended is not None


def test_a_start_is_recorded_with_all_that_finds_it_again(cluster, history) -> None:
    found = start(cluster, history, series="mine", env={"A": "b"}, secrets={"T": Secret("s3cr3t")})
    assert found.run.state is RunState.RUNNING and row(history) == ("running", None, False)
    (record,) = history.list()
    assert [node.name for node in record.nodes] == ["n1", "n2", "n3"]
    assert (record.target, record.inventory, record.operator) == ("sim", "inventory/sim.yaml", "me@here")
    assert (record.spec["series"], record.spec["command"][0]) == ("mine", "sh")
    again = deploy.found_of(record)
    assert (again.run.id, dict(again.dirs), again.operator) == (RUN, dict(found.dirs), "me@here")
    assert "s3cr3t" not in repr(record) and b"s3cr3t" not in history.path.read_bytes()


def engine_down(host) -> None:
    host.engine(up=False)


def no_create(host) -> None:
    host.fail("create", "Error response from daemon: boom")


def no_start(host) -> None:
    host.fail("start", "Error response from daemon: boom")


def held(host) -> None:
    host.run("docker create --name orch --label orch.run=other registry.example.com/demo:v1 && docker start orch")


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [(engine_down, PreflightError, 4), (no_create, RemoteError, 1), (no_start, RemoteError, 1), (held, LeaseError, 4)],
)
def test_a_start_that_fails_is_recorded_and_undone(make_cluster, history, fault, kind, code: int) -> None:
    cluster = make_cluster(2)
    cluster["n1"].run("docker create --name theirs --label orch.run=theirs registry.example.com/demo:v1")
    fault(cluster["n2"])
    with pytest.raises(kind) as caught:
        start(cluster, history)
    assert caught.value.node == "n2"
    assert row(history) == ("failed", code, True)
    left = cluster.containers()
    assert left == {"n1": [("theirs", "created")], "n2": [("other", "running")] if fault is held else []}
    assert cluster.files() == []


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (Interrupted("interrupted by SIGTERM", signum=15), "stopped", 143),
        (KeyboardInterrupt(), "stopped", 130),
        (OrchError("x"), "failed", 1),
        (ValueError("a bug"), "failed", 1),
    ],
)
def test_no_row_stays_pending(make_cluster, history, monkeypatch, error: BaseException, state: str, code: int) -> None:
    cluster = make_cluster(1)

    def submit(plan, report) -> None:
        assert row(history) == ("pending", None, False)  # a killed operator leaves this
        raise error

    monkeypatch.setattr(cluster.backend, "submit", submit)
    with pytest.raises(type(error)):
        start(cluster, history)
    assert row(history) == (state, code, True)


def test_a_signal_right_after_the_start_is_noted_and_not_taken_for_a_rollback(make_cluster, history) -> None:
    cluster = make_cluster(1)
    with Signals() as signals:

        def started() -> None:
            signals.hold()
            os.kill(os.getpid(), signal.SIGTERM)

        plan = cluster.plan()
        found = deploy.start(
            cluster.backend, plan, history, cluster.tell, target="sim", inventory="", on_started=started
        )
        assert signals.take() == signal.SIGTERM
    assert found.run.state is RunState.RUNNING
    assert row(history) == ("running", None, False)


def test_ctrl_c_during_create_rolls_back(make_cluster, history) -> None:
    """With Python's own handler: no `Signals` is there to turn it into an Interrupted."""
    cluster = make_cluster(2)

    def tell(node: str, text: str) -> None:
        if node == "n2" and text.startswith("preparing"):
            os.kill(os.getpid(), signal.SIGINT)

    cluster.tell = tell
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start(cluster, history)
    finally:
        signal.signal(signal.SIGINT, before)
    assert row(history) == ("stopped", 130, True)
    assert "running" not in str(cluster.containers())


# -- the end ---------------------------------------------------------------------------------


def ended(name: str, state: str, code: int, at: float = 60, **more) -> NodeResult:
    return NodeResult(name, 0, RunState(state), code, ended_ns=int(at * 1e9), **more)


ERROR = RankResult(1, 0, 1, error=RankError(1, "KeyError", "x", "T", 5))


@pytest.mark.parametrize(
    ("results", "state", "code", "cause"),
    [
        ([ended("n1", "succeeded", 0), ended("n2", "succeeded", 0, 61)], "succeeded", 0, None),
        ([ended("n1", "preempted", 75), ended("n2", "preempted", 75, 61)], "preempted", 75, None),
        ([ended("n1", "stopped", 143), ended("n2", "stopped", 143, 61)], "stopped", 143, None),
        (
            [ended("n1", "stopped", 143), ended("n2", "failed", 1, 61, ranks=(ERROR,))],
            "failed",
            1,
            "rank 1 on n2: KeyError: x",
        ),
        ([ended("n1", "stopped", 143), ended("n2", "lost", 3, 61, reason="gone")], "lost", 3, "n2: gone"),
        (
            [ended("n1", "failed", 1, ranks=(ERROR,)), ended("n2", "lost", 3, 61, reason="gone")],
            "failed",
            1,
            "rank 1 on n1: KeyError: x",
        ),
    ],
)
def test_the_end_of_a_run(scripted, history, results, state: str, code: int, cause: str | None) -> None:
    backend = scripted()
    record = deploy.Record(run=backend.found.run, nodes=backend.nodes)
    history.record(record)
    done = deploy.conclude(backend, backend.found, backend.nodes, history, {each.node: each for each in results})
    assert (done.run.state.value, done.run.exit_code, done.run.ended) == (state, code, 61.0)
    assert row(history) == (state, code, True)
    assert (done.diagnosis.cause if done.diagnosis else None) == cause
    assert backend.calls == [("remove", "r-1", ("n1", "n2"), False)]


def test_following_to_the_end(scripted, history) -> None:
    backend = scripted(("n1",))
    history.record(deploy.Record(run=backend.found.run, nodes=backend.nodes))
    backend.ends("n1")
    out = bytearray()
    done = deploy.follow(
        backend,
        backend.found,
        backend.nodes,
        history,
        sink=Sink(out.extend),
        view=View(names=("n1",), color=False),
        notify=lambda node, text: None,
        signals=Signals(),
    )
    assert done.run.state is RunState.SUCCEEDED and b"hello" in out
    assert row(history) == ("succeeded", 0, True)
    assert json.loads(json.dumps(done.run.to_json()))["exit_code"] == 0
