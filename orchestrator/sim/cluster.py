"""Brings a simulated cluster up, down, and says how it is.

Everything a cluster owns carries the label `orch.sim=<name>`; its files lie in `<project>/.orch/<name>/`
and its inventory in `<project>/inventory/<name>.yaml`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from orchestrator.errors import OrchError, PreflightError, UsageError
from orchestrator.sim import assets, compose, engine, health, image, keys, machine, objects, plugins
from orchestrator.sim.compose import LABEL, Layout
from orchestrator.sim.process import Say, docker, run, say, wait_until

KEY = "id_ed25519"


@dataclass(frozen=True)
class Cluster:
    """A simulated cluster that is up, and where its files lie."""

    layout: Layout
    project: Path

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.layout.node_names

    @property
    def registry(self) -> str:
        """Host and port of the registry as the operator's machine sees it."""
        return f"localhost:{self.layout.registry_port}"

    @property
    def state(self) -> Path:
        return self.project / ".orch" / self.name

    @property
    def key(self) -> Path:
        return self.state / KEY

    @property
    def known_hosts(self) -> Path:
        return self.state / "known_hosts"

    @property
    def inventory(self) -> Path:
        return self.project / "inventory" / f"{self.name}.yaml"

    def container(self, node: str) -> str:
        """The container that is `node`. Raises UsageError for a node that the cluster does not have."""
        if node not in (*self.nodes, compose.REGISTRY):
            raise UsageError(f"cluster {self.name} has no node {node!r}: {', '.join(self.nodes)}")
        return self.layout.container(node)

    def ssh_argv(self, node: str, *command: str) -> list[str]:
        """The system's ssh to `node`, with this cluster's key and pinned host keys and nobody's configuration."""
        published = self.layout.ssh_ports.get(node)
        options = {"StrictHostKeyChecking": "yes", "UserKnownHostsFile": f'"{self.known_hosts}"'}
        options |= {"GlobalKnownHostsFile": "/dev/null", "BatchMode": "yes", "ConnectTimeout": "10"}
        argv = ["ssh", "-F", "none", "-i", str(self.key), "-p", str(published or 22), "-o", "IdentitiesOnly=yes"]
        for option, value in options.items():
            argv += ["-o", f"{option}={value}"]
        address = "127.0.0.1" if published else self.layout.address(node)
        return [*argv, f"orch@{address}", *command]


def up(
    nodes: int = 2,
    name: str = "sim",
    project: Path | None = None,
    shared: bool = False,
    registry_port: int = 5001,
    say: Say = say,
) -> Cluster:
    """Makes the cluster be as asked: builds, starts, grows, shrinks and heals, and does nothing that is done.

    `registry_port` 0 takes a free one (and keeps it). Raises UsageError, PreflightError, BuildError,
    DeadlineError (which says what did not come up).
    """
    project = (project or Path.cwd()).resolve()
    _check_arguments(nodes, name, registry_port)
    engine.ensure_engine(say)
    objects.check_owner(name, project)
    with _locked(name):
        old = _stored(name, project)
        if old is None and objects.remove_objects(name, volumes=False):
            # Their key and addresses went with the state folder; the disks are taken over.
            say(f"cluster {name} was left without its state folder: containers and network are made anew")
        wanted = _wanted(old, nodes, name, project, shared, registry_port, say)
        cluster = Cluster(wanted, project)
        if wanted != old or not _all_running(cluster):
            _start(cluster, old, say)
        _write_access(cluster, health.heal(cluster, say))
        return cluster


def _check_arguments(nodes: int, name: str, registry_port: int) -> None:
    if not 1 <= nodes <= compose.MAX_NODES:
        raise UsageError(f"a simulated cluster has 1 to {compose.MAX_NODES} nodes, not {nodes}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,30}", name):
        raise UsageError(
            f"{name!r} cannot be a cluster's name", hint="use lower-case letters, digits, - and _ (at most 31)"
        )
    if not 0 <= registry_port < 65536:
        raise UsageError(f"{registry_port} is not a port")


