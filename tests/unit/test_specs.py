"""The shared vocabulary."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.specs import (
    ImageRef,
    JobSpec,
    Node,
    NodeResult,
    Run,
    RunState,
    Secret,
    Storage,
    iso,
    new_run_id,
    safe_name,
)


def test_a_secret_never_shows_itself():
    secret = Secret("hunter2")
    spec = JobSpec("r", "n", (Node("a", "h"),), 1, ("x",), secrets={"T": secret})
    for text in (repr(secret), str(secret), f"{secret}", f"{secret:>9}", str([secret]), repr(spec)):
        assert "hunter2" not in text
    assert secret.reveal() == "hunter2" and secret == Secret("hunter2") != Secret("other")


def test_private_falls_back_to_the_address():
    assert Node("a", "h").private == "h"
    assert Node("a", "h", private="p").private == "p"
    assert len({Node("a", "h", labels={"x": "y"}), Node("a", "h", labels={"x": "y"})}) == 1


@pytest.mark.parametrize(
    ("repository", "registry", "port"),
    [
        ("localhost:5000/a", "localhost:5000", 5000),
        ("localhost/a", "localhost", 80),
        ("127.0.0.1:5001/a/b", "127.0.0.1:5001", 5001),
        ("reg.example.com/team/a", "reg.example.com", None),
        ("reg:5000/a", "reg:5000", None),
        ("team/a", "docker.io", None),
        ("a", "docker.io", None),
    ],
)
def test_image_references(repository, registry, port):
    image = ImageRef(repository, "t")
    assert (image.registry, image.local_port) == (registry, port)
    assert str(image) == f"{repository}:t"
    assert ImageRef(repository, "t", "sha256:1").pinned == f"{repository}@sha256:1"


def test_checkpoints_lie_beside_the_runs():
    assert Storage().checkpoint_root == "~/.orch/checkpoints"
    assert Storage(runs="/s/runs/").checkpoint_root == "/s/checkpoints"
    assert Storage(checkpoints="/c").checkpoint_root == "/c"


def test_job_spec():
    nodes = (Node("a", "1"), Node("b", "2"))
    spec = JobSpec("r", "n", nodes, 4, ("x",))
    assert spec.head is nodes[0] and spec.world_size == 8 and spec.series == "r"
    assert JobSpec("r", "n", nodes, 4, ("x",), launcher="none", series="s").world_size == 2


def test_states():
    ended = {state for state in RunState if state.is_terminal}
    assert ended == {RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.PREEMPTED, RunState.LOST}
    assert f"{RunState.RUNNING}" == "running"


def test_run_to_json_is_the_contract():
    run = Run("r", "n", RunState.FAILED, "ssh", ("a",), 0.0, exit_code=1, ended=60.0, image="i")
    assert run.to_json() == {
        "id": "r",
        "name": "n",
        "state": "failed",
        "exit_code": 1,
        "backend": "ssh",
        "nodes": ["a"],
        "started": "1970-01-01T00:00:00Z",
        "ended": "1970-01-01T00:01:00Z",
        "image": "i",
        "attempt": 1,
    }
    assert list(run.to_json()) == [
        "id",
        "name",
        "state",
        "exit_code",
        "backend",
        "nodes",
        "started",
        "ended",
        "image",
        "attempt",
    ]


def test_run_ids():
    now = datetime(2026, 1, 31, 12, 0, 5, tzinfo=UTC)
    assert new_run_id("My Job", now, "ab12") == "my-job-20260131-120005-ab12"
    assert re.fullmatch(r"x-\d{8}-\d{6}-[0-9a-f]{4}", new_run_id("x"))
    assert iso(None) is None


@settings(deadline=None)
@given(st.text())
def test_safe_names_are_safe_and_stable(name):
    safe = safe_name(name)
    assert re.fullmatch(r"[a-z0-9_.-]{1,80}", safe) and not safe.startswith((".", "-"))
    assert safe_name(safe) == safe


def test_node_result_from_json():
    data = {
        "schema": 1,
        "run": "r",
        "attempt": 1,
        "node": "n1",
        "index": 0,
        "host": "h",
        "state": "failed",
        "exit_code": 1,
        "started_ns": 1,
        "ended_ns": 2,
        "reason": "",
        "hint": "",
        "ranks": [
            {
                "rank": 0,
                "local_rank": 0,
                "exit_code": -9,
                "started_ns": 1,
                "ended_ns": 2,
                "error": {"type": "E", "message": "m", "traceback": "t", "time_ns": 3},
                "last_lines": ["a"],
            },
            {"rank": 1, "local_rank": 1, "exit_code": 0, "error": None},
        ],
    }
    result = NodeResult.from_json(data)
    first, second = result.ranks
    assert (result.state, first.exit_code, first.error.type, first.error.rank) == (RunState.FAILED, -9, "E", 0)
    assert first.last_lines == ("a",) and second.error is None
