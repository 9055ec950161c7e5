"""A start is all or nothing: what is wrong on one node, or with the input, leaves nothing on any node."""

from __future__ import annotations

import io
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import yaml

from orchestrator.sim import cluster as sim
from orchestrator.sim import faults

if TYPE_CHECKING:
    from tests.integration.conftest import Done, Rig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ONCE = ("--nodes", "2", "--launcher", "none")


def refused(cluster: Rig, *words: str, code: int, says: str, node: str | None = None) -> Done:
    """A deploy that must fail with `code` and a message, and leave nothing of it on any node."""
    name = f"no-{uuid.uuid4().hex[:6]}"
    done = cluster.orch("deploy", "--name", name, *words, code=code)
    error = [line for line in done.err.splitlines() if line.startswith(("error:", "  n"))]
    assert any(says in line and (node is None or f"{node}: " in line) for line in error), done.text
    assert "Traceback" not in done.text
    assert cluster.traces(name) == []
    return done


# ---- input


def test_wrong_input_is_told_before_anything_is_contacted(cluster: Rig) -> None:
    refused(cluster, *ONCE[:2], "--recipe", "dmeo", code=2, says="did you mean 'demo'")
    refused(cluster, "--nodes", "8", "--", "true", code=2, says="8")
    other = cluster.config(run={"comand": "true"})
    done = cluster.orch("--config", other, "deploy", *ONCE, code=2)
    assert "run.comand" in done.err and "did you mean 'command'" in done.err, done.text
    unknown = refused(cluster, "--nodes", "2", "--recipe", "demo", "--on", "smi", code=2, says="did you mean 'sim'")
    assert "rolling back" not in unknown.err


# ---- nodes that cannot be reached


def other_inventory(cluster: Rig, **changes: str) -> str:
    """The path of an inventory in which n2 has other settings."""
    document = yaml.safe_load(cluster.cluster.inventory.read_text())
    document["nodes"]["n2"] |= changes
    path = cluster.cluster.inventory.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_a_wrong_key_and_an_unknown_host_key(cluster: Rig, tmp_path) -> None:
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", str(key)], check=True)
    stranger = other_inventory(cluster, key=str(key))
    refused(cluster, *ONCE, "--inventory", stranger, "--", "true", code=3, says="key", node="n2")
    (tmp_path / "empty").touch()
    unknown = other_inventory(cluster, known_hosts=str(tmp_path / "empty"))
    done = refused(cluster, *ONCE, "--inventory", unknown, "--", "true", code=3, says="host key", node="n2")
    assert "orch nodes trust" in done.err
    assert (tmp_path / "empty").read_text() == ""


def test_a_changed_host_key(cluster: Rig) -> None:
    before = cluster.cluster.known_hosts.read_text()
    try:
        faults.change_host_key(cluster.cluster, "n2")
        refused(cluster, *ONCE, "--", "true", code=3, says="changed", node="n2")
        assert cluster.cluster.known_hosts.read_text() == before
    finally:
        sim.up(2, cluster.cluster.name, cluster.project, shared=True, registry_port=0)


def test_a_node_that_is_down(cluster: Rig) -> None:
    faults.kill(cluster.cluster, "n2")
    name = f"no-{uuid.uuid4().hex[:6]}"
    done = cluster.orch("deploy", "--name", name, *ONCE, "--", "true", code=3)
    assert "n2: " in done.err and "Traceback" not in done.text
    faults.start(cluster.cluster, "n2")
    assert cluster.traces(name) == []


# ---- engines, images, containers


def test_an_engine_that_is_down_on_one_node(cluster: Rig) -> None:
    faults.kill_engine(cluster.cluster, "n2")
    name = f"no-{uuid.uuid4().hex[:6]}"
    done = cluster.orch("deploy", "--name", name, *ONCE, "--", "true", code=4)
    assert "n2: the Docker engine does not answer" in done.err, done.text
    faults.start_engine(cluster.cluster, "n2")
    assert cluster.traces(name) == []


def test_a_container_that_starts_on_one_node_only_is_taken_back(cluster: Rig) -> None:
    """n1 has the mount's source as a folder and starts; on n2 it is a file, which the engine refuses at the start."""
    source = "/home/orch/odd mount, $(id)"
    cluster.on("n1", f"mkdir -p '{source}'")
    cluster.on("n2", f"touch '{source}'")
    stranger = cluster.on("n1", f"docker create --name stranger {cluster.image} true").strip()
    keep = cluster.hold()
    cluster.orch("stop", keep)
    try:
        mounts = [{"source": source, "target": "/opt"}]
        changed = cluster.config(run={"mounts": mounts})
        done = refused(cluster, *ONCE, "--config", changed, "--", "sleep", "60", code=1, says="directory", node="n2")
        assert "starting (n1, n2)" in done.err and "failed to create shim" not in done.err, done.text
        assert cluster.processes("n1", "sleep 6[0]") == []
        missing = cluster.config(run={"mounts": [{**mounts[0], "source": "/home/orch/only on n1"}]})
        cluster.on("n1", "mkdir '/home/orch/only on n1'")
        refused(cluster, *ONCE, "--config", missing, "--", "true", code=4, says="/home/orch/only on n1", node="n2")
        assert cluster.on("n1", "docker ps -aq --no-trunc --filter name=stranger").strip() == stranger
        assert any(f"runs/{keep}" in each for each in cluster.traces(keep))
    finally:
        cluster.on("n1", f"docker rm -f {stranger}; rm -rf '{source}' '/home/orch/only on n1'")
        cluster.on("n2", f"rm -f '{source}'")


def test_a_foreign_container_of_our_name_is_left_alone(cluster: Rig) -> None:
    cluster.on("n2", f"docker run -d --name orch {cluster.image} sleep 600")
    try:
        refused(cluster, *ONCE, "--", "true", code=4, says="not a run", node="n2")
        assert cluster.containers("n2") == ["orch running "]
    finally:
        cluster.on("n2", "docker rm -f orch")


def test_a_registry_that_is_down(cluster: Rig) -> None:
    faults.stop(cluster.cluster, "registry")
    refused(cluster, *ONCE, "--", "true", code=3, says=cluster.cluster.registry)


