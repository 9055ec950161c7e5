"""Fake nodes for everything above the transports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.backends.base import Plan
from orchestrator.backends.ssh import SshBackend
from orchestrator.connect.fake import FakeConnector, FakeHost
from orchestrator.specs import ImageRef, JobSpec, Node, Secret, Storage

IMAGE = ImageRef("registry.example.com/demo", "v1")


@dataclass
class Cluster:
    """Nodes n1…, a backend on them, and what it told its caller."""

    hosts: dict[str, FakeHost]
    told: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connector = FakeConnector(self.hosts)
        self.backend = SshBackend(self.connector)

    def __getitem__(self, name: str) -> FakeHost:
        return self.hosts[name]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(host.node for host in self.hosts.values())

    def tell(self, node: str, text: str) -> None:
        self.told.append((node, text))

    def plan(self, run: str = "demo-20260131-120000-ab12", **changes) -> Plan:
        values = {
            "run_id": run,
            "name": "demo",
            "nodes": self.nodes,
            "procs": 1,
            "command": ("sh", "-c", "echo hello"),
            "launcher": "none",
            "image": IMAGE,
            "secrets": {"TOKEN": Secret("s3cr3t-value")},
            "storage": Storage(),
            "operator": "me@here",
        }
        return self.backend.plan(JobSpec(**{**values, **changes}))

    def containers(self) -> dict[str, list[tuple[str, str]]]:
        """Node → (run, state) of its containers."""
        return {
            name: [(box["Config"]["Labels"].get("orch.run", ""), box["State"]["Status"]) for box in host.containers]
            for name, host in self.hosts.items()
        }

    def files(self) -> list[str]:
        """What lies in the run and checkpoint folders of all nodes."""
        found = []
        for name, host in self.hosts.items():
            for part in ("runs", "checkpoints"):
                root = host.home / ".orch" / part
                found += [f"{name}:{part}/{each.name}" for each in root.iterdir()] if root.exists() else []
        return sorted(found)


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    live: list[Cluster] = []

    def make(count: int = 3, *, execute: bool = False, images: tuple[str, ...] = (IMAGE.tagged,)) -> Cluster:
        hosts = {
            f"n{index}": FakeHost(
                Node(f"n{index}", "127.0.0.1", gpus=0), tmp_path / f"n{index}", images=images, execute=execute
            )
            for index in range(1, count + 1)
        }
        cluster = Cluster(hosts)
        if execute:  # the others have no processes to end
            live.append(cluster)
        return cluster

    yield make
    for cluster in live:
        cluster.connector.close()


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster(3)
