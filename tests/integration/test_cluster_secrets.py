"""Secrets reach the job and nothing else; odd text arrives as it was written."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SECRET = "s3cr3t-VALUE 'with' \"quotes\" $(id) ünd\nline two"
ODD = ("a b", "'single'", '"double"', "new\nline", "$(touch /tmp/pwned) `id` ${HOME}", "ünïcode ☃", "-x", "--", "*", "")


def test_a_secret_is_seen_by_the_job_only(cluster: Rig) -> None:
    changed = cluster.config(run={"secrets": ["TOKEN"]})
    missing = cluster.orch("--config", changed, "deploy", "--nodes", "2", "--", "true", code=2)
    assert "TOKEN" in missing.err
    shown = cluster.orch("--config", changed, "deploy", "--nodes", "2", "--dry-run", "--", "true", TOKEN=SECRET)
    script = "printenv TOKEN > /tmp/token; exec python3 jobs/hold.py"
    words = ("deploy", "--nodes", "2", "--launcher", "none", "--", "sh", "-c", script)
    attached = cluster.start("--config", changed, *words, TOKEN=SECRET)
    attached.until("ready rank", 2)
    run = attached.until(r"(it-\S+) started on n1, n2")[1]
    assert cluster.orch("exec", run, "--", "cat", "/tmp/token").out.replace("n1 ", "").replace("n2 ", "") == (
        f"{SECRET}\n" * 2
    )
    places = {"dry run": shown.text, "host ps": _here("ps", "-eo", "args"), "deploy": attached.out + attached.err}
    for node in cluster.cluster.nodes:
        places[f"{node} ps"] = cluster.on(node, "ps -eo args", root=True)
        places[f"{node} inspect"] = cluster.on(node, "docker inspect orch && docker logs orch 2>&1")
        places[f"{node} files"] = cluster.on(node, "grep -rl s3cr3t ~/.orch /tmp 2>/dev/null || :")
        places[f"{node} folder"] = cluster.on(node, f"cd ~/.orch/runs/{run} && find . -type f | xargs cat")
    cluster.go(run)
    places["end"] = attached.done().text
    places["logs"] = cluster.orch("logs", run).text
    places["history"] = (cluster.state / "runs.sqlite").read_bytes().decode("latin-1")
    places["image"] = _here("docker", "image", "inspect", cluster.image) + _here("docker", "history", cluster.image)
    for place, text in places.items():
        assert "s3cr3t" not in text, place
        assert "line two" not in text, place
    assert "***" in shown.out


def test_what_a_job_prints_of_a_secret_is_masked(cluster: Rig) -> None:
    changed = cluster.config(run={"secrets": ["TOKEN"]})
    words = ("--config", changed, "deploy", "--nodes", "1", "--launcher", "none", "--", "sh", "-c")
    done = cluster.orch(*words, 'echo "it is <$TOKEN>"; exit 5', TOKEN="hf_0123456789", code=1)
    assert "it is <***>" in done.out
    assert "hf_0123456789" not in done.text + cluster.orch("why", "--json").out + cluster.orch("logs").out


def test_odd_text_arrives_unchanged(cluster: Rig) -> None:
    env = {"ODD": "\n".join(ODD), "run.env": None}
    changed = cluster.config(run={"env": {"FILE_ODD": env["ODD"]}})
    done = cluster.orch(
        *("--config", changed, "deploy", "--nodes", "1", "--name", "Odd.Name_1", "--env", f"LINE_ODD={env['ODD']}"),
        *("--launcher", "none", "--", "jobs/echo.py", *ODD),
    )
    (line,) = (row for row in done.out.splitlines() if '"argv"' in row)
    got = json.loads(line.partition(" ")[2])
    assert got["argv"] == list(ODD)
    assert got["env"]["FILE_ODD"] == got["env"]["LINE_ODD"] == env["ODD"]
    assert got["env"]["ORCH_RUN_ID"].startswith("odd.name_1-")
    assert got["cwd"] == "/workspace"
    assert cluster.on("n1", "ls /tmp/pwned 2>/dev/null || :") == ""
    refused = cluster.orch("deploy", "--nodes", "1", "--name", "a b$(id)", "--", "true", code=2)
    assert "--name" in refused.err
    for node in cluster.cluster.nodes:
        cluster.on(node, "rm -rf ~/.orch/checkpoints/odd.name_1")


def _here(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, errors="replace", check=True).stdout
