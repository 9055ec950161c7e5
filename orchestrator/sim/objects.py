"""What the engine holds of a cluster (containers, network, volumes): found by label, removed by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from orchestrator.errors import PreflightError, UsageError
from orchestrator.sim import compose
from orchestrator.sim.compose import LABEL, LABEL_PROJECT, Layout
from orchestrator.sim.process import docker


def names_of(kind: str, name: str) -> list[str]:
    """Names of the cluster's containers, networks or volumes on the engine."""
    field = "{{.Names}}" if kind == "container" else "{{.Name}}"
    listing = ["-a"] if kind == "container" else []
    return docker(kind, "ls", *listing, "--filter", f"label={LABEL}={name}", "--format", field).stdout.split()


def check_owner(name: str, project: Path) -> None:
    """Two checkouts may not pull one cluster's containers from under each other. Raises UsageError."""
    form = f'{{{{.Label "{LABEL_PROJECT}"}}}}'
    asked = docker("ps", "-a", "--filter", f"label={LABEL}={name}", "--format", form).stdout.splitlines()
    for owner in {line for line in asked if line}:
        if Path(owner) != project and Path(owner).exists():
            raise UsageError(
                f"the simulated cluster {name!r} belongs to the project in {owner}",
                hint=f"use --name for a second one, or run `orch sim down --name {name}` there first",
            )


def remove_objects(name: str, volumes: bool) -> bool:
    found = remove_containers(name)
    for kind in ("network", *(("volume",) if volumes else ())):
        names = names_of(kind, name)
        if names:
            docker(kind, "rm", *names, timeout=300, what=f"remove the {kind}s of cluster {name}")
            found = True
    return found


def remove_containers(name: str) -> bool:
    names = names_of("container", name)
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


def remove_surplus_volumes(layout: Layout) -> None:
    """The volumes of nodes that the cluster has no more: a node that comes back later starts afresh."""
    kept = {volume["name"] for volume in compose.document(layout)["volumes"].values()}
    surplus = [name for name in names_of("volume", layout.name) if name not in kept]
    if surplus:
        docker("volume", "rm", *surplus, check=False, timeout=300)


def check_port(port: int, own: str, option: str) -> None:
    """Raises PreflightError if anybody but the container `own` listens where a registry is to be published."""
    hint = f"choose another with {option}"
    listing = docker("ps", "--filter", f"publish={port}/tcp", "--format", "{{.Names}}").stdout.split()
    if own in listing:
        return
    if listing:
        raise PreflightError(f"port {port} for the registry is taken by the container {listing[0]}", hint=hint)
    with socket.socket() as probe:
        if os.name == "posix":  # there it only forgives connections that are closing, not other listeners
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PreflightError(f"port {port} for the registry is taken here ({error.strerror})", hint=hint) from error
