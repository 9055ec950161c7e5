"""Every line of every rank, once, in its order: live, later, over cut connections, on a terminal, through a pipe."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from orchestrator.sim import faults

if TYPE_CHECKING:
    from tests.integration.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

CUTS = 12


def by_rank(shown: str) -> dict[str, list[str]]:
    """`n1/0` → its lines, in order, from output that was piped."""
    ranks: dict[str, list[str]] = {}
    for line in shown.split("\n")[:-1]:
        label, _, text = line.partition(" ")
        ranks.setdefault(label, []).append(text.lstrip(" "))
    return ranks


def kept(cluster: Rig, run: str) -> dict[str, list[str]]:
    """The same from the files on the nodes."""
    ranks: dict[str, list[str]] = {}
    for node in cluster.cluster.nodes:
        for line in cluster.log(node, run).split("\n")[:-1]:
            rank, _, text = line.partition("\t")
            ranks.setdefault(f"{node}/{rank}", []).append(text.lstrip(" "))
    return ranks


def test_no_line_is_lost_or_repeated_when_connections_are_cut(cluster: Rig) -> None:
    command = cluster.start("deploy", "--nodes", "2", "--procs", "2", "--", "jobs/talk.py", "300")
    command.until(r"n\d/\d +ready rank", 4)
    run = command.until(r"(it-\S+) started on n1, n2")[1]
    cut = 0
    for number in range(CUTS):
        node = cluster.cluster.nodes[number % 2]
        seen = len(command.out)
        cut += faults.cut_ssh(cluster.cluster, node) > 0
        # Lines of that node arrive again: the next cut hits a connection that is reading.
        cluster.until(lambda node=node, seen=seen: re.search(rf"\n{node}/\d", command.out[seen:]), f"lines of {node}")
        command.until(rf"{node} +(log )?connection is back", number // 2 + 1)
    assert cut == CUTS
    cluster.go(run)
    done = command.done()
    assert done.code == 0, done.text[-3000:]
    shown, files = by_rank(done.out), kept(cluster, run)
    assert shown.keys() == files.keys()
    for label, lines in files.items():
        assert shown[label] == lines, label
        if not label.endswith("-"):
            total = int(re.fullmatch(r"last (\d+)", lines[-1])[1])
            numbers = [int(line.split(":")[1].split()[0]) for line in lines[1:-1]]
            assert numbers == list(range(total)), label
    assert len(files) == 6  # four ranks, two launchers
    assert "\x1b" not in done.text
    later = cluster.orch("logs", run)
    assert by_rank(later.out) == files
    ranks = cluster.orch("logs", run, "--rank", "1-2").out
    assert {label[3:] for label in by_rank(ranks)} == {"1", "2"}
    node = cluster.orch("logs", run, "--node", "n2", "--rank", "-").out
    assert by_rank(node) == {"n2/-": files["n2/-"]}


def test_a_progress_bar_a_terminal_and_a_pipe(cluster: Rig) -> None:
    done = cluster.orch("deploy", "--nodes", "1", "--launcher", "none", "--", "jobs/bar.py")
    bars = [line for line in done.out.splitlines() if "%|" in line]
    assert 2 <= len(bars) <= 10  # of 200 frames one a second, and the last
    assert bars[-1].endswith("200/200") and "\r" not in done.out
    assert "\x1b" not in done.text
    assert "green plain" in done.out
    terminal = cluster.orch("logs", terminal=True).out
    assert re.search(r"\x1b\[\d+mn1/0", terminal)
    assert "\x1b[32mgreen\x1b[0m" in terminal  # the job's own colour stays
    assert "\x1b[2J" not in terminal and "\x1b]0;" not in terminal  # it cannot clear the screen, nor name the window
    assert "\x1b" not in cluster.orch("logs", terminal=True, NO_COLOR="1").out
    assert cluster.orch("logs", "--fold").out.count("200/200") == 1


def test_since_and_a_reader_that_goes_away(cluster: Rig) -> None:
    run = cluster.hold()
    early = cluster.orch("logs", run).out
    cluster.until(lambda: cluster.log("n1", run).count("tick") > 10, "some ticks")
    assert "ready rank" in early
    late = cluster.orch("logs", run, "--since", "2s").out
    assert "tick" in late and "ready rank" not in late
    assert cluster.orch("logs", run, "--since", "1h").out.startswith("n")
    follower = cluster.start("logs", "-f", run)
    follower.until("tick", 3)
    cluster.go(run)
    done = follower.done()
    assert done.code == 0 and done.out.count("gone on") == 2
    assert by_rank(done.out) == kept(cluster, run)
