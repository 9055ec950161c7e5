"""Whether the nodes of a simulated cluster are well, and the healing of what can be healed."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from orchestrator.errors import DeadlineError, PreflightError
from orchestrator.sim import compose
from orchestrator.sim.process import Say, docker

if TYPE_CHECKING:
    from orchestrator.sim.cluster import Cluster

T = TypeVar("T")

READY_SECONDS = 60.0
FAULT_CHAIN = "ORCH-FAULT"
"""The firewall chain on a node that the fault helpers fill and `heal` empties."""

ENTRYPOINT = "/usr/local/bin/node-entrypoint"
HOST_KEY = "/home/.host-keys/ssh_host_ed25519_key"


@dataclass(frozen=True)
class NodeStatus:
    """One row of `orch sim status`; `ssh` and `engine` are `up` or `down`, `state` is the container's."""

    node: str
    address: str
    ssh: str
    engine: str
    state: str


def each(items: Iterable[str], action: Callable[[str], T]) -> list[T]:
    """`action` on all items at once; the first error is raised."""
    work = list(items)
    with ThreadPoolExecutor(max_workers=min(16, len(work) or 1)) as pool:
        return list(pool.map(action, work))


def inside(
    cluster: Cluster, node: str, *command: str, check: bool = True, timeout: float = 30.0, input: str | None = None
) -> str:
    """What `command` prints, run as root on `node` through the outer engine. Raises PreflightError."""
    options = ["-i"] if input is not None else []
    argv = ["exec", *options, cluster.container(node), *command]
    return docker(*argv, check=check, timeout=timeout, input=input, what=f"run {command[0]} on {node}").stdout


def containers(cluster: Cluster) -> dict[str, tuple[str, str]]:
    """State and address on the cluster's network (empty if disconnected) of each container that exists."""
    names = {cluster.container(service): service for service in (*cluster.nodes, compose.REGISTRY)}
    network = f"{cluster.layout.prefix}-net"
    form = f'{{{{.Name}}}} {{{{.State.Status}}}} {{{{with index .NetworkSettings.Networks "{network}"}}}}'
    form += "{{.IPAddress}}{{end}}"
    # With some containers missing docker still prints the others, and exits 1.
    lines = docker("container", "inspect", "--format", form, *names, check=False).stdout.splitlines()
    rows = (line.strip("/").split() for line in lines if line.strip())
    return {names[row[0]]: (row[1], row[2] if len(row) > 2 else "") for row in rows}


def ssh_answers(cluster: Cluster, node: str, seconds: float = 2.0) -> bool:
    """Whether an SSH server greets where the operator connects to `node`."""
    published = cluster.layout.ssh_ports.get(node)
    where = ("127.0.0.1", published) if published else (cluster.layout.address(node), 22)
    try:
        with socket.create_connection(where, timeout=seconds) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def engine_answers(cluster: Cluster, node: str) -> bool:
    """Whether the engine on `node` answers its own client."""
    try:
        asked = docker("exec", cluster.container(node), "docker", "version", "--format", "{{.Server.Version}}",
                       check=False, timeout=10)  # fmt: skip
    except DeadlineError:
        return False
    return asked.returncode == 0 and bool(asked.stdout.strip())