@pytest.fixture
def bare(cluster: Rig) -> Iterator[str]:
    """A pushed image, pinned, that holds one text file and no Python; removed everywhere afterwards."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("etc/motd")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"bare\n"))
    tag = f"{cluster.cluster.registry}/orch-bare:{uuid.uuid4().hex[:8]}"
    subprocess.run(["docker", "import", "-", tag], input=archive.getvalue(), check=True, capture_output=True)
    subprocess.run(["docker", "push", "-q", tag], check=True, capture_output=True)
    form = "{{index .RepoDigests 0}}"
    asked = subprocess.run(["docker", "image", "inspect", "-f", form, tag], check=True, capture_output=True, text=True)
    yield asked.stdout.strip()
    subprocess.run(["docker", "image", "rm", tag], check=True, capture_output=True)


def test_an_image_without_python_and_a_pull_that_fails_on_one_node(cluster: Rig, bare: str) -> None:
    changed = cluster.config(image={"ref": bare})
    done = cluster.orch("deploy", *ONCE, "--config", changed, "--", "true", code=127)
    assert "python3 is not in the image" in done.err, done.text
    # n1 has the image now, n2 no more; with the registry gone only n1 can create its container.
    cluster.on("n2", f"docker image rm {bare}")
    faults.stop(cluster.cluster, "registry")
    refused(cluster, *ONCE, "--config", changed, "--", "true", code=3, says=cluster.cluster.registry, node="n2")


def test_an_image_that_does_not_exist(cluster: Rig, bare: str) -> None:
    absent = bare.partition("@")[0] + "@sha256:" + "0" * 64
    changed = cluster.config(image={"ref": absent})
    refused(cluster, *ONCE, "--config", changed, "--", "true", code=3, says="cannot be pulled")


# ---- ends right after the start


def test_commands_that_end_at_once(cluster: Rig) -> None:
    """A command that is not there, one that fails at once, and one that does nothing."""
    wrong = ("sh", "-c", "echo gone wrong; exit 3")
    cases = ((127, ("nosuch", "-x"), "nosuch"), (1, wrong, "gone wrong"), (0, ("true",), ""))
    for code, command, says in cases:
        done = cluster.orch("deploy", *ONCE, "--", *command, code=code)
        assert says in done.err, done.text
        assert code == 0 or "first cause" in done.err, done.text
    missing = cluster.orch("deploy", "--nodes", "1", "--", "jobs/nosuch.py", code=127)
    assert "jobs/nosuch.py" in missing.err and "echo.py" not in missing.out.splitlines()[0]


def test_a_launcher_that_cannot_run_in_the_image(cluster: Rig) -> None:
    """A python3 that is none: the container ends at once and leaves no result; the engine's log says why."""
    container = f"orch-it-{uuid.uuid4().hex[:8]}"
    tag = f"{cluster.cluster.registry}/orch-it:broken"
    script = "cd /opt/venv/bin; rm -f python3; "
    script += "printf '#!/bin/sh\\necho broken interpreter; exit 3\\n' > python3; chmod +x python3"
    try:
        argv = ["docker", "run", "--name", container, "--entrypoint", "sh", cluster.image, "-c", script]
        subprocess.run(argv, check=True, capture_output=True)
        subprocess.run(["docker", "commit", container, tag], check=True, capture_output=True)
        subprocess.run(["docker", "push", "-q", tag], check=True, capture_output=True)
        changed = cluster.config(image={"ref": tag})
        done = cluster.orch("deploy", *ONCE, "--config", changed, "--", "true", code=1)
        assert "broken interpreter" in done.err and "exit code 3" in done.err, done.text
    finally:
        subprocess.run(["docker", "rm", "-f", container], check=False, capture_output=True)
        subprocess.run(["docker", "image", "rm", tag], check=False, capture_output=True)


def test_a_rendezvous_port_that_is_taken(cluster: Rig) -> None:
    """On port 22 sshd listens already."""
    changed = cluster.config(run={"port": 22})
    refused(cluster, "--nodes", "2", "--config", changed, "--", "jobs/hold.py", code=4, says="port 22", node="n1")


# ---- storage


def test_storage_that_is_not_what_the_configuration_says(cluster: Rig) -> None:
    """/shared is one folder for both nodes, the home folders are not."""
    runs = {"runs": "/shared/orch/runs", "cache": "/shared/orch/cache"}
    try:
        wrong = cluster.config(storage={"kind": "shared"})
        refused(cluster, *ONCE, "--config", wrong, "--", "true", code=4, says="not shared")
        wrong = cluster.config(storage={"kind": "local", **runs})
        refused(cluster, *ONCE, "--config", wrong, "--", "true", code=4, says="shared with")
        assert cluster.on("n1", "ls /shared/orch/runs").split() == []
        right = cluster.config(storage={"kind": "shared", **runs})
        done = cluster.orch("deploy", *ONCE, "--config", right, "--", "jobs/echo.py")
        assert done.out.count('"argv"') == 2
        run = cluster.orch("runs", "--json", "--limit", "1").json[0]["id"]
        assert cluster.on("n2", f"ls /shared/orch/runs/{run}").split() == ["n1", "n2", "nodes"]
        later = cluster.orch("--config", right, "logs", run).out
        assert sorted(later.splitlines()) == sorted(done.out.splitlines())
    finally:
        cluster.on("n1", "rm -rf /shared/orch")
