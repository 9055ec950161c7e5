"""What is staged on a node: places, job.json, secrets, the archive."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.backends.local import LocalBackend
from orchestrator.backends.ssh import SshBackend
from orchestrator.commands import job, probe
from orchestrator.connect.fake import FakeConnector
from orchestrator.specs import ImageRef, JobSpec, Mount, Node, Secret, Storage

RUN = "demo-20260131-120000-ab12"
NODES = (Node("n1", "203.0.113.1", private="10.0.0.1"), Node("Rack/2 B", "203.0.113.2"))
SECRET = "hf_s3cr3t'\"$(touch pwned)\n=x"


def spec(**changes) -> JobSpec:
    base = JobSpec(
        run_id=RUN,
        name="demo",
        nodes=NODES,
        procs=2,
        command=("train.py", "--x", "$(id) a\n'b'"),
        image=ImageRef("r.example.com/demo", "v1", "sha256:" + "0" * 64),
        env={"A": "a b\n$(id)", "Q": "\"'"},
        secrets={"HF_TOKEN": Secret(SECRET), "EMPTY": Secret("")},
        mounts=(Mount('/d a,t"a', "/data", True),),
        operator="me@here",
    )
    return replace(base, **changes)


# -- places ----------------------------------------------------------------------------------


def test_places_on_local_storage() -> None:
    at = job.places(spec(), 1)
    assert (at.root, at.run_dir) == (f"~/.orch/runs/{RUN}", f"~/.orch/runs/{RUN}")
    assert (at.checkpoints, at.cache) == (f"~/.orch/checkpoints/{RUN}", "~/.orch/cache")
    assert (at.job_root, at.job_run_dir) == (f"/orch/runs/{RUN}", f"/orch/runs/{RUN}")
    assert (at.job_checkpoints, at.job_cache, at.job_home) == (
        f"/orch/checkpoints/{RUN}",
        "/orch/cache",
        "/orch/cache/home",
    )


def test_places_on_shared_storage_keep_the_nodes_apart() -> None:
    shared = spec(storage=Storage("shared", "/nfs/runs/", "/nfs/ck/", "/nfs/cache/"), series="My Series")
    first, second = job.places(shared, 0), job.places(shared, 1)
    assert first.root == second.root == f"/nfs/runs/{RUN}"
    assert (first.run_dir, second.run_dir) == (f"/nfs/runs/{RUN}/n1", f"/nfs/runs/{RUN}/rack-2-b")
    assert second.job_run_dir == f"/orch/runs/{RUN}/rack-2-b"
    assert first.checkpoints == second.checkpoints == "/nfs/ck/my-series"
    assert first.job_checkpoints == "/orch/checkpoints/my-series"


def test_places_without_a_container_are_this_machines_own() -> None:
    at = job.places(spec(storage=Storage(runs="/home/me/runs")), 0, container=False)
    assert (at.job_run_dir, at.job_checkpoints) == (at.run_dir, at.checkpoints)
    assert at.checkpoints == f"/home/me/checkpoints/{RUN}"


def test_environment() -> None:
    env = job.environment(spec(), job.places(spec(), 0))
    assert env["ORCH_RUN_DIR"] == f"/orch/runs/{RUN}" and env["HOME"] == "/orch/cache/home"
    assert env["USER"] == env["LOGNAME"] == "orch"
    assert env["A"] == "a b\n$(id)"
    assert job.environment(spec(env={"HOME": "/x"}), job.places(spec(), 0))["HOME"] == "/x"
    bare = job.environment(spec(), job.places(spec(), 0, container=False), container=False)
    assert "HOME" not in bare and "USER" not in bare and bare["ORCH_RUN_ID"] == RUN


# -- job.json --------------------------------------------------------------------------------


def test_job_json() -> None:
    """The keys that docs/contracts.md promises to the launcher."""
    content = job.job(spec(), 1, job.places(spec(), 1))
    promised = (
        "schema run name series attempt backend operator image node index nodes node_names procs gpus address head "
        "port launcher torchrun command stop grace stop_grace rendezvous_timeout env"
    )
    assert " ".join(content) == promised
    assert (content["node"], content["index"], content["nodes"]) == ("Rack/2 B", 1, 2)
    assert (content["address"], content["head"]) == ("203.0.113.2", "10.0.0.1")
    assert content["command"] == ["train.py", "--x", "$(id) a\n'b'"]
    assert content["image"] == "r.example.com/demo@sha256:" + "0" * 64
    assert json.loads(json.dumps(content)) == content
    assert job.job(spec(launcher="none"), 0, job.places(spec(), 0))["torchrun"] == []
    assert job.job(spec(grace=500), 0, job.places(spec(), 0))["stop_grace"] == 500


def test_one_node_without_a_container_looks_for_no_interface() -> None:
    alone = spec(nodes=NODES[:1], image=None)
    assert job.job(alone, 0, job.places(alone, 0, container=False), container=False)["address"] == ""
    assert job.job(alone, 0, job.places(alone, 0))["address"] == "10.0.0.1"


# -- secrets and the archive -----------------------------------------------------------------


def staged(one: JobSpec, index: int = 0) -> dict[str, bytes]:
    return job.files(one, index, job.places(one, index), b"launcher")


def test_secrets_are_in_their_file_and_nowhere_else() -> None:
    for storage in (Storage(), Storage("shared", "/nfs/runs")):
        files = staged(spec(storage=storage))
        holding = [name for name, data in files.items() if b"s3cr3t" in data]
        assert [name.rpartition("/")[2] for name in holding] == ["secrets.env"]
    assert "secrets.env" not in staged(spec(secrets={}))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), st.text(), max_size=4))
def test_any_secret_fits_its_line(values: dict[str, str]) -> None:
    text = job.secrets_file(spec(secrets={name: Secret(value) for name, value in values.items()})).decode()
    lines = text.split("\n")
    assert lines.pop() == "" and len(lines) == len(values)
    assert {name: json.loads(value) for name, _, value in (line.partition("=") for line in lines)} == values


def test_the_archive_is_private() -> None:
    data = job.archive(staged(spec(storage=Storage("shared", "/nfs/runs")), 1))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        entries = {entry.name: entry for entry in tar}
        assert set(entries) == {f"rack-2-b/{name}" for name in ("job.json", "launch.py", "secrets.env")} | {
            "nodes/rack-2-b"
        }
        assert {entry.mode for entry in entries.values()} == {0o600}
        assert all(entry.isfile() for entry in entries.values())
        file = tar.extractfile("rack-2-b/job.json")
        assert file and json.load(file)["node"] == "Rack/2 B"


@pytest.mark.parametrize("kind", ["local", "shared"])
@pytest.mark.parametrize("runs", ["~/o'rch $(touch pwned)/runs", "~/.orch/runs"])
def test_staging_on_a_node(machine, kind: str, runs: str) -> None:
    one = spec(storage=Storage(kind, runs), series="my-series")
    at = job.places(one, 1)
    script = probe.SAY + "\n" + job.stage_script(one, at)
    done = machine.run(script, job.archive(staged(one, 1)))
    assert done.returncode == 0, done.stderr
    root = machine.home / runs[2:] / RUN
    run = root / "rack-2-b" if kind == "shared" else root
    assert sorted(each.name for each in run.iterdir() if each.name != "nodes") == sorted(
        ["checkpoints", "errors", "events", "job.json", "launch.py", "secrets.env", "tensorboard"]
    )
    assert (run / "secrets.env").stat().st_mode & 0o077 == 0
    assert (root / "nodes/rack-2-b").exists()
    # relative, so that it is right on the node and in the container
    target = os.readlink(run / "checkpoints")
    assert os.path.normpath(f"{run}/{target}") == f"{machine.home / runs[2:]}".removesuffix("runs") + (
        "checkpoints/my-series"
    )
    assert os.path.normpath(f"{at.job_run_dir}/{target}") == "/orch/checkpoints/my-series"
    assert machine.run(script, job.archive(staged(one, 1))).returncode == 0  # twice is once
    assert not list(machine.root.rglob("pwned"))


def test_checkpoints_elsewhere_are_linked_by_their_path(machine) -> None:
    one = spec(storage=Storage("local", "~/runs", "~/big disk"))
    machine.run(probe.SAY + "\n" + job.stage_script(one, job.places(one, 0)), job.archive(staged(one)))
    assert os.readlink(machine.home / f"runs/{RUN}/checkpoints") == f"{machine.home}/big disk/{RUN}"


def test_staging_that_fails_is_a_fact_and_not_a_crash(machine) -> None:
    """Otherwise the reason would be lost behind the script's exit code."""
    (machine.home / "runs").write_text("")
    one = spec(storage=Storage(runs="~/runs"))
    done = machine.run(probe.SAY + "\n" + job.stage_script(one, job.places(one, 0)), job.archive(staged(one)))
    assert done.returncode == 0
    (problem,) = probe.judge(probe.facts(done.stdout), node="n1")
    assert problem.message.startswith("cannot write the run's files: ")


