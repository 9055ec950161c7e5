"""The first cause, whatever the order of the nodes and the error of their clocks."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConnectError, UnreachableError
from orchestrator.specs import NodeResult, RankError, RankResult, RunState
from orchestrator.workflows.diagnose import VICTIM, diagnose, remedy

S = 10**9
T0 = 1_795_219_168 * S


def rank(
    number: int, code: int | None = 1, kind: str = "", message: str = "", at: float = 0, lines: tuple = ()
) -> RankResult:
    """A rank that ended `at` seconds by the true clock."""
    error = RankError(number, kind, message, f"Traceback\n{kind}: {message}", T0 + int(at * S)) if kind else None
    return RankResult(number, number % 2, code, T0 - 60 * S, T0 + int(at * S), error, lines)


def node(name: str, *ranks: RankResult, offset: float = 0, state: str = "failed", code: int = 1, **more) -> NodeResult:
    """The same node by its own clock, which is `offset` seconds ahead."""
    off = int(offset * S)

    def shift(each: RankResult) -> RankResult:
        error = each.error
        moved = (
            RankError(error.rank, error.type, error.message, error.traceback, error.time_ns + off) if error else None
        )
        return RankResult(
            each.rank,
            each.local_rank,
            each.exit_code,
            each.started_ns + off,
            each.ended_ns + off,
            moved,
            each.last_lines,
        )

    ended = more.pop("ended_ns", T0 + 5 * S + off)
    return NodeResult(
        name, 0, RunState(state), code, ended_ns=ended, clock_offset_ns=off, ranks=tuple(map(shift, ranks)), **more
    )


def by_name(*nodes: NodeResult) -> dict:
    return {each.node: each for each in nodes}


CLOSED = ("RuntimeError", "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711")
NCCL = ("DistBackendError", "NCCL error in ProcessGroupNCCL.cpp:94: ncclRemoteError: remote process exited")
WATCHDOG = ("RuntimeError", "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL ran for 600 s")


def test_nothing_failed() -> None:
    assert diagnose("r", {}) is None
    assert diagnose("r", by_name(node("n1", rank(0, 0), state="succeeded", code=0))) is None
    assert diagnose("r", by_name(node("n1", rank(0, 75), state="preempted", code=75))) is None
    assert diagnose("r", by_name(node("n1", rank(0, -15), state="stopped", code=143))) is None


def test_cause_and_victims() -> None:
    found = diagnose(
        "r-1",
        by_name(
            node("n1", rank(0, 1, *CLOSED, at=0.1), rank(1, 1, *NCCL, at=0.2)),
            node("n2", rank(2, 1, "ValueError", "bad\nbatch", at=0.3), rank(3, -15)),
        ),
    )
    assert found is not None
    assert found.cause == "rank 2 on n2: ValueError: bad"
    assert (found.node, found.rank, found.exception, found.message) == ("n2", 2, "ValueError", "bad\nbatch")
    assert found.lines == ("Traceback", "ValueError: bad", "batch")
    assert [each.partition(":")[0] for each in found.victims] == ["n1/0", "n1/1", "n2/3"]
    shown = found.to_json()
    assert set(shown) == {
        "run",
        "cause",
        "node",
        "rank",
        "exception",
        "message",
        "lines",
        "remedy",
        "victims",
    }
    assert json.loads(json.dumps(shown)) == shown


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_order_of_the_nodes_and_any_clocks_give_the_same_cause(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 5))
    guilty = data.draw(st.integers(0, count - 1))
    second = data.draw(st.integers(0, count - 1))
    nodes = []
    for index in range(count):
        ranks = []
        for local in (0, 1):
            number = 2 * index + local
            if (index, local) == (guilty, 0):
                ranks.append(rank(number, 1, "KeyError", "the cause", at=10))
            elif (index, local) == (second, 1):
                ranks.append(rank(number, 1, "IndexError", "later, of itself", at=data.draw(st.integers(11, 60))))
            else:
                kind, message = data.draw(st.sampled_from([CLOSED, NCCL, WATCHDOG, ("", "")]))
                # victims may even seem to be first: what they say counts
                ranks.append(rank(number, -9 if not kind else 1, kind, message, at=data.draw(st.integers(0, 60))))
        offset = data.draw(st.floats(-3600, 3600))
        nodes.append(node(f"n{index}", *ranks, offset=offset))
    found = diagnose("r", by_name(*data.draw(st.permutations(nodes))))
    assert found is not None
    assert (found.node, found.rank, found.exception) == (f"n{guilty}", 2 * guilty, "KeyError")
    assert len(found.victims) == 2 * count - 1


@settings(deadline=None)
@given(st.permutations([("n1", 0), ("n2", 2), ("n3", 4)]))
def test_a_tie_is_broken_the_same_way_in_any_order(order: list) -> None:
    results = by_name(*(node(name, rank(number, 1, "ValueError", name, at=1)) for name, number in order))
    found = diagnose("r", results)
    assert found is not None and found.node == "n1"


def test_without_the_clocks_another_would_be_blamed() -> None:
    late = node("n1", rank(0, 1, "ValueError", "second", at=5), offset=-30)
    first = node("n2", rank(1, 1, "KeyError", "first", at=4))
    assert diagnose("r", by_name(late, first)).exception == "KeyError"


def test_a_rank_killed_from_outside_is_the_cause() -> None:
    found = diagnose(
        "r",
        by_name(
            node("n1", rank(0, 1, *CLOSED, at=0.2)),
            node("n2", rank(1, -9, "SIGKILL", "killed by SIGKILL", at=0.1, lines=("step 7",))),
        ),
    )
    assert found.cause == "rank 1 on n2: SIGKILL: killed by SIGKILL"
    assert "out-of-memory killer" in found.remedy


def test_a_rank_that_was_told_to_end_is_no_cause() -> None:
    """The launcher gives no error to ranks that it ended; here they even ended first."""
    lost = NodeResult("n2", 1, RunState.LOST, 3, reason="the node is lost: no heartbeat", hint="bring it back")
    found = diagnose("r", by_name(node("n1", rank(0, -9, at=0), rank(1, -15, at=0)), lost))
    assert (found.node, found.rank, found.cause) == ("n2", None, "n2: the node is lost: no heartbeat")
    assert found.remedy == "bring it back"
    assert found.victims == ("n1/0: killed by signal 9", "n1/1: killed by signal 15")


def test_out_of_memory() -> None:
    message = "killed by the kernel: out of memory"
    found = diagnose("r", by_name(node("n1", rank(0, -9, "OutOfMemory", message), rank(1, 1, *CLOSED, at=-1))))
    assert found.exception == "OutOfMemory" and "smaller micro-batch" in found.remedy


@pytest.mark.parametrize("partner", [CLOSED, NCCL, WATCHDOG, ("", "")])
@pytest.mark.parametrize(
    "reason",
    [
        "the node is lost: no heartbeat for 6 s",
        "the Docker engine stopped answering: connection refused",
        "the container or process is gone and left no result",
        "the node is lost: connection timed out",
    ],
)
def test_a_node_or_engine_that_died(partner: tuple[str, str], reason: str) -> None:
    """Its reason may sound like a victim's, and it is noticed long after the partners complained."""
    lost = NodeResult("n2", 1, RunState.LOST, 1, reason=reason, hint="start it", ended_ns=T0 + 45 * S)
    for died in (lost, NodeResult("n2", 1, RunState.LOST, 1, reason=reason, hint="start it")):
        found = diagnose("r", by_name(node("n1", rank(0, 1, *partner)), died))
        assert (found.node, found.rank, found.message, found.remedy) == ("n2", None, reason, "start it")


