"""The compose document of a simulated cluster. Pure: values in, a document out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LABEL = "orch.sim"
"""Label of every container, network and volume of a cluster; its value is the cluster's name."""
LABEL_PROJECT = "orch.sim.project"
LABEL_NODE = "orch.sim.node"

REGISTRY = "registry"
DEBIAN_HOSTS_NODE = "n2"
"""The node whose hostname resolves to 127.0.1.1, as Debian's installer leaves it."""

_POOL = ipaddress.ip_network("10.213.0.0/16")
"""Where a free /24 is looked for; the engines inside the nodes use 172.16.0.0/12."""
_FIRST_NODE = 11
MAX_NODES = 200


@dataclass(frozen=True)
class Layout:
    """All that decides what a cluster looks like; the compose document is a function of it."""

    name: str
    project: str
    nodes: int
    image: str
    subnet: str
    registry_port: int
    authorized_key: str
    parts: str
    """Path of compose/cluster.yaml, whose services are extended."""
    privileged: bool = False
    shared: bool = False
    ssh_ports: Mapping[str, int] = field(default_factory=dict)
    """Published SSH port per node, where container addresses cannot be reached; else empty."""

    @property
    def prefix(self) -> str:
        return f"orch-{self.name}"

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"n{number}" for number in range(1, self.nodes + 1))

    def container(self, service: str) -> str:
        return f"{self.prefix}-{service}"

    def address(self, node: str) -> str:
        """The fixed address of `node` on the cluster's network: n1 is .11, n2 is .12, …"""
        network = ipaddress.ip_network(self.subnet)
        return str(network.network_address + _FIRST_NODE - 1 + int(node[1:]))


def free_subnet(used: Iterable[str]) -> str:
    """The first /24 of the pool that overlaps none of `used` (networks in CIDR form).

    Raises ValueError when the pool is full.
    """
    taken = [ipaddress.ip_network(text, strict=False) for text in used]
    for candidate in _POOL.subnets(new_prefix=24):
        if not any(other.version == 4 and candidate.overlaps(other) for other in taken):
            return str(candidate)
    raise ValueError(f"no free /24 in {_POOL}")


def document(layout: Layout) -> dict[str, Any]:
    """The compose document: one service per node, a registry, their network and volumes."""
    services = {node: _node(layout, node) for node in layout.node_names}
    services[REGISTRY] = _registry(layout)
    names = [f"{node}-{part}" for node in layout.node_names for part in ("docker", "home")]
    names += [REGISTRY, *(["shared"] if layout.shared else [])]
    labels = _labels(layout)
    subnet = {"subnet": layout.subnet}
    return _escape(
        {
            "name": layout.prefix,
            "services": services,
            "networks": {"default": {"name": f"{layout.prefix}-net", "labels": labels, "ipam": {"config": [subnet]}}},
            "volumes": {name: {"name": f"{layout.prefix}-{name}", "labels": labels} for name in names},
        }
    )


def _labels(layout: Layout) -> dict[str, str]:
    return {LABEL: layout.name, LABEL_PROJECT: layout.project}


def _node(layout: Layout, node: str) -> dict[str, Any]:
    environment = {"ORCH_AUTHORIZED_KEY": layout.authorized_key}
    if not layout.privileged:
        environment["ORCH_CGROUP_PARENT"] = cgroup_parent(layout.name, node)
    if node == DEBIAN_HOSTS_NODE:
        environment["ORCH_DEBIAN_HOSTS"] = "1"
    volumes = [f"{node}-docker:/var/lib/docker", f"{node}-home:/home"]
    if layout.shared:
        volumes.append("shared:/shared")
    service: dict[str, Any] = {
        "extends": {
            "file": layout.parts,
            "service": "node-privileged" if layout.privileged else "node-capabilities",
        },
        "scale": 1,
        "image": layout.image,
        "container_name": layout.container(node),
        "hostname": node,
        "environment": environment,
        "labels": {**_labels(layout), LABEL_NODE: node},
        "networks": {"default": {"ipv4_address": layout.address(node)}},
        "volumes": volumes,
    }
    if node in layout.ssh_ports:
        service["ports"] = [f"127.0.0.1:{layout.ssh_ports[node]}:22"]
    return service


def _registry(layout: Layout) -> dict[str, Any]:
    return {
        "extends": {"file": layout.parts, "service": "registry-part"},
        "scale": 1,
        "image": layout.image,
        "container_name": layout.container(REGISTRY),
        "labels": {**_labels(layout), LABEL_NODE: REGISTRY},
        "ports": [f"127.0.0.1:{layout.registry_port}:5000"],
        "volumes": [f"{REGISTRY}:/var/lib/registry"],
    }


def cgroup_parent(name: str, node: str) -> str:
    """The cgroup below which the engine of `node` puts its containers, so that leftovers have a name."""
    return f"/orch-{name}-{node}"


def _escape(value: Any) -> Any:
    """`$` doubled in every string: compose would read it as a variable."""
    if isinstance(value, str):
        return value.replace("$", "$$")
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value


def inventory(layout: Layout, key: str, known_hosts: str) -> dict[str, Any]:
    """The inventory of the cluster, in the format of docs/contracts.md."""
    nodes: dict[str, dict[str, Any]] = {}
    for node in layout.node_names:
        private = layout.address(node)
        if node in layout.ssh_ports:
            nodes[node] = {"address": "127.0.0.1", "port": layout.ssh_ports[node], "private": private}
        else:
            nodes[node] = {"address": private}
    return {"defaults": {"user": "orch", "key": key, "known_hosts": known_hosts, "gpus": 0}, "nodes": nodes}


def known_hosts(layout: Layout, host_keys: Mapping[str, str]) -> str:
    """Lines of known_hosts that pin each node's host key (`ssh-ed25519 AAAA…`)."""
    lines = []
    for node in layout.node_names:
        port = layout.ssh_ports.get(node, 22)
        host = layout.address(node) if port == 22 else f"[127.0.0.1]:{port}"
        lines.append(f"{host} {' '.join(host_keys[node].split()[:2])}\n")
    return "".join(lines)


def same_nodes(old: Layout, new: Layout) -> bool:
    """Whether the nodes that both have can stay as they are (a cluster that grows, shrinks, moves its registry)."""
    fields = ("image", "subnet", "authorized_key", "privileged", "shared", "project")
    ports = all(new.ssh_ports.get(node) == port for node, port in old.ssh_ports.items() if node in new.node_names)
    return ports and all(getattr(old, name) == getattr(new, name) for name in fields)