def test_folders_before_the_container() -> None:
    assert job.folders(job.places(spec(), 0)) == ("~/.orch/runs", f"~/.orch/checkpoints/{RUN}", "~/.orch/cache/home")


# -- the plan --------------------------------------------------------------------------------


def plans(one: JobSpec):
    yield SshBackend(FakeConnector({})).plan(one)
    yield LocalBackend(FakeConnector({}), python="python3", workdir=".").plan(
        replace(one, nodes=one.nodes[:1], backend="local")
    )


def test_a_plan_is_deterministic() -> None:
    for first, second in zip(plans(spec()), plans(spec()), strict=True):
        assert first == second
        assert [node.files for node in first.nodes] == [node.files for node in second.nodes]


def test_a_plan_shows_no_secret() -> None:
    for plan in plans(spec()):
        assert "s3cr3t" not in repr(plan)
        for node in plan.nodes:
            shown = [json.dumps(node.job), *(text for step in node.steps for text in (step.command, step.stdin))]
            assert not any("s3cr3t" in text for text in shown)
            assert node.steps[0].stdin


def test_a_plan_is_shell_that_parses() -> None:
    for plan in plans(spec(storage=Storage("shared", "/a b/it's", None, "~/c $(id)"))):
        for node in plan.nodes:
            for step in node.steps:
                done = subprocess.run(["sh", "-n"], input=step.command.encode(), capture_output=True)
                assert done.returncode == 0, (step.title, done.stderr)