def test_a_real_error_before_the_node_died() -> None:
    lost = NodeResult("n2", 1, RunState.LOST, 1, reason="the node is lost: x", ended_ns=T0 + 45 * S)
    assert diagnose("r", by_name(node("n1", rank(0, 1, "KeyError", "k")), lost)).exception == "KeyError"


def test_a_node_that_does_not_answer_any_more() -> None:
    results = {"n1": node("n1", rank(0, 1, *CLOSED)), "n2": ConnectError("no route to host", hint="is it on?")}
    found = diagnose("r", results)
    assert (found.node, found.exception, found.remedy) == ("n2", "ConnectError", "is it on?")
    results["n1"] = node("n1", rank(0, 1, "KeyError", "k"))
    assert diagnose("r", results).exception == "KeyError"


def test_a_launcher_that_failed_without_its_ranks() -> None:
    reason = "no interface owns 10.0.0.1"
    verdict = RankResult(-1, -1, 4, last_lines=("a", "b"))
    found = diagnose("r", by_name(node("n1", verdict, code=4, reason=reason, hint="set private:")))
    assert (found.cause, found.rank, found.lines, found.remedy) == (f"n1: {reason}", None, ("a", "b"), "set private:")


def test_a_rendezvous_that_closed_is_a_victim() -> None:
    closed = node("n1", reason="rendezvous at 10.0.0.2:29400: connection closed, its host has ended", ended_ns=T0)
    found = diagnose("r", by_name(closed, node("n2", rank(1, 1, "KeyError", "k", at=3))))
    assert found.exception == "KeyError"


