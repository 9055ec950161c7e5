"""The operator's side: leases, signals in every phase, a process that is killed, a second machine, a lost history."""

from __future__ import annotations

import re
import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from orchestrator.sim import faults

if TYPE_CHECKING:
    from tests.integration.conftest import Command, Rig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

HOLD = ("deploy", "--nodes", "2", "--launcher", "none")


# ---- one run per node


def test_a_second_run_on_the_same_nodes_is_refused_and_the_first_goes_on(cluster: Rig) -> None:
    first = cluster.hold()
    second = f"second-{uuid.uuid4().hex[:6]}"
    operator = cluster.orch("ps", "--json").json[0]["operator"]
    done = cluster.orch(*HOLD, "--name", second, "--", "jobs/hold.py", code=4)
    assert first in done.err and operator in done.err, done.text
    assert cluster.traces(second) == []
    assert cluster.running(first) == ["n1", "n2"]
    cluster.go(first)
    cluster.until(lambda: cluster.orch("status", first, "--json").json["state"] == "succeeded", "the end of the first")
    # Its ended containers do not hold the nodes.
    cluster.orch(*HOLD, "--name", second, "--", "true")


def test_of_two_deploys_at_the_same_moment_exactly_one_wins(cluster: Rig) -> None:
    names = [f"race-{uuid.uuid4().hex[:6]}" for _ in range(2)]
    orders = ("n1,n2", "n2,n1")  # the worst order: each takes the other's second node first
    commands = [
        cluster.start(*HOLD[:2], order, *HOLD[3:], "--detach", "--name", name, "--", "jobs/hold.py")
        for name, order in zip(names, orders, strict=True)
    ]
    ends = [command.done() for command in commands]
    assert sorted(end.code for end in ends) == [0, 4], "\n".join(end.text for end in ends)
    winner = next(end.out.strip() for end in ends if end.code == 0)
    loser = next(name for name, end in zip(names, ends, strict=True) if end.code == 4)
    assert cluster.running(winner) == ["n1", "n2"]
    assert cluster.traces(loser) == []
    cluster.orch("stop", winner)


# ---- signals


@pytest.mark.parametrize(("phase", "signum"), [("checking", 2), ("preparing", 15), ("starting", 1)])
def test_a_signal_before_all_nodes_have_started_takes_everything_back(cluster: Rig, phase: str, signum: int) -> None:
    name = f"sig-{uuid.uuid4().hex[:6]}"
    command = cluster.start(*HOLD, "--name", name, "--", "jobs/hold.py")
    command.until(rf"{phase}[^\n]* \(n1, n2\)")
    command.send(signum)
    done = command.done()
    assert done.code == 128 + signum, done.text
    if phase == "starting" and "the run goes on" in done.err:  # the start was faster than the signal
        run = re.search(r"(\S+) started on n1, n2", done.err)[1]
        assert cluster.running(run) == ["n1", "n2"]
        cluster.orch("stop", "--kill", run)
        return
    assert cluster.traces(name) == []
    assert cluster.orch("runs", "--json").json[0]["state"] == "stopped"


def test_a_signal_while_a_pull_hangs(cluster: Rig) -> None:
    name = f"sig-{uuid.uuid4().hex[:6]}"
    absent = f"{cluster.repository}@sha256:{'1' * 64}"
    changed = cluster.config(image={"ref": absent})
    faults.pause(cluster.cluster, "registry")
    try:
        command = cluster.start(*HOLD, "--config", changed, "--name", name, "--", "true")
        command.until("preparing")
        pulls = r"docker pull --quie[t]"
        cluster.until(lambda: cluster.processes("n1", pulls) and cluster.processes("n2", pulls), "both nodes pull")
        command.send(signal.SIGTERM)
        assert command.done().code == 143
    finally:
        faults.unpause(cluster.cluster, "registry")
    assert cluster.traces(name) == []
    cluster.until(lambda: not cluster.processes("n1", pulls), "no pull is left on n1")


def test_a_node_that_hangs_when_the_signal_comes(cluster: Rig) -> None:
    """The frozen node cannot be cleared, which is said; what reached it late is not started."""
    name = f"sig-{uuid.uuid4().hex[:6]}"
    faults.pause(cluster.cluster, "n2")
    try:
        command = cluster.start(*HOLD, "--name", name, "--", "jobs/hold.py")
        cluster.until(lambda: f"runs/{name}" in cluster.on("n1", "ls -d ~/.orch/runs/*"), "the files are on n1")
        command.send(signal.SIGINT)
        done = command.done()
    finally:
        faults.unpause(cluster.cluster, "n2")
    assert done.code == 130, done.text
    assert re.search(r"n2 +not rolled back", done.err), done.text
    assert [each for each in cluster.traces(name) if each.startswith("n1")] == []
    assert not any(name in row for row in cluster.containers("n2"))


def test_signals_after_the_start(cluster: Rig) -> None:
    """TERM and HUP and two Ctrl-C detach; one Ctrl-C stops after three seconds; Ctrl-C of `logs -f` does nothing."""
    command = cluster.start(*HOLD, "--", "jobs/hold.py")
    command.until("ready rank", 2)
    run = command.until(r"(it-\S+) started on n1, n2")[1]
    for signum in (signal.SIGTERM, signal.SIGHUP):
        command.send(signum)
        done = command.done()
        assert done.code == 128 + signum, done.text
        assert f"orch logs -f {run}" in done.err
        assert cluster.running(run) == ["n1", "n2"]
        if signum == signal.SIGTERM:
            command = cluster.start("deploy", "--nodes", "2", "--launcher", "none", "--", "true")
            assert command.done().code == 4
            cluster.orch("stop", run)
            command = cluster.start(*HOLD, "--", "jobs/hold.py")
            command.until("ready rank", 2)
            run = command.until(r"(it-\S+) started on n1, n2")[1]
    follower = cluster.start("logs", "-f", run)
    follower.until("ready rank", 2)
    follower.send(signal.SIGINT)
    assert follower.done().code in (0, 130)
    assert cluster.running(run) == ["n1", "n2"]
    cluster.orch("stop", run)