def registry_answers(port: int) -> bool:
    """Whether a registry speaks on 127.0.0.1:`port`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/v2/", timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def heal(cluster: Cluster, say: Say) -> dict[str, str]:
    """Undoes what faults have done, waits until every node is ready, and gives each node's public host key.

    The keys are read from the nodes' own disks through the outer engine: nothing is trusted on first use.
    Raises DeadlineError, or PreflightError for a container that has ended.
    """
    _unpause_and_connect(cluster, say)
    found = each(cluster.nodes, lambda node: _ready(cluster, node))
    port = cluster.layout.registry_port
    _wait(lambda: registry_answers(port), f"the registry on 127.0.0.1:{port}", cluster, compose.REGISTRY)
    return dict(zip(cluster.nodes, found, strict=True))


def _unpause_and_connect(cluster: Cluster, say: Say) -> None:
    found = containers(cluster)
    for node in cluster.nodes:
        state, address = found.get(node, ("missing", ""))
        if state == "paused":
            say(f"unpausing {node}")
            docker("unpause", cluster.container(node))
        if state in ("running", "paused") and not address:
            say(f"connecting {node} again")
            connect(cluster, node)


def connect(cluster: Cluster, node: str) -> None:
    """Connects `node` to the cluster's network, at its own address."""
    argv = ["network", "connect", "--ip", cluster.layout.address(node), "--alias", node]
    docker(*argv, f"{cluster.layout.prefix}-net", cluster.container(node), what=f"connect {node}")
    inside(cluster, node, ENTRYPOINT, "hosts")


_HEAL = f"""
if iptables -w -n -L {FAULT_CHAIN} >/dev/null 2>&1; then
  iptables -w -D INPUT -j {FAULT_CHAIN}; iptables -w -D OUTPUT -j {FAULT_CHAIN}
  iptables -w -F {FAULT_CHAIN}; iptables -w -X {FAULT_CHAIN}
fi
{ENTRYPOINT} engine && {ENTRYPOINT} sshd || exit
docker version --format '{{{{.Server.Version}}}}' >/dev/null && cat {HOST_KEY}.pub
"""


def _ready(cluster: Cluster, node: str) -> str:
    """Waits for the engine and sshd of `node`, starting what is down; gives its public host key."""
    key = ""

    def engine_ready() -> bool:
        nonlocal key
        asked = docker("exec", cluster.container(node), "sh", "-c", _HEAL, check=False, timeout=30)
        key = asked.stdout.strip()
        return asked.returncode == 0 and bool(key)

    _wait(engine_ready, f"the engine on {node}", cluster, node)
    _wait(lambda: ssh_answers(cluster, node), f"sshd on {node}", cluster, node)
    return key


def _wait(ready: Callable[[], bool], what: str, cluster: Cluster, service: str) -> None:
    """Waits up to READY_SECONDS, but not for a container that has ended: then its last words are the error."""
    end = time.monotonic() + READY_SECONDS
    while not ready():
        state = containers(cluster).get(service, ("missing", ""))[0]
        if state in ("exited", "dead", "missing"):
            logs = docker("logs", "--tail", "20", cluster.container(service), check=False)
            lines = (logs.stdout + logs.stderr).splitlines()
            reason = lines[-1] if lines else "it said nothing"
            raise PreflightError(f"{what}: the container is {state}: {reason}", node=service, lines=lines)
        if time.monotonic() >= end:
            name = cluster.container(service)
            raise DeadlineError(
                f"{what} does not answer after {READY_SECONDS:.0f} s",
                hint=f"docker logs {name}; docker exec {name} tail /var/log/dockerd.log",
            )
        time.sleep(0.2)


def status(cluster: Cluster) -> list[NodeStatus]:
    """One row per node and one for the registry (whose `ssh` and `engine` are `-`)."""
    found = containers(cluster)

    def row(node: str) -> NodeStatus:
        state, _ = found.get(node, ("missing", ""))
        if node == compose.REGISTRY:
            speaks = registry_answers(cluster.layout.registry_port)
            return NodeStatus(node, cluster.registry, "-", "-", state if speaks else f"{state}, silent")
        published = cluster.layout.ssh_ports.get(node)
        address = f"127.0.0.1:{published}" if published else cluster.layout.address(node)
        ssh = state == "running" and ssh_answers(cluster, node)
        engine = state == "running" and engine_answers(cluster, node)
        return NodeStatus(node, address, "up" if ssh else "down", "up" if engine else "down", state)

    return each((*cluster.nodes, compose.REGISTRY), row)
