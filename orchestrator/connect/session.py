"""What happens on one SSH channel: feed, read, time out, tell an end from a break.

Works on a channel object without knowing the library behind it. Output is read in chunks as
large as what has arrived, never joined while it grows.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from orchestrator.connect.base import Completed
from orchestrator.errors import ConnectionLost, DeadlineError, OrchError

EVERYTHING = 1 << 30
"""Always take all that is buffered: the library's buffer moves its rest to the front otherwise."""

PIECE = 32_704
"""Bytes of one SSH data packet at OpenSSH's packet size (32 KiB less the library's reserve)."""

KEEP_STDERR = 64 * 1024


class Wake(threading.Event):
    """Set by the library when anything arrives. It also clears it, per buffer: that is ignored,
    because another buffer may still hold something."""

    def clear(self) -> None:
        pass

    def reset(self) -> None:
        super().clear()


class Session:
    """A started command. One thread reads; `close` may come from any thread."""

    def __init__(self, channel: Any, transport: Any, node: str) -> None:
        self.channel = channel
        self.node = node
        self._transport = transport
        self._wake = Wake()
        channel.in_buffer.set_event(self._wake)
        channel.in_stderr_buffer.set_event(self._wake)

    def next(self, deadline: float | None) -> tuple[bytes, bytes] | None:
        """What arrived on (stdout, stderr), both empty at the end; None at the deadline (monotonic)."""
        channel = self.channel
        while True:
            self._wake.reset()
            ended = channel.eof_received or channel.closed
            out = channel.recv(EVERYTHING) if channel.recv_ready() else b""
            err = channel.recv_stderr(EVERYTHING) if channel.recv_stderr_ready() else b""
            if out or err or ended:
                return out, err
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._wake.wait(left)

    def exit_code(self, deadline: float | None) -> int | None:
        """The exit code once the output has ended; None at the deadline. Raises ConnectionLost."""
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not self.channel.status_event.wait(left):
            return None
        if self.channel.exit_status >= 0:
            return self.channel.exit_status
        raise self.broken()

    def broken(self) -> OrchError:
        """The error of a command that ended without an exit code."""
        if self._transport.is_active() and not self.channel.event_ready:
            return OrchError(
                "the server refuses to run commands",
                node=self.node,
                hint="is the account restricted (ForceCommand, no shell, an expired password)?",
            )
        return ConnectionLost("the SSH connection broke while a command was running", node=self.node)

    def feed(self, data: bytes) -> None:
        """Sends `data` and the end of input from a thread of its own, so that reading never waits for it."""

        def send() -> None:
            view = memoryview(data)
            # It fails when the command ends or the connection breaks: the reading side says which.
            with suppress(Exception):
                for start in range(0, len(view), PIECE):
                    self.channel.sendall(bytes(view[start : start + PIECE]))
                self.channel.shutdown_write()

        threading.Thread(target=send, name=f"stdin {self.node}", daemon=True).start()

    def terminate(self) -> None:
        """Asks the server to end the command's processes, where it can (OpenSSH since 7.9), and closes."""
        with suppress(Exception):
            self._transport.send_signal(self.channel, "TERM")
        self.close()

    def close(self) -> None:
        with suppress(Exception):  # the transport may be gone, and the channel with it
            self.channel.close()


def communicate(session: Session, stdin: bytes | None, timeout: float, deadline: float) -> Completed:
    """Runs a started command to its end. Raises DeadlineError, ConnectionLost; always closes the channel."""
    out: list[bytes] = []
    err: list[bytes] = []
    code = None
    try:
        if stdin:
            session.feed(stdin)
        else:
            session.channel.shutdown_write()
        while (chunk := session.next(deadline)) is not None and chunk != (b"", b""):
            out.append(chunk[0])
            err.append(chunk[1])
        if chunk is not None:
            code = session.exit_code(deadline)
    finally:
        # Late, or interrupted: what it started must not go on unseen.
        session.close() if code is not None else session.terminate()
    if code is None:
        tail = b"".join(err or out).decode(errors="replace").splitlines()[-5:]
        raise DeadlineError(f"the command did not end within {timeout:g} s", node=session.node, lines=tail)
    return Completed(code, _text(out), _text(err))


class SshStream:
    """Stream of connect/base.py over one channel."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._stderr = bytearray()
        self._closed = False
        self._ended = False
        self._returncode: int | None = None

    def read(self, timeout: float | None = None) -> bytes | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (self._ended or self._closed):
            chunk = self._session.next(deadline)
            if chunk is None:
                return None
            out, err = chunk
            if err:
                self._stderr += err
                del self._stderr[:-KEEP_STDERR]
            if out:
                return out
            if not err:
                return self._finish(deadline)
        return b""

    def _finish(self, deadline: float | None) -> bytes | None:
        if self._closed:
            return b""
        try:
            code = self._session.exit_code(deadline)
        except OrchError:
            if self._closed:
                return b""
            raise
        if code is None:
            return None
        self._returncode, self._ended = code, True
        self._session.close()
        return b""

    @property
    def returncode(self) -> int | None:
        return self._returncode

    @property
    def stderr(self) -> str:
        return bytes(self._stderr).decode(errors="replace")

    def close(self) -> None:
        self._closed = True
        self._session.close()


def _text(chunks: list[bytes]) -> str:
    return b"".join(chunks).decode(errors="replace")
