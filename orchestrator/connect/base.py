"""What every transport offers: run a command, stream one, forward a port."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from orchestrator.specs import Node


@dataclass(frozen=True)
class Completed:
    """A finished remote command; `returncode` is 128 + N for a signal."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.returncode == 0


class Stream(Protocol):
    """A running remote command whose stdout arrives in chunks."""

    def read(self, timeout: float | None = None) -> bytes | None:
        """The next chunk; `b""` at the end of output; None if `timeout` seconds bring nothing.

        Raises ConnectionLost when the connection broke before the command ended.
        """
        ...

    @property
    def returncode(self) -> int | None:
        """The exit code once `read` has given `b""`, else None."""
        ...

    @property
    def stderr(self) -> str: ...

    def close(self) -> None:
        """Ends the command (closing its channel) and frees it; may be called from another thread."""
        ...


class Host(Protocol):
    """One machine. Thread-safe: several commands may run at once over one connection.

    `command` is text for POSIX `sh`, built by `orchestrator.commands`; the transport runs it with
    `sh -c` whatever the user's login shell is.
    """

    node: Node

    def run(self, command: str, *, stdin: bytes | None = None, timeout: float = 60.0) -> Completed:
        """Raises DeadlineError after `timeout` seconds, ConnectError or ConnectionLost. A non-zero exit is a result."""
        ...

    def stream(self, command: str) -> Stream: ...

    def forward(self, port: int, target: tuple[str, int]) -> AbstractContextManager[int]:
        """Lets the machine reach `target` (as seen from here) on its own 127.0.0.1.

        Tries `port` on the machine first, then any free one; gives the port it got.
        """
        ...

    def close(self) -> None: ...


class Connector(Protocol):
    """Opens hosts. `connect` gives one open connection per node and reuses it."""

    def connect(self, node: Node, *, timeout: float = 15.0) -> Host: ...

    def close(self) -> None: ...