def test_only_victims_the_earliest_that_says_something() -> None:
    silent = NodeResult("n0", 0, RunState.FAILED, 1)
    found = diagnose(
        "r", by_name(silent, node("n1", rank(0, 1, *NCCL, at=3), offset=-50), node("n2", rank(1, 1, *CLOSED, at=2)))
    )
    assert (found.node, found.rank) == ("n2", 1)
    assert diagnose("r", by_name(silent)).cause == "n0: ended with exit code 1"


def test_a_traceback_that_is_missing_is_replaced_by_the_last_lines() -> None:
    bare = RankResult(0, 0, 3, 0, T0, RankError(0, "ExitCode", "exit code 3: oh", "", T0), ("x", "oh"))
    assert diagnose("r", by_name(node("n1", bare))).lines == ("x", "oh")


@pytest.mark.parametrize(
    "text",
    [
        "Connection reset by peer",
        "Connection was closed",
        "Broken pipe",
        "Socket closed",
        "Timed out waiting",
        "torch.distributed.DistStoreError: timeout after 1800 s",
        "NCCL communicator was aborted on rank 3",
        "RendezvousClosedError",
        "SignalException: Process 7 got signal: 15",
        "Gloo connectFullMesh failed",
    ],
)
def test_the_complaints_of_victims(text: str) -> None:
    assert VICTIM.search(text)


@pytest.mark.parametrize(
    "text",
    ["ValueError: bad input", "KeyError: 'x'", "CUDA out of memory", "FileNotFoundError: a", "AssertionError: 3 != 4"],
)
def test_the_complaints_of_causes(text: str) -> None:
    assert not VICTIM.search(text)


@pytest.mark.parametrize(
    ("kind", "message", "word"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", "micro-batch"),
        ("SIGKILL", "killed by SIGKILL", "dmesg"),
        ("", "killed by signal 9", "dmesg"),
        ("ModuleNotFoundError", "No module named 'peft'", "requirements.txt"),
        ("OSError", "[Errno 28] No space left on device", "free disk"),
        ("", "port 29400 is taken", "run.port"),
        ("OSError", "[Errno 98] Address already in use", "run.port"),
        ("RuntimeError", "Found no NVIDIA driver on your system", "nvidia-smi"),
        ("FloatingPointError", "loss is nan at step 7", "learning rate"),
        ("FloatingPointError", "gradient norm is not finite", "learning rate"),
        ("ConfigError", "unknown key 'x'", "named above"),
        ("", "rendezvous at n1: no answer", "orch nodes check"),
    ],
)
def test_remedies(kind: str, message: str, word: str) -> None:
    assert word in remedy(kind, message)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ValueError", "boom"),
        ("ValueError", "room is full"),
        ("RuntimeError", "finance info of Nancy in banana"),
        ("ValueError", "the report was taken"),
        ("TypeError", "f() got an unknown keyword argument 'x'"),
        ("RuntimeError", "killed by signal 91"),
        ("KeyError", "'infinite'"),
    ],
)
def test_remedies_do_not_fire_on_parts_of_words(kind: str, message: str) -> None:
    assert remedy(kind, message) == "`orch logs` shows everything that it printed"


def test_an_unreachable_error_keeps_its_lines() -> None:
    found = diagnose("r", {"n1": UnreachableError("x", lines=["a"])})
    assert found.lines == ("a",) and found.cause == "n1: UnreachableError: x"
