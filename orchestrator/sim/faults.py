"""Real faults for tests and for practice: each is done to one node of a simulated cluster, and can be undone.

All of them work through the outer engine, so they also work on a node whose SSH or network is gone.
`orchestrator.sim.cluster.up` undoes every one of them except a full disk and a changed host key (which it pins anew).
Every function raises UsageError for an unknown node and PreflightError when the engine refuses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import PreflightError
from orchestrator.sim import health
from orchestrator.sim.cluster import Cluster
from orchestrator.sim.process import docker, wait_until

_CHAIN = health.FAULT_CHAIN
_SAFE_DISK = 4 * 10**9


def stop(cluster: Cluster, node: str) -> None:
    """Shuts the node down in order (what `poweroff` does)."""
    docker("stop", "-t", "5", cluster.container(node), what=f"stop {node}")


def kill(cluster: Cluster, node: str) -> None:
    """Cuts the node's power: everything on it ends at once, nothing says goodbye."""
    docker("kill", cluster.container(node), what=f"kill {node}")


def start(cluster: Cluster, node: str, *, wait: bool = True) -> None:
    """Switches a stopped or killed node on; with `wait`, until its sshd and engine answer (DeadlineError)."""
    docker("start", cluster.container(node), what=f"start {node}")
    if wait:
        wait_ready(cluster, node)


def pause(cluster: Cluster, node: str) -> None:
    """Freezes every process of the node: it is reachable at the network's level and answers nothing."""
    docker("pause", cluster.container(node), what=f"pause {node}")


def unpause(cluster: Cluster, node: str) -> None:
    docker("unpause", cluster.container(node), what=f"unpause {node}")


def disconnect(cluster: Cluster, node: str) -> None:
    """Pulls the network cable: the interface disappears from the node."""
    network = f"{cluster.layout.prefix}-net"
    docker("network", "disconnect", network, cluster.container(node), what=f"disconnect {node}")


def reconnect(cluster: Cluster, node: str) -> None:
    """Plugs it in again, with the same address; the interface may have another name now."""
    health.connect(cluster, node)


def kill_engine(cluster: Cluster, node: str, *, containers: bool = True) -> None:
    """Kills the node's dockerd with SIGKILL, and with `containers` its containerd and all containers as well.

    Without `containers`, those that run go on running without an engine, as on a real node.
    """
    health.inside(cluster, node, "pkill", "-KILL", "-x", "dockerd", check=False)
    if containers:
        # A container's processes live below its shim; its cgroup would be the better handle but is not always private.
        script = """
          shims=$(pgrep -f '^/usr/bin/containerd-shim') || true
          for shim in $shims; do pkill -KILL -P "$shim" || true; done
          pkill -KILL -x containerd; pkill -KILL -f '^/usr/bin/containerd-shim'; true
        """
        health.inside(cluster, node, "sh", "-c", script)
    wait_until(lambda: not health.engine_answers(cluster, node), f"the end of the engine on {node}", deadline=10)


def start_engine(cluster: Cluster, node: str, *, wait: bool = True) -> None:
    """Starts the node's dockerd if it is not running; with `wait`, until it answers (DeadlineError)."""
    health.inside(cluster, node, health.ENTRYPOINT, "engine")
    if wait:
        wait_until(
            lambda: health.engine_answers(cluster, node),
            f"the engine on {node}",
            deadline=health.READY_SECONDS,
            hint=f"docker exec {cluster.container(node)} tail /var/log/dockerd.log",
        )


def drop(cluster: Cluster, node: str, peer: str) -> None:
    """Lets no packet pass between `node` and `peer` (a node's name or an address), in silence: a broken switch."""
    address = _address(cluster, peer)
    script = f"""
      set -e
      if ! iptables -w -n -L {_CHAIN} >/dev/null 2>&1; then
        iptables -w -N {_CHAIN}
        iptables -w -I INPUT -j {_CHAIN}
        iptables -w -I OUTPUT -j {_CHAIN}
      fi
      iptables -w -A {_CHAIN} -s {address} -j DROP
      iptables -w -A {_CHAIN} -d {address} -j DROP
    """
    health.inside(cluster, node, "sh", "-c", script)


