"""Brings a simulated cluster up, down, and says how it is.

Everything a cluster owns carries the label `orch.sim=<name>`; its files lie in `<project>/.orch/<name>/`
and its inventory in `<project>/inventory/<name>.yaml`.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orchestrator.errors import OrchError, PreflightError, UsageError
from orchestrator.sim import assets, compose, engine, health, image, keys, machine, plugins
from orchestrator.sim.compose import LABEL, LABEL_PROJECT, Layout
from orchestrator.sim.process import Say, docker, run, say

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
    plugins.ensure_plugins(say)
    _check_owner(name, project)
    with _locked(name):
        old = _stored(name, project)
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
def _locked(name: str) -> Iterator[None]:
    """One `up` or `down` of a cluster at a time. Raises DeadlineError after ten minutes."""
    path = machine.state_dir() / f"sim-{name}.lock"
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: two at once are the user's own business there
            yield
            return
        from orchestrator.sim.process import wait_until

        def taken() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        wait_until(taken, f"the end of another `orch sim` command on cluster {name}", deadline=600)
        yield


def _objects(kind: str, name: str) -> list[str]:
    """Names of the cluster's containers, networks or volumes on the engine."""
    field = "{{.Names}}" if kind == "container" else "{{.Name}}"
    listing = ["-a"] if kind == "container" else []
    return docker(kind, "ls", *listing, "--filter", f"label={LABEL}={name}", "--format", field).stdout.split()


def _check_owner(name: str, project: Path) -> None:
    """Two checkouts may not pull one cluster's containers from under each other. Raises UsageError."""
    form = f'{{{{.Label "{LABEL_PROJECT}"}}}}'
    asked = docker("ps", "-a", "--filter", f"label={LABEL}={name}", "--format", form).stdout.splitlines()
    for owner in {line for line in asked if line}:
        if Path(owner) != project and Path(owner).exists():
            raise UsageError(
                f"the simulated cluster {name!r} belongs to the project in {owner}",
                hint=f"use --name for a second one, or run `orch sim down --name {name}` there first",
            )


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
        routes = run(["ip", "-4", "-o", "route"], check=False).stdout.splitlines() if _has("ip") else []
        used += [line.split()[0] for line in routes if line[:1].isdigit()]
    return compose.free_subnet(used)


def _has(program: str) -> bool:
    import shutil

    return shutil.which(program) is not None


def _all_running(cluster: Cluster) -> bool:
    listed = docker("ps", "--filter", f"label={LABEL}={cluster.name}", "--format", "{{.Names}}").stdout.split()
    return set(listed) == {cluster.layout.container(service) for service in (*cluster.nodes, compose.REGISTRY)}


def _start(cluster: Cluster, old: Layout | None, say: Say) -> None:
    layout = cluster.layout
    if old and not compose.same_but_size(old, layout):
        # A changed network or image means new containers; volumes, and so the nodes' files, stay.
        _remove_containers(cluster.name)
    _check_port(cluster)
    say(f"starting {layout.nodes} node{'s' * (layout.nodes > 1)} and a registry ({layout.prefix})")
    file = cluster.state / "compose.yaml"
    file.write_text(json.dumps(compose.document(layout), indent=2) + "\n")  # JSON is YAML
    argv = ["compose", "-p", layout.prefix, "-f", str(file), "up", "-d", "--remove-orphans", "--no-build"]
    try:
        docker(*argv, "--pull", "never", timeout=180, what=f"start cluster {cluster.name}")
    except OrchError as error:
        error.hint = error.hint or f"`orch sim down --name {cluster.name}` clears what was half started"
        raise
    _remove_surplus_volumes(layout)
    (cluster.state / "cluster.json").write_text(json.dumps(asdict(layout), indent=2) + "\n")


def _remove_surplus_volumes(layout: Layout) -> None:
    """The volumes of nodes that the cluster has no more: a node that comes back later starts afresh."""
    kept = {volume["name"] for volume in compose.document(layout)["volumes"].values()}
    surplus = [name for name in _objects("volume", layout.name) if name not in kept]
    if surplus:
        docker("volume", "rm", *surplus, check=False, timeout=60)


def _check_port(cluster: Cluster) -> None:
    """Raises PreflightError if somebody else listens where the registry is to be published."""
    port, registry = cluster.layout.registry_port, cluster.layout.container(compose.REGISTRY)
    form = "{{.Names}} {{.Ports}}"
    for line in docker("ps", "--filter", f"publish={port}/tcp", "--format", form).stdout.splitlines():
        if line.split()[0] == registry:
            return
        raise PreflightError(
            f"port {port} for the registry is taken by the container {line.split()[0]}",
            hint="choose another with --registry-port (0 takes any free one)",
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PreflightError(
                f"port {port} for the registry is taken on this machine ({error.strerror})",
                hint="choose another with --registry-port (0 takes any free one)",
            ) from error


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
    cluster_state = project / ".orch" / name
    had = cluster_state.exists()
    if engine.answers():
        _check_owner(name, project)
        with _locked(name):
            had = _remove_objects(name, volumes) or had
    (project / "inventory" / f"{name}.yaml").unlink(missing_ok=True)
    if volumes and cluster_state.exists():
        import shutil

        shutil.rmtree(cluster_state)
        _remove_if_empty(cluster_state.parent)
    say(f"cluster {name} is gone" if had else f"there was no cluster {name}")
    return had


def _remove_objects(name: str, volumes: bool) -> bool:
    found = _remove_containers(name)
    for kind in ("network", *(("volume",) if volumes else ())):
        names = _objects(kind, name)
        if names:
            docker(kind, "rm", *names, timeout=60, what=f"remove the {kind}s of cluster {name}")
            found = True
    return found


def _remove_containers(name: str) -> bool:
    names = _objects("container", name)
    if names:
        docker("rm", "-f", *names, timeout=120, what=f"remove the containers of cluster {name}")
        _remove_cgroups(name)
    return bool(names)


def _remove_cgroups(name: str) -> None:
    """The empty cgroups that killed engines left below the host's (Linux without private cgroups)."""
    roots = [*Path("/sys/fs/cgroup").glob(f"orch-{name}-n*"), *Path("/sys/fs/cgroup").glob(f"*/orch-{name}-n*")]
    for root in roots:
        for folder in [*sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True), root]:
            try:
                folder.rmdir()
            except OSError:
                break


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass


