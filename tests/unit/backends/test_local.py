"""The local backend with the real launcher, without torch and Docker."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from orchestrator.backends.found import planned
from orchestrator.backends.local import LocalBackend, local_node
from orchestrator.connect.local import LocalConnector
from orchestrator.errors import OrchError, PreflightError, RemoteError
from orchestrator.specs import JobSpec, RunState, Secret, Storage

RUN = "demo-20260131-120000-ab12"


@pytest.fixture
def here(tmp_path: Path):
    (tmp_path / "it's here").mkdir()
    backend = LocalBackend(LocalConnector(), python=sys.executable, workdir=str(tmp_path / "it's here"))

    def plan(command: str, **changes):
        values = {
            "nodes": (local_node(),),
            "procs": 1,
            "launcher": "none",
            "backend": "local",
            "storage": Storage(runs=str(tmp_path / "ru ns"), cache=str(tmp_path / "cache")),
            "secrets": {"TOKEN": Secret("s3cr3t-value")},
        }
        return backend.plan(JobSpec(RUN, "demo", command=("sh", "-c", command), **{**values, **changes}))

    return backend, plan


def tell(node: str, text: str) -> None:
    pass


def read(stream, end: bytes = b"") -> bytes:
    """All of a stream, or up to `end`."""
    text, limit = b"", time.monotonic() + 30
    while (chunk := stream.read(5)) != b"":
        assert chunk is not None and time.monotonic() < limit
        text += chunk
        if end and end in text:
            break
    stream.close()
    return text


def test_a_run_from_start_to_end(here) -> None:
    backend, make = here
    plan = make('pwd; echo "$TOKEN in $ORCH_RUN_DIR"; touch "$ORCH_CHECKPOINT_DIR"/x; sleep 0.05')
    backend.submit(plan, tell)
    found, node = planned(plan, time.time()), plan.nodes[0].node
    beats, newline, text = read(backend.watch(found, node)).partition(b"\n")
    assert (set(beats), newline) == (set(b"."), b"\n")
    result = backend.ended(text, node, 0)
    assert result and (result.state, result.exit_code) == (RunState.SUCCEEDED, 0)
    lines = read(backend.open_log(found, node, 0)).decode().splitlines()
    assert f"0\t*** in {found.dir('here')}" in lines and any(line.endswith("it's here") for line in lines)
    assert backend.status(found, [node])["here"].state is RunState.SUCCEEDED
    (seen,) = backend.discover([node], plan.spec.storage.runs)[0]
    assert (seen.run.id, seen.run.state, seen.run.backend) == (RUN, RunState.SUCCEEDED, "local")
    assert backend.remove(seen, [node], files=True) == {}
    assert backend.discover([node], plan.spec.storage.runs) == ([], {})


def test_it_outlives_its_operator_and_stops_when_asked(here) -> None:
    backend, make = here
    plan = make("echo ready; exec sleep 987", grace=1)
    backend.submit(plan, tell)
    found, node = planned(plan, 0.0), plan.nodes[0].node
    read(backend.open_log(found, node, 0), b"ready")
    assert backend.status(found, [node])["here"].state is RunState.RUNNING
    assert backend.discover([node], plan.spec.storage.runs)[0][0].run.state is RunState.RUNNING
    pid = int((Path(found.dir("here")) / "pid").read_text().split()[0])
    assert os.getsid(pid) == pid
    assert backend.stop(found, [node], kill=True) == {}
    result = backend.ended(read(backend.watch(found, node)).partition(b"\n")[2], node, 0)
    assert result and result.state is RunState.STOPPED


def test_a_launcher_that_was_killed(here) -> None:
    backend, make = here
    plan = make("echo ready; exec sleep 987")
    backend.submit(plan, tell)
    found, node = planned(plan, 0.0), plan.nodes[0].node
    read(backend.open_log(found, node, 0), b"ready")
    pid = int((Path(found.dir("here")) / "pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    result = backend.ended(read(backend.watch(found, node)).partition(b"\n")[2], node, 0)
    assert result and result.state is RunState.FAILED and "left no result" in result.reason


def test_a_pid_that_came_again_is_not_our_launcher(here) -> None:
    backend, make = here
    plan = make("true")
    found, node = planned(plan, 0.0), plan.nodes[0].node
    run = Path(found.dir("here"))
    run.mkdir(parents=True)
    (run / "pid").write_text(f"{os.getpid()} 1\n")
    (run / "launcher.out").write_text("no torch\n")
    status = backend.status(found, [node])["here"]
    assert status.state is RunState.FAILED and status.result.ranks[0].last_lines[0] == "no torch"
    backend.end(found, [node])  # and this very process is still here


@pytest.mark.parametrize("how", ["no python", "no work folder", "no run folder"])
def test_a_start_that_fails_leaves_nothing(here, tmp_path: Path, how: str) -> None:
    backend, make = here
    storage = Storage(runs=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))
    if how == "no python":
        backend._python = str(tmp_path / "none/python")
    elif how == "no work folder":
        backend._workdir = str(tmp_path / "none")
    else:
        storage = Storage(runs="/proc/nope/runs", cache=storage.cache)
    plan = make("true", storage=storage)
    backend = LocalBackend(LocalConnector(), python=backend._python, workdir=backend._workdir)
    with pytest.raises(OrchError) as caught:
        backend.submit(backend.plan(plan.spec), tell)
    assert isinstance(caught.value, PreflightError if how == "no run folder" else RemoteError)
    assert not list((tmp_path / "runs").glob("*")) and not list((tmp_path / "checkpoints").glob("*"))
