"""Arguments, files and command lines around a cluster; the cluster itself is in tests/integration."""

from __future__ import annotations

import json
import socket
import stat
from dataclasses import asdict
from pathlib import Path

import pytest

from orchestrator.errors import DeadlineError, PreflightError, UsageError
from orchestrator.sim import assets, base, cluster, faults, image, keys, machine, objects, process
from orchestrator.sim.compose import Layout
from orchestrator.sim.process import run

LAYOUT = Layout("sim", "/p", 2, "orch-node:abc", "10.213.4.0/24", 5001, "ssh-ed25519 AAAA", "/repo/cluster.yaml")


@pytest.mark.parametrize(
    "arguments", [(0, "sim", 1), (201, "sim", 1), (2, "Sim x", 1), (2, "-a", 1), (2, "sim", 70000)]
)
def test_bad_arguments_are_refused_before_anything_is_started(arguments: tuple[int, str, int], tmp_path: Path) -> None:
    nodes, name, port = arguments
    with pytest.raises(UsageError):
        cluster.up(nodes, name, tmp_path, registry_port=port)
    assert not list(tmp_path.iterdir())


def test_load_reads_what_up_has_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no simulated cluster 'sim'"):
        cluster.load("sim", tmp_path)
    (tmp_path / ".orch" / "sim").mkdir(parents=True)
    (tmp_path / ".orch" / "sim" / "cluster.json").write_text(json.dumps(asdict(LAYOUT)))
    made = cluster.load("sim", tmp_path)
    assert made.layout == LAYOUT
    assert made.registry == "localhost:5001"
    assert made.inventory == tmp_path / "inventory" / "sim.yaml"
    with pytest.raises(UsageError, match="no node 'n3'"):
        made.container("n3")


def test_ssh_pins_host_keys_and_reads_nobodys_configuration(tmp_path: Path) -> None:
    argv = cluster.Cluster(LAYOUT, tmp_path / "with space").ssh_argv("n2", "true")
    assert argv[:3] == ["ssh", "-F", "none"]
    assert "StrictHostKeyChecking=yes" in argv
    assert f'UserKnownHostsFile="{tmp_path}/with space/.orch/sim/known_hosts"' in argv
    assert argv[-2:] == ["orch@10.213.4.12", "true"]


def test_key_is_private_made_once_and_ssh_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    public = keys.ensure_key(path, "orch-sim")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.ensure_key(path, "orch-sim") == public
    derived = run(["ssh-keygen", "-y", "-f", str(path)]).stdout.split()
    assert derived[:2] == public.split()[:2]


def test_node_image_is_named_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = assets.node_image()
    assert name == assets.node_image()
    folder = tmp_path / "images"
    folder.mkdir()
    for file in assets.NODE_FILES:
        (folder / file).write_bytes(assets.asset(f"images/{file}").read_bytes())
    monkeypatch.setattr(assets, "_ROOT", tmp_path)
    assert assets.node_image() == name
    (folder / "node-entrypoint.sh").write_text("#!/bin/bash\n")
    assert assets.node_image() != name
    with pytest.raises(PreflightError, match="lacks compose/x"):
        assets.asset("compose/x")


def test_bootstrap_command_for_both_bases(tmp_path: Path) -> None:
    argv = base.bootstrap_argv(base.JOB, tmp_path / "base.tar")
    assert argv[0] == "mmdebstrap"
    assert argv[-3:] == ["bookworm", str(tmp_path / "base.tar"), "-"]
    assert any("python3-venv" in word for word in argv if word.startswith("--include="))
    assert any("EXTERNALLY-MANAGED" in word for word in argv)
    assert not any("EXTERNALLY-MANAGED" in word for word in base.bootstrap_argv(base.NODE, tmp_path / "x"))


def test_base_image_that_is_here_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "has_image", lambda name: name == base.JOB.local)
    monkeypatch.setattr(base, "_pull", lambda name: pytest.fail("nothing is to be pulled"))
    assert base.ensure_base(base.JOB, lambda text: None) == "orch-base:bookworm"


def test_no_registry_and_no_mirror_says_how_to_help_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "has_image", lambda name: False)
    monkeypatch.setattr(base, "_pull", lambda name: False)
    monkeypatch.setattr(machine, "suite_sources", lambda suite: [])
    with pytest.raises(PreflightError, match="not a Debian machine") as caught:
        base.ensure_base(base.JOB, lambda text: None)
    assert "docker tag" in (caught.value.hint or "")


def test_privileged_is_tried_once_per_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_STATE", str(tmp_path))
    asked: list[tuple[str, ...]] = []

    class Refused:
        returncode = 125

    monkeypatch.setattr(image, "docker", lambda *argv, **options: asked.append(argv) or Refused())
    said: list[str] = []
    assert [image.allows_privileged("x", "engine-1", said.append) for _ in range(2)] == [False, False]
    assert len(asked) == len(said) == 1
    image.allows_privileged("x", "engine-2", said.append)
    assert len(asked) == 2


def test_the_machines_own_disk_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.health, "inside", lambda *argv, **options: "Avail\n79000000000\n")
    with pytest.raises(PreflightError, match="79 GB free, shared with this machine"):
        faults.fill_disk(cluster.Cluster(LAYOUT, tmp_path), "n1", "/home/orch")


def test_sources_of_both_formats_are_read(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.test/debian bookworm main\n")
    (tmp_path / "sources.list.d" / "b.sources").write_text(
        "Types: deb\nURIs: http://b.test/debian\nSuites: bookworm\nComponents: main\n"
    )
    (tmp_path / "sources.list.d" / "c.list.disabled").write_text("deb http://c.test/debian bookworm main\n")
    assert [source.uri for source in machine.apt_sources(tmp_path)] == ["http://a.test/debian", "http://b.test/debian"]


def test_lock_is_exclusive_and_its_file_goes_with_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_STATE", str(tmp_path))
    monkeypatch.setattr(process.time, "sleep", lambda seconds: None)
    clock = iter(range(0, 10**6, 100))
    with cluster._locked("sim"):
        monkeypatch.setattr(process.time, "monotonic", lambda: float(next(clock)))
        with pytest.raises(DeadlineError, match="another `orch sim` command on cluster sim"), cluster._locked("sim"):
            pytest.fail("two hold the lock")
        with cluster._locked("other", last=True):
            assert (tmp_path / "sim-other.lock").exists()
    with cluster._locked("sim", last=True):
        pass
    assert not list(tmp_path.iterdir())


def test_down_without_an_engine_removes_the_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(cluster.engine, "answers", lambda: False)
    project = tmp_path / "project"
    (project / ".orch" / "sim").mkdir(parents=True)
    (project / "inventory").mkdir()
    (project / "inventory" / "sim.yaml").write_text("nodes: {}\n")
    (project / "inventory" / "mine.yaml").write_text("nodes: {}\n")
    said: list[str] = []
    assert cluster.down("sim", project=project, say=said.append) is True
    assert sorted(path.name for path in project.rglob("*")) == ["inventory", "mine.yaml"]
    assert "no Docker engine answers" in said[0]
    assert cluster.down("sim", project=project, say=said.append) is False


def test_a_node_under_a_run_is_neither_replaced_nor_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {("ps",): "orch-sim-n1\norch-sim-n2\n", ("exec", "orch-sim-n2"): "orch\n"}

    class Done:
        def __init__(self, stdout: str) -> None:
            self.stdout = stdout

    def docker(*argv: str, **options: object) -> Done:
        return Done(answers.get(argv[:1], answers.get(argv[:2], "")))

    monkeypatch.setattr(cluster, "docker", docker)
    cluster._check_idle(LAYOUT, {"n1"})
    with pytest.raises(PreflightError, match="orch on n2"):
        cluster._check_idle(LAYOUT, {"n1", "n2"})


def test_a_taken_port_is_named_with_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        stdout = ""

    monkeypatch.setattr(objects, "docker", lambda *argv, **options: Done())
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(PreflightError, match="is taken here") as caught:
            objects.check_port(holder.getsockname()[1], "orch-sim-registry", "--registry-port")
    assert caught.value.hint == "choose another with --registry-port"
    Done.stdout = "somebody\n"
    with pytest.raises(PreflightError, match="taken by the container somebody"):
        objects.check_port(1, "orch-sim-registry", "--registry-port")
    objects.check_port(1, "somebody", "--registry-port")
