"""The main story on two simulated nodes with two processes each: train, look, pull, go on, stop, resume."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Command, Rig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SMALL = (
    *("--set", "model.hidden_size=64", "--set", "model.intermediate_size=128", "--set", "data.seq_len=64"),
    *("--set", "train.global_batch=8", "--set", "train.micro_batch=2", "--set", "tokenizer.vocab_size=512"),
    *("--set", "log.every=5", "--set", "optim.warmup_steps=2"),
)
DEPLOY = ("deploy", "--nodes", "2", "--gpus", "0", "--procs", "2", "--recipe", "demo", *SMALL)
STEP = r"step +(\d+)/\d+ +loss (\d+\.\d+)"


def by_rank(shown: str) -> dict[str, list[str]]:
    """Prefix `n1/0` → the lines after it, in order."""
    ranks: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if found := re.match(r"(n\d/[0-9-]+) +(.*)", line):
            ranks.setdefault(found[1], []).append(found[2])
    return ranks


def saved_step(command: Command) -> int:
    return int(re.findall(r"checkpoint \S+/step_(\d+)", command.out)[-1])


def test_train_look_pull_resume_stop(cluster: Rig, interrupt, tmp_path: Path) -> None:
    name = f"story-{uuid.uuid4().hex[:6]}"
    first = cluster.orch(*DEPLOY, "--name", name, "--set", "train.steps=15", "--set", "checkpoint.every=5")
    run = re.search(rf"deploying ({name}-\d{{8}}-\d{{6}}-[0-9a-f]{{4}}) to sim \(n1, n2; 2 × 2", first.err)[1]
    check_training(first.out)
    check_places(cluster, run)
    check_commands(cluster, run, first.out)
    check_pull(cluster, run, tmp_path)

    # The same name goes on from the last checkpoint; `orch stop` has it save another one.
    second = cluster.start(*DEPLOY, "--name", name, "--set", "train.steps=100000")
    second.until(r"resuming from step 15 .* on n[12]")
    second.until(r"step +20/")
    stopped = cluster.orch("stop", "--json").json
    assert (stopped["state"], stopped["exit_code"]) == ("preempted", 75)
    done = second.done()
    assert done.code == 75, done.text
    step = saved_step(second)
    assert step >= 20
    (again,) = re.findall(r"orch deploy --resume (\S+)", done.err) or pytest.fail(done.err[-3000:])

    # --resume needs nothing else, is the second attempt, and one Ctrl-C stops it in order.
    third = cluster.start("deploy", "--resume", again)
    third.until(rf"resuming from step {step} ")
    third.until(rf"step +{(step // 5 + 1) * 5}/")
    interrupt(third)
    third.until("Ctrl-C again within 3 s detaches")
    done = third.done()
    assert done.code == 75, done.text
    assert saved_step(third) > step
    rows = cluster.orch("runs", "--json").json
    story = [row for row in rows if row["name"] == name]
    assert [(row["state"], row["attempt"]) for row in story] == [("preempted", 2), ("preempted", 1), ("succeeded", 1)]
    assert cluster.orch("ps", "--json").json == []


def check_training(shown: str) -> None:
    ranks = by_rank(shown)
    assert {"n1/-", "n2/-"} < ranks.keys() and any(label.endswith("/0") for label in ranks)
    losses = [float(loss) for _, loss in re.findall(STEP, shown)]
    assert losses[-1] < losses[0] - 0.5, losses
    assert re.search(r"world: 4 ranks on 2 nodes", shown)
    perplexity = float(re.search(r"held-out loss .* perplexity (\d+\.\d+)", shown)[1])
    assert perplexity < 400  # of 512 tokens; untrained it is above that
    assert "The following" in shown  # the sample


def check_places(cluster: Rig, run: str) -> None:
    """Checkpoint, events of all ranks and TensorBoard lie in the run folders, and belong to the user."""
    files = "".join(cluster.on(node, f"cd ~/.orch/runs/{run} && find -L . -type f") for node in cluster.cluster.nodes)
    assert "./checkpoints/step_00000015/manifest.json" in files
    assert files.count("./tensorboard/events.out.tfevents") == 1
    assert sorted(re.findall(r"rank-(\d)\.jsonl", files)) == ["0", "1", "2", "3"]
    owners = {cluster.on(node, "find -L ~/.orch ! -user orch").strip() for node in cluster.cluster.nodes}
    assert owners == {""}
    assert not any(cluster.containers(node) for node in cluster.cluster.nodes)


def check_commands(cluster: Rig, run: str, shown: str) -> None:
    later = cluster.orch("logs", run).out
    assert by_rank(later) == by_rank(shown)
    status = cluster.orch("status", run, "--json").json
    assert (status["state"], status["exit_code"], status["last_step"]["step"]) == ("succeeded", 0, 15)
    assert status["checkpoints"][-1].endswith("checkpoints/step_00000015")
    assert "succeeded" in cluster.orch("status").out
    row = next(row for row in cluster.orch("runs", "--json").json if row["id"] == run)
    order = ["id", "name", "state", "exit_code", "backend", "nodes", "started", "ended", "image", "attempt"]
    assert list(row) == order
    assert row["image"] == cluster.image
    assert (row["state"], row["exit_code"], row["nodes"]) == ("succeeded", 0, ["n1", "n2"])
    assert cluster.orch("ps", "--json").json == []
    assert cluster.orch("why", run, "--json").json is None


def check_pull(cluster: Rig, run: str, tmp_path: Path) -> None:
    """The checkpoint comes home whole and can be read without us."""
    got = cluster.orch("pull", run, "--checkpoint", "latest", "--to", str(tmp_path / "home"), "--json").json
    assert got["run"] == run
    (folder,) = (tmp_path / "home").glob("*/checkpoints/step_00000015")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["world"]) == (15, 4)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert there == manifest["files"].keys()
    for file, entry in manifest["files"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == entry["sha256"], file
    assert [path.name for path in folder.parent.iterdir()] == ["step_00000015"]
    (weights,) = folder.glob("*.safetensors")
    data = weights.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + size])
    assert any("embed_tokens" in name for name in tensors)
    ranks = []
    for node in ("n1", "n2"):
        home = tmp_path / "home" / node
        result = json.loads((home / "result.json").read_text())
        assert result["state"] == "succeeded"
        ranks += [rank["rank"] for rank in result["ranks"] if rank["exit_code"] == 0]
        assert (home / "log").read_text() == cluster.log(node, run)
    assert sorted(ranks) == [0, 1, 2, 3]


def test_a_killed_node_loses_no_step(cluster: Rig) -> None:
    """A node's container is killed in mid-training; the same command goes on, and the losses join."""
    name = f"killed-{uuid.uuid4().hex[:6]}"
    words = (*DEPLOY, "--name", name, "--set", "checkpoint.every=5", "--set", "log.every=1", "--set", "train.steps=30")
    first = cluster.start(*words)
    first.until(r"step +12/30")
    cluster.on("n2", "docker kill orch")
    assert first.done().code == 1
    second = cluster.orch(*words)
    (resumed,) = map(int, re.findall(r"resuming from step (\d+) ", second.out))
    assert resumed in (5, 10, 15, 20, 25)
    before = {int(step): loss for step, loss in re.findall(STEP, first.out)}
    after = {int(step): loss for step, loss in re.findall(STEP, second.out)}
    assert sorted(after) == list(range(resumed + 1, 31))
    assert sorted(before) == list(range(1, max(before) + 1)) and max(before) >= 12
    both = before.keys() & after.keys()
    assert both and {step: before[step] for step in both} == {step: after[step] for step in both}
    for node in cluster.cluster.nodes:
        cluster.on(node, f"rm -rf ~/.orch/checkpoints/{name}")
