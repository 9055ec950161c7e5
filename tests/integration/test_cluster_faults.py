"""What dies takes the run along, quickly and everywhere, and the first cause is the one that is told."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from orchestrator.sim import faults

if TYPE_CHECKING:
    from tests.integration.conftest import Command, Done, Rig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

QUICKLY = 30.0
"""Seconds; on an idle machine it is five."""


def start(cluster: Rig, *words: str, ready: str, count: int) -> tuple[Command, str]:
    """An attached run whose ranks have said `ready`."""
    command = cluster.start("deploy", "--nodes", "2", *words)
    command.until(ready, count)
    return command, command.until(r"(it-\d{8}-\d{6}-[0-9a-f]{4}) started on n1, n2")[1]


def ended(command: Command, cluster: Rig, run: str, marker: str, since: float, within: float = QUICKLY) -> Done:
    """The command has ended soon, and no process of the run lives on a node that answers."""
    done = command.done()
    took = time.monotonic() - since
    print(f"ended {took:.1f} s after the fault")
    assert took < within, done.text
    assert "Traceback (most recent" not in done.err.replace("| Traceback (most recent", ""), done.text
    for node in cluster.cluster.nodes:
        if cluster.answers(node):
            assert cluster.processes(node, marker) == []
            assert f"orch running {run}" not in cluster.containers(node)
    return done


def why(cluster: Rig, run: str) -> dict:
    return cluster.orch("why", run, "--json").json


@pytest.mark.parametrize(("how", "exception"), [("raise", "ValueError"), ("kill", "SIGKILL")])
def test_a_rank_that_fails_ends_the_others_and_is_named(cluster: Rig, how: str, exception: str) -> None:
    """Real collectives: the partner's complaint of a closed connection is not taken for the cause."""
    command, run = start(cluster, "--", "jobs/reduce.py", "1", how, ready=r"ready rank \d of 2", count=2)
    (guilty,) = {line[:2] for line in command.out.splitlines() if line[3:4] == "1" and "ready rank 1" in line}
    cluster.go(run, guilty)
    since = time.monotonic()
    done = ended(command, cluster, run, "jobs/reduc[e]", since)
    assert done.code == 1
    assert f"rank 1 on {guilty}: {exception}" in done.err, done.text
    cause = why(cluster, run)
    assert (cause["node"], cause["rank"], cause["exception"]) == (guilty, 1, exception), cause
    assert cause["remedy"] and len(cause["victims"]) == 1, cause
    if how == "raise":
        assert cause["message"] == "the batch 17 is torn"
        assert any("raise ValueError" in line for line in cause["lines"])
    assert cluster.orch("status", run, "--json").json["state"] == "failed"


def test_a_container_that_is_killed(cluster: Rig) -> None:
    command, run = start(cluster, "--launcher", "none", "--", "jobs/hold.py", ready="ready rank", count=2)
    since = time.monotonic()
    cluster.on("n2", "docker kill orch")
    done = ended(command, cluster, run, "jobs/hol[d]", since)
    assert done.code == 1
    cause = why(cluster, run)
    assert cause["node"] == "n2" and "killed" in cause["message"], cause
    assert cause["message"] in done.err
    assert "got signal" not in cluster.log("n1", run)  # after a failure nobody is asked politely


@pytest.mark.parametrize("containers", [True, False], ids=["with its containers", "alone"])
def test_an_engine_that_is_killed(cluster: Rig, containers: bool) -> None:
    """Alone: its container lives on without it, and is ended through the stop file all the same."""
    command, run = start(cluster, "--launcher", "none", "--", "jobs/hold.py", ready="ready rank", count=2)
    since = time.monotonic()
    faults.kill_engine(cluster.cluster, "n2", containers=containers)
    done = ended(command, cluster, run, "jobs/hol[d]", since)
    cluster.until(lambda: not cluster.processes("n2", "jobs/hol[d]"), "the end of the ranks on n2", QUICKLY)
    assert done.code == 3  # not the job's fault
    assert "first cause n2: " in " ".join(done.err.split()) and "engine" in done.err, done.text
    assert why(cluster, run)["node"] == "n2"
    faults.start_engine(cluster.cluster, "n2")
    # The dead container does not hold its node: the next run takes it.
    cluster.orch("deploy", "--nodes", "2", "--launcher", "none", "--", "true")


def test_a_node_that_loses_its_power(cluster: Rig) -> None:
    """It may only be slow, so the others are given up after the time that the first line names."""
    command, run = start(cluster, "--launcher", "none", "--", "jobs/hold.py", ready="ready rank", count=2)
    since = time.monotonic()
    faults.kill(cluster.cluster, "n2")
    done = ended(command, cluster, run, "jobs/hol[d]", since, within=45 + 2 * QUICKLY)
    assert "not answering" in done.err and "trying for 45 s" in done.err
    assert done.code == 3 and "first cause n2: the node is lost" in " ".join(done.err.split()), done.text
    assert cluster.orch("ps", code=3).err.count("n2: ") == 1
    faults.start(cluster.cluster, "n2")
    assert why(cluster, run)["node"] == "n2"
    cluster.orch("stop", run)  # takes the dead container away; the next run would do the same


def test_a_node_that_hangs_or_is_cut_off_for_a_while_does_no_harm(cluster: Rig) -> None:
    command, run = start(cluster, "--launcher", "none", "--", "jobs/hold.py", ready="ready rank", count=2)
    faults.pause(cluster.cluster, "n1")
    command.until("n1 .*not answering")
    faults.unpause(cluster.cluster, "n1")
    command.until("n1 .*answering again")
    faults.disconnect(cluster.cluster, "n2")
    command.until("n2 .*not answering")
    faults.reconnect(cluster.cluster, "n2")
    command.until("n2 .*answering again")
    assert cluster.running(run) == ["n1", "n2"]
    cluster.go(run)
    done = command.done()
    assert done.code == 0, done.text
    shown = [line.split(maxsplit=1) for line in done.out.splitlines()]
    for node in cluster.cluster.nodes:
        kept = [line.partition("\t")[2] for line in cluster.log(node, run).splitlines()]
        assert [text for label, text in shown if label.startswith(node)] == kept


def test_the_reason_stays_when_nobody_watched(cluster: Rig) -> None:
    """Detached: each node ends its own ranks, and `why` finds the cause later."""
    run = cluster.hold()
    cluster.on("n1", "pkill -KILL -f 'python3 jobs/hol[d]'")
    cluster.until(lambda: cluster.running(run) == ["n2"], "the end on n1")
    assert cluster.orch("status", run, "--json").json["state"] == "running"
    stopped = cluster.orch("stop", run, "--json").json
    assert (stopped["state"], stopped["exit_code"]) == ("failed", 1)
    cause = why(cluster, run)
    assert (cause["node"], cause["rank"], cause["exception"]) == ("n1", 0, "SIGKILL"), cause
    result = json.loads(cluster.on("n1", f"cat ~/.orch/runs/{run}/result.json"))
    assert result["ranks"][0]["exit_code"] == -9