def undrop(cluster: Cluster, node: str) -> None:
    """Removes everything that `drop` has put on `node`."""
    health.inside(cluster, node, "sh", "-c", f"iptables -w -F {_CHAIN} 2>/dev/null || true")


def operator_address(cluster: Cluster) -> str:
    """The address from which this machine reaches the nodes, for `drop`: the network's gateway."""
    return str(ipaddress.ip_network(cluster.layout.subnet).network_address + 1)


def cut_ssh(cluster: Cluster, node: str) -> int:
    """Kills every open SSH connection of the node, not its sshd: new ones are accepted. Gives their number."""
    # A connection is a root process `sshd-session: USER [priv]` and its child that speaks with the network.
    script = "pgrep -c -f '^sshd-session: .*[[]priv[]]'; pkill -KILL -x sshd-session; true"
    return int(health.inside(cluster, node, "sh", "-c", script).split()[0])


def stop_sshd(cluster: Cluster, node: str) -> None:
    """Stops sshd, open connections included: the port refuses."""
    health.inside(cluster, node, "sh", "-c", "pkill -KILL '^sshd'; true")


def start_sshd(cluster: Cluster, node: str) -> None:
    health.inside(cluster, node, health.ENTRYPOINT, "sshd")


def change_host_key(cluster: Cluster, node: str) -> None:
    """Gives the node a new host key, as a reinstalled machine or an impostor would have."""
    health.inside(cluster, node, health.ENTRYPOINT, "host-key")
    wait_until(lambda: health.ssh_answers(cluster, node), f"sshd on {node}", deadline=10)


def small_disk(cluster: Cluster, node: str, path: str, megabytes: int = 64) -> None:
    """Puts a file system of its own, of that size and empty, over the folder `path` of `node`.

    The nodes' disks are folders on this machine's disk: only such a small one may be filled.
    Containers that were started before do not see it.
    """
    options = f"size={int(megabytes)}m,mode=0755,uid=1000,gid=1000"
    script = f'runuser -u orch -- mkdir -p "$1" && mount -t tmpfs -o {options} orch-small "$1"'
    health.inside(cluster, node, "sh", "-c", script, "sh", path)


def remove_small_disk(cluster: Cluster, node: str, path: str) -> None:
    health.inside(cluster, node, "umount", "-l", path)


def fill_disk(cluster: Cluster, node: str, path: str, leave: int = 0) -> None:
    """Fills the file system of the folder `path` on `node` up to `leave` free bytes.

    Raises PreflightError if it has more than 4 GB free, for then it is this machine's own: see `small_disk`.
    """
    listed = health.inside(cluster, node, "df", "--output=avail", "-B1", path)
    free = int(listed.split()[-1])
    if free > _SAFE_DISK:
        raise PreflightError(
            f"{path} has {free / 1e9:.0f} GB free, shared with this machine", node=node, hint="small_disk() first"
        )
    amount = free - leave
    if amount > 0:
        health.inside(cluster, node, "fallocate", "-l", str(amount), f"{path}/.orch-fill")


def free_disk(cluster: Cluster, node: str, path: str) -> None:
    """Removes what `fill_disk` has written."""
    health.inside(cluster, node, "rm", "-f", f"{path}/.orch-fill")


def wait_ready(cluster: Cluster, node: str, seconds: float = health.READY_SECONDS) -> None:
    """Waits until sshd and engine of `node` answer. Raises DeadlineError."""
    wait_until(lambda: health.engine_answers(cluster, node), f"the engine on {node}", deadline=seconds)
    wait_until(lambda: health.ssh_answers(cluster, node), f"sshd on {node}", deadline=seconds)


@contextmanager
def healed(cluster: Cluster) -> Iterator[Cluster]:
    """For tests: whatever is done to the cluster inside, it is well again afterwards, stopped nodes included."""
    try:
        yield cluster
    finally:
        for node, (state, _) in health.containers(cluster).items():
            if state in ("exited", "created"):
                docker("start", cluster.container(node))
        health.heal(cluster, lambda text: None)


def _address(cluster: Cluster, peer: str) -> str:
    return cluster.layout.address(peer) if peer in cluster.nodes else str(ipaddress.ip_address(peer))