def test_ctrl_c_once_stops_and_twice_detaches(cluster: Rig) -> None:
    command = cluster.start(*HOLD, "--", "jobs/hold.py")
    command.until("ready rank", 2)
    run = command.until(r"(it-\S+) started on n1, n2")[1]
    command.send(signal.SIGINT)
    command.until("Ctrl-C again within 3 s detaches")
    command.send(signal.SIGINT)
    done = command.done()
    assert done.code == 130 and "the run goes on" in done.err, done.text
    assert cluster.running(run) == ["n1", "n2"]
    cluster.orch("stop", run)

    command = cluster.start(*HOLD, "--", "jobs/hold.py")
    command.until("ready rank", 2)
    command.send(signal.SIGINT)
    done = command.done()
    assert done.code == 143, done.text
    assert done.out.count("got signal 15") == 2, done.text
    assert [cluster.containers(node) for node in cluster.cluster.nodes] == [[], []]


# ---- the operator's machine goes away


def test_a_killed_operator_a_second_machine_and_a_lost_history(cluster: Rig, tmp_path: Path) -> None:
    command = cluster.start(*HOLD, "--", "jobs/hold.py")
    command.until("ready rank", 2)
    run = command.until(r"(it-\S+) started on n1, n2")[1]
    command.send(signal.SIGKILL)
    assert command.done().code == -9
    follower = cluster.start("logs", "-f")
    ticks(follower, 2)
    assert cluster.running(run) == ["n1", "n2"]

    # Another machine with the same inventory and key: it knows nothing and finds everything.
    elsewhere = {"ORCH_STATE": str(tmp_path / "elsewhere")}
    assert cluster.orch("runs", "--json", **elsewhere).json == []
    (row,) = cluster.orch("ps", "--json", **elsewhere).json
    assert (row["id"], row["state"], row["nodes"]) == (run, "running", ["n1", "n2"])
    assert cluster.orch("status", run, "--json", **elsewhere).json["state"] == "running"
    assert "ready rank 1" in cluster.orch("logs", run[:-2], "--node", "n2", **elsewhere).out
    words = ("--", "sh", "-c", "echo $ORCH_RUN_ID:$(id -u)")
    assert cluster.orch("exec", run, *words, **elsewhere).out.count(":1000") == 2

    # The first machine loses its history, and nothing else.
    for path in cluster.state.glob("runs.sqlite*"):
        path.unlink()
    assert cluster.orch("runs", "--json").json == []
    assert cluster.orch("ps", "--json").json[0]["id"] == run

    stopped = cluster.orch("stop", run, "--json", **elsewhere).json
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 143)
    assert follower.done().code == 0
    assert follower.out.count("got signal 15") == 2
    assert cluster.orch("ps", "--json").json == []
    assert cluster.orch("status", run, "--json").json["state"] == "stopped"


def ticks(command: Command, nodes: int) -> None:
    """New lines of all nodes arrive."""
    seen = len(re.findall(r"n\d/\d +tick", command.out))
    command.until(r"n\d/\d +tick", seen + 5)
    assert len(set(re.findall(r"(n\d)/\d +tick", command.out))) == nodes


def test_resume_takes_over_command_nodes_and_checkpoints(cluster: Rig) -> None:
    name = f"again-{uuid.uuid4().hex[:6]}"
    run = cluster.hold("--name", name)
    cluster.orch("stop", run)
    resumed = cluster.orch("deploy", "--resume", run, "--detach").out.strip()
    assert resumed != run
    cluster.until(lambda: "ready rank 1 attempt 2 before ['1']" in cluster.log("n2", resumed), "the mark of attempt 1")
    cluster.orch("stop", resumed)
    fresh = cluster.hold()  # without a name nothing is taken over
    assert "before []" in cluster.log("n1", fresh)
    cluster.orch("stop", fresh)
    for node in cluster.cluster.nodes:
        cluster.on(node, f"rm -rf ~/.orch/checkpoints/{name}")


# ---- the nodes' own commands


def test_nodes_commands_and_prune(cluster: Rig) -> None:
    assert [row["name"] for row in cluster.orch("nodes", "list", "--json").json] == ["n1", "n2"]
    checked = cluster.orch("nodes", "check")
    assert "n1" in checked.text and "n2" in checked.text
    said = cluster.orch("nodes", "exec", "--", "hostname").out.splitlines()
    assert sorted(re.findall(r"n\d", line) for line in said) == [["n1", "n1"], ["n2", "n2"]]
    cluster.orch(*HOLD, "--", "true")
    ended = cluster.orch("runs", "--json", "--limit", "1").json[0]["id"]
    kept = cluster.hold()
    assert ended in cluster.orch("prune", "--keep", "0", "--dry-run").err
    assert any(f"runs/{ended}" in each for each in cluster.traces(ended))
    cluster.orch("prune", "--keep", "0", "--yes")
    assert not any(f"runs/{ended}" in each for each in cluster.traces(ended))
    assert cluster.running(kept) == ["n1", "n2"]
    cluster.orch("stop", kept)
