"""Machines over SSH: one connection per node, many commands at once on it.

Importing this costs nothing: the SSH library is loaded at the first connection.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.commands import shell
from orchestrator.connect import known_hosts, tcp
from orchestrator.connect.base import Completed, Host, Stream
from orchestrator.connect.endpoint import Endpoint, jump_node, resolve
from orchestrator.connect.fanout import fanout
from orchestrator.connect.forward import Relay
from orchestrator.connect.known_hosts import HostKey
from orchestrator.connect.session import Session, SshStream, communicate
from orchestrator.errors import ConfigError, ConnectError, ConnectionLost, DeadlineError, HostKeyError, OrchError
from orchestrator.specs import Node

if TYPE_CHECKING:
    from orchestrator.connect.ssh_transport import KeyRing, Transport

WINDOW = 4 << 20
"""Bytes that a command may send ahead of us. Larger keeps a fast stream from pausing."""

FORWARD_TIMEOUT = 15.0


class SshHost:
    """Host of connect/base.py over SSH. A broken connection is opened again at the next use."""

    def __init__(self, node: Node, connector: SshConnector, timeout: float) -> None:
        self.node = node
        self.timeout = timeout
        self._connector = connector
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        self._failed: tuple[float, OrchError] | None = None
        """When and why the last attempt to connect failed."""

    def run(self, command: str, *, stdin: bytes | None = None, timeout: float = 60.0) -> Completed:
        deadline = time.monotonic() + timeout
        session = self._start(shell.login(command), deadline, timeout)
        return communicate(session, stdin, timeout, deadline)

    def stream(self, command: str) -> Stream:
        """The command ends with its connection: nothing of it stays behind on the machine."""
        text = shell.login(shell.tethered(command))
        return SshStream(self._start(text, time.monotonic() + self.timeout, self.timeout))

    @contextmanager
    def forward(self, port: int, target: tuple[str, int]) -> Iterator[int]:
        relay = Relay(target)
        transport = self.transport(time.monotonic() + FORWARD_TIMEOUT)
        try:
            got = transport.listen(port, relay.accept, FORWARD_TIMEOUT) if port else None
            got = got or transport.listen(0, relay.accept, FORWARD_TIMEOUT)
        except TimeoutError:
            raise DeadlineError(
                f"sshd did not answer the request for a port within {FORWARD_TIMEOUT:g} s",
                node=self.node.name,
            ) from None
        except ConnectionError:
            raise ConnectionLost("the SSH connection broke", node=self.node.name) from None
        if got is None:
            raise ConnectError(
                "sshd refuses to forward a port to this machine",
                node=self.node.name,
                hint="allow it there: `AllowTcpForwarding yes` (or `remote`) in sshd_config; "
                "or use a registry that the nodes can reach themselves",
            )
        try:
            yield got
        finally:
            with suppress(TimeoutError, ConnectionError):  # the listener ends with its connection anyway
                transport.unlisten(got, 5.0)
            relay.close()

    def close(self) -> None:
        with self._lock:
            transport, self._transport = self._transport, None
        if transport:
            transport.close()

    def transport(self, deadline: float) -> Transport:
        """The open connection, opened (again) if it is not. Raises ConnectError, DeadlineError.

        Who waits for another's attempt shares its failure: a dead node costs its timeout once.
        """
        begun = time.monotonic()
        if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise ConnectError("the connection was not opened in time", node=self.node.name)
        try:
            if self._transport is None or not self._transport.is_active():
                if self._failed and self._failed[0] > begun:
                    raise copy(self._failed[1])
                limit = min(deadline, time.monotonic() + self.timeout)
                try:
                    self._transport = self._connector.open_transport(self.node, limit)
                except OrchError as error:
                    self._failed = time.monotonic(), copy(error)
                    raise
            return self._transport
        finally:
            self._lock.release()

    def _start(self, command: str, deadline: float, timeout: float) -> Session:
        from orchestrator.connect.ssh_transport import Refused

        retried = False
        while True:
            transport = self.transport(deadline)
            try:
                left = max(deadline - time.monotonic(), 0.1)
                channel = transport.start_command(command, window=WINDOW, timeout=left)
                return Session(channel, transport, self.node.name)
            except TimeoutError:
                raise DeadlineError(f"sshd did not open a session within {timeout:g} s", node=self.node.name) from None
            except ConnectionError:
                # Nothing was run yet, so trying once on a new connection is safe.
                if retried:
                    raise ConnectionLost("the SSH connection broke", node=self.node.name) from None
                retried = True
            except Refused as error:
                # MaxSessions (10 by default): another command of ours will end soon.
                if time.monotonic() + 0.2 > deadline:
                    raise ConnectError(
                        f"sshd opens no further session ({error})",
                        node=self.node.name,
                        hint="is MaxSessions in its sshd_config very low?",
                    ) from None
                time.sleep(0.1)


class SshConnector:
    """Connector of connect/base.py. `nodes` is the inventory, where `jump:` names are looked up."""

    def __init__(
        self, nodes: Mapping[str, Node] | None = None, *, config: Path | None = None, home: Path | None = None
    ) -> None:
        self.nodes = dict(nodes or {})
        self._home = home or Path.home()
        self._config = config or self._home / ".ssh" / "config"
        self._lock = threading.Lock()
        self._hosts: dict[tuple, SshHost] = {}
        self._lookup: Any = None
        self._ring: KeyRing | None = None

    def connect(self, node: Node, *, timeout: float = 15.0) -> Host:
        """The open host of `node`. Raises ConnectError (AuthError, HostKeyError) within `timeout` s."""
        host = self._host(node, timeout)
        host.transport(time.monotonic() + timeout)
        return host

    def open(self, nodes: Sequence[Node]) -> None:
        """Begins to connect to all `nodes` in the background, so that other work need not wait for it.

        Whatever fails shows at the first use of that node, which tries again.
        """
        job = partial(fanout, list(nodes), self.connect, deadline=30.0, what="connect")
        threading.Thread(target=job, name="connect early", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            hosts, self._hosts = list(self._hosts.values()), {}
        for host in hosts:
            host.close()

    def scan(self, node: Node, *, timeout: float = 15.0) -> list[HostKey]:
        """The host keys of `node` as it shows them now, unauthenticated: to be shown, then pinned."""
        from orchestrator.connect import ssh_transport

        deadline = time.monotonic() + timeout
        endpoint = self.endpoint(node)
        keys = ssh_transport.scan(endpoint, lambda: self._socket(endpoint, node, deadline), deadline)
        if not keys:
            raise ConnectError("the server shows no host key of a known type", node=node.name)
        return keys

    def trust(
        self, node: Node, keys: list[HostKey] | None = None, *, replace: bool = False, timeout: float = 15.0
    ) -> list[HostKey]:
        """Pins `keys` (default: what a scan finds) in the node's known_hosts; those that were new.

        A key that differs from a pinned one raises HostKeyError unless `replace`.
        """
        endpoint = self.endpoint(node)
        keys = self.scan(node, timeout=timeout) if keys is None else keys
        first, *rest = endpoint.known_hosts
        return known_hosts.pin(endpoint.alias, keys, first, node=node.name, replace=replace, also=rest)

    def endpoint(self, node: Node) -> Endpoint:
        from orchestrator.connect import ssh_transport

        with self._lock:
            if self._lookup is None:
                self._lookup = ssh_transport.ssh_config(self._config)
                self._ring = ssh_transport.KeyRing()
        return resolve(node, self._lookup, self._home)

    def open_transport(self, node: Node, deadline: float) -> Transport:
        """A new authenticated connection to `node`, through its jump hosts. Raises ConnectError."""
        from orchestrator.connect import ssh_transport

        endpoint = self.endpoint(node)
        sock = self._socket(endpoint, node, deadline)
        return ssh_transport.connect(endpoint, sock, deadline, self._ring)

    def _socket(self, endpoint: Endpoint, node: Node, deadline: float) -> Any:
        """What SSH runs over: a TCP connection, a program (ProxyCommand), or a jump host's tunnel."""
        if endpoint.proxy_command:
            return tcp.proxy(endpoint.proxy_command)
        via = self._via(endpoint, node)
        if via is None:
            return tcp.dial(endpoint.host, endpoint.port, max(deadline - time.monotonic(), 0.1), node.name)
        self._refuse_circle(node, via)
        return self._tunnel(via, endpoint, node, deadline)

    def _via(self, endpoint: Endpoint, node: Node) -> Node | None:
        """The machine through which `node` is reached."""
        if not endpoint.jump:
            return None
        *before, last = endpoint.jump
        via = jump_node(last, self.nodes, node)
        return replace(via, jump=",".join(before)) if before else via  # `a,b`: b is reached through a

    def _refuse_circle(self, node: Node, via: Node) -> None:
        route, step = [node.name], via
        while step is not None:
            route.append(step.name)
            if step.name in route[:-1]:
                raise ConfigError(f"its jump hosts go in a circle: {' → '.join(route)}", node=node.name)
            step = self._via(self.endpoint(step), step)

    def _tunnel(self, via: Node, endpoint: Endpoint, node: Node, deadline: float) -> Any:
        from orchestrator.connect.ssh_transport import Refused

        left = max(deadline - time.monotonic(), 0.1)
        where = f"{endpoint.host}:{endpoint.port}"
        try:
            transport = self._host(via, left).transport(deadline)
            return transport.open_tunnel(endpoint.host, endpoint.port, left)
        except ConnectError as error:
            if isinstance(error, HostKeyError) and via.name not in self.nodes:
                error.hint = f"pin it first, as it is not in the inventory: ssh {self.endpoint(via).where}"
            error.message = f"its jump host {via.name} cannot be used: {error.message}"
            error.node = node.name
            raise
        except Refused as error:
            raise ConnectError(
                f"the jump host {via.name} cannot reach {where}: {str(error).lower()}",
                node=node.name,
                hint="is the machine on, and does the jump host allow forwarding (AllowTcpForwarding)?",
            ) from None
        except (ConnectionError, TimeoutError):
            raise ConnectError(f"the jump host {via.name} did not reach {where} in time", node=node.name) from None

    def _host(self, node: Node, timeout: float) -> SshHost:
        key = (node.name, node.address, node.port, node.user, node.key, node.jump, node.known_hosts)
        with self._lock:
            if key not in self._hosts:
                self._hosts[key] = SshHost(node, self, timeout)
            return self._hosts[key]
