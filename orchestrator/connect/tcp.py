"""TCP connections that fail in time and say why, and that notice a dead peer."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import threading
import time

from orchestrator.errors import ConnectError

IDLE, INTERVAL, COUNT = 5, 2, 3
"""Keepalive: after 5 s of silence ask every 2 s, three times: dead after about 10 s."""

UNANSWERED_MS = 10_000
"""How long sent data may stay unacknowledged before the connection counts as dead."""


def dial(host: str, port: int, timeout: float, node: str) -> socket.socket:
    """A connection to the first address of `host` that answers.

    Raises ConnectError within `timeout` seconds: name unknown, refused, no route, no answer.
    """
    deadline = time.monotonic() + timeout
    reasons: list[str] = []
    addresses = _addresses(host, port, timeout, node)
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        # An address that swallows packets must leave time for the next one.
        sock.settimeout(left if index == len(addresses) - 1 else max(left / 2, 0.1))
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            reasons.append(_reason(error, timeout))
            continue
        keep_alive(sock)
        return sock
    why = "; ".join(dict.fromkeys(reasons)) or f"no answer within {timeout:.3g} s"
    raise ConnectError(f"cannot reach {host}:{port}: {why}", node=node, hint=_hint(why))


def keep_alive(sock: socket.socket) -> None:
    """No delay for small packets; a peer that is gone is noticed in about 10 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS calls the idle time TCP_KEEPALIVE and has no TCP_USER_TIMEOUT.
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
    values = {idle: IDLE, "TCP_KEEPINTVL": INTERVAL, "TCP_KEEPCNT": COUNT, "TCP_USER_TIMEOUT": UNANSWERED_MS}
    for name, value in values.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def proxy(command: str) -> socket.socket:
    """A socket whose other end is a program's standard input and output (ssh's ProxyCommand).

    The program ends when the socket is closed; a thread waits for it, so that no zombie stays.
    """
    ours, theirs = socket.socketpair()
    shell = os.environ.get("SHELL", "/bin/sh")
    process = subprocess.Popen([shell, "-c", "exec " + command], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
    theirs.close()
    threading.Thread(target=process.wait, name=f"proxy {shlex.split(command)[:1]}", daemon=True).start()
    return ours


def _addresses(host: str, port: int, timeout: float, node: str) -> list[tuple]:
    """`getaddrinfo` with a deadline, which it does not have itself."""
    answer: list = []

    def ask() -> None:
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, name=f"resolve {host}", daemon=True)
    thread.start()
    thread.join(timeout)
    if not answer:
        raise ConnectError(f"the name {host} was not resolved within {timeout:.3g} s", node=node)
    if isinstance(answer[0], Exception):
        raise ConnectError(
            f"the name {host} cannot be resolved",
            node=node,
            hint="check the address in the inventory, and the DNS of this machine",
        ) from answer[0]
    return answer[0]


def _reason(error: OSError, timeout: float) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:.3g} s"
    return (error.strerror or str(error)).lower()


def _hint(why: str) -> str:
    if "refused" in why:
        return "is sshd running there, and is the port right?"
    return "is the machine on, and does a firewall let this port through?"