@contextmanager
def _locked(name: str, *, last: bool = False) -> Iterator[None]:
    """One `up` or `down` of a cluster at a time; with `last`, the lock's file goes too.

    Raises DeadlineError after ten minutes.
    """
    path = machine.state_dir() / f"sim-{name}.lock"
    held: list[TextIO] = []

    def taken() -> bool:
        import fcntl

        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file: then this lock is on nothing that others see.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                held.append(file)
        except BlockingIOError:
            pass
        if not held:
            file.close()
        return bool(held)

    if os.name == "posix":  # elsewhere two at once are the user's own business
        wait_until(taken, f"the end of another `orch sim` command on cluster {name}", deadline=600)
    try:
        yield
        if last:
            path.unlink(missing_ok=True)
    finally:
        for file in held:
            file.close()


def _stored(name: str, project: Path) -> Layout | None:
    try:
        return Layout(**json.loads((project / ".orch" / name / "cluster.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _wanted(
    old: Layout | None, nodes: int, name: str, project: Path, shared: bool, registry_port: int, say: Say
) -> Layout:
    """The layout to have: what is already decided (subnet, ports) stays. Builds the node image if need be."""
    state = project / ".orch" / name
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = keys.ensure_key(state / KEY, f"orch-{name}")
    tag = assets.node_image()
    parts = str(assets.asset("compose/cluster.yaml"))
    if old and old.image == tag and old.authorized_key == key and old.parts == parts:
        port = registry_port or old.registry_port
        wanted = replace(old, nodes=nodes, shared=shared, registry_port=port)
        return replace(wanted, ssh_ports=_ssh_ports(wanted)) if old.ssh_ports else wanted
    about = engine.describe()
    ready = image.base.has_image(tag)
    needed = engine.DISK_NEEDED_WARM if ready else engine.DISK_NEEDED
    engine.check_machine(Path(about.root or "/"), needed, None if about.reachable else about.memory)
    plugins.ensure_plugins(say)
    image.ensure_node_image(say)
    subnet = old.subnet if old else _free_subnet()
    port = registry_port or (old.registry_port if old else _free_port())
    privileged = image.allows_privileged(tag, about.id, say)
    fresh = Layout(name, str(project), nodes, tag, subnet, port, key, parts, privileged, shared)
    return fresh if about.reachable else replace(fresh, ssh_ports=_ssh_ports(fresh, old))


def _ssh_ports(layout: Layout, old: Layout | None = None) -> dict[str, int]:
    known = dict((old or layout).ssh_ports)
    return {node: known.get(node) or _free_port() for node in layout.node_names}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _free_subnet() -> str:
    ids = docker("network", "ls", "-q").stdout.split()
    form = "{{range .IPAM.Config}}{{.Subnet}} {{end}}"
    used = docker("network", "inspect", "--format", form, *ids, check=False).stdout.split() if ids else []
    if machine.is_linux():
        routes = run(["ip", "-4", "-o", "route"], check=False).stdout.splitlines() if shutil.which("ip") else []
        used += [line.split()[0] for line in routes if line[:1].isdigit()]
    return compose.free_subnet(used)


def _all_running(cluster: Cluster) -> bool:
    listed = docker("ps", "--filter", f"label={LABEL}={cluster.name}", "--format", "{{.Names}}").stdout.split()
    return set(listed) == {cluster.layout.container(service) for service in (*cluster.nodes, compose.REGISTRY)}


def _start(cluster: Cluster, old: Layout | None, say: Say) -> None:
    layout = cluster.layout
    plugins.ensure_plugins(say)
    if old:
        replaced = not compose.same_nodes(old, layout)
        _check_idle(old, set(old.node_names) if replaced else set(old.node_names) - set(layout.node_names))
        if replaced:
            # Containers of another image or network are made anew; volumes, and so the nodes' files, stay.
            objects.remove_containers(cluster.name)
        elif old.registry_port != layout.registry_port:
            docker("rm", "-f", layout.container(compose.REGISTRY), check=False)
    objects.check_port(layout.registry_port, layout.container(compose.REGISTRY), "--registry-port")
    say(f"starting {layout.nodes} node{'s' * (layout.nodes > 1)} and a registry ({layout.prefix})")
    file = cluster.state / "compose.yaml"
    file.write_text(json.dumps(compose.document(layout), indent=2) + "\n")  # JSON is YAML
    argv = ["compose", "-p", layout.prefix, "-f", str(file), "up", "-d", "--remove-orphans", "--no-build"]
    # --no-recreate: what has to be replaced is gone by now, and compose shall not find reasons of its own.
    try:
        docker(*argv, "--no-recreate", "--pull", "never", timeout=180, what=f"start cluster {cluster.name}")
    except OrchError as error:
        error.hint = error.hint or f"`orch sim down --name {cluster.name}` clears what was half started"
        raise
    objects.remove_surplus_volumes(layout)
    (cluster.state / "cluster.json").write_text(json.dumps(asdict(layout), indent=2) + "\n")


def _check_idle(old: Layout, nodes: set[str]) -> None:
    """Nodes are not replaced or removed under a run. Raises PreflightError, naming what runs where."""
    running = docker("ps", "--filter", f"label={LABEL}={old.name}", "--format", "{{.Names}}").stdout.split()

    def busy(node: str) -> str:
        if old.container(node) not in running:
            return ""
        argv = ["exec", old.container(node), "docker", "ps", "--format", "{{.Names}}"]
        return " ".join(docker(*argv, check=False, timeout=20).stdout.split())

    order = sorted(nodes, key=lambda node: int(node[1:]))
    found = {node: names for node, names in zip(order, health.each(order, busy), strict=True) if names}
    if found:
        listing = ", ".join(f"{names} on {node}" for node, names in found.items())
        raise PreflightError(
            f"cluster {old.name} would have to replace or remove nodes on which containers run: {listing}",
            hint=f"wait for them or `orch stop` them first; `orch sim down --name {old.name}` ends everything",
        )


def _write_access(cluster: Cluster, host_keys: dict[str, str]) -> None:
    """known_hosts and the inventory."""
    import yaml

    _write(cluster.known_hosts, compose.known_hosts(cluster.layout, host_keys))
    cluster.inventory.parent.mkdir(parents=True, exist_ok=True)
    relative = f"../.orch/{cluster.name}"
    content = compose.inventory(cluster.layout, f"{relative}/{KEY}", f"{relative}/known_hosts")
    header = f"# Written by `orch sim up --name {cluster.name}`; `orch sim down` removes it.\n"
    _write(cluster.inventory, header + yaml.safe_dump(content, sort_keys=False))


def _write(path: Path, text: str) -> None:
    """Writes `text` if it differs, atomically: another process may be reading."""
    if path.exists() and path.read_text() == text:
        return
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)


def load(name: str = "sim", project: Path | None = None) -> Cluster:
    """The cluster that `up` made in this project. Raises UsageError if there is none."""
    project = (project or Path.cwd()).resolve()
    layout = _stored(name, project)
    if layout is None:
        raise UsageError(f"there is no simulated cluster {name!r} in {project}", hint="orch sim up")
    return Cluster(layout, project)


def status(name: str = "sim", project: Path | None = None) -> list[health.NodeStatus]:
    """One row per node, and one for the registry. Raises UsageError if there is no such cluster."""
    return health.status(load(name, project))


def down(name: str = "sim", volumes: bool = True, project: Path | None = None, say: Say = say) -> bool:
    """Removes containers, network, inventory and, with `volumes`, disks and state. False if nothing was there.

    Without `volumes`, the nodes' disks and the keys stay for the next `up`.
    """
    project = (project or Path.cwd()).resolve()
    _check_arguments(1, name, 1)
    had = (project / ".orch" / name).exists()
    with _locked(name, last=True):
        if engine.answers():
            objects.check_owner(name, project)
            had = objects.remove_objects(name, volumes) or had
        elif had:
            say("no Docker engine answers: only files are removed; run this again once it does")
        _remove_files(name, project, volumes)
    say(f"cluster {name} is gone" if had else f"there was no cluster {name}")
    return had


def _remove_files(name: str, project: Path, state: bool) -> None:
    (project / "inventory" / f"{name}.yaml").unlink(missing_ok=True)
    if state:
        shutil.rmtree(project / ".orch" / name, ignore_errors=True)
    for folder in ("inventory", ".orch"):
        _remove_if_empty(project / folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
