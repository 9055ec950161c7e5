"""This machine, with the same interface as a machine over SSH."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from orchestrator.connect.base import Completed, Stream
from orchestrator.connect.forward import Relay
from orchestrator.connect.session import KEEP_STDERR
from orchestrator.errors import DeadlineError
from orchestrator.specs import Node

CHUNK = 1 << 18


class LocalHost:
    """Host of connect/base.py: `sh -c` in a process group of its own, on this machine."""

    def __init__(self, node: Node, env: Mapping[str, str] | None = None) -> None:
        self.node = node
        self._env = dict(env) if env is not None else None

    def run(self, command: str, *, stdin: bytes | None = None, timeout: float = 60.0) -> Completed:
        process = self._start(command, subprocess.PIPE if stdin else subprocess.DEVNULL)
        try:
            out, err = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired as error:
            _kill(process)
            tail = (error.stderr or error.stdout or b"").decode(errors="replace").splitlines()[-5:]
            raise DeadlineError(
                f"the command did not end within {timeout:g} s", node=self.node.name, lines=tail
            ) from None
        except BaseException:  # Ctrl-C: nothing of ours stays behind
            _kill(process)
            raise
        return Completed(_code(process), out.decode(errors="replace"), err.decode(errors="replace"))

    def stream(self, command: str) -> Stream:
        return LocalStream(self._start(command, subprocess.DEVNULL))

    @contextmanager
    def forward(self, port: int, target: tuple[str, int]) -> Iterator[int]:
        if target == ("127.0.0.1", port):
            yield port  # it is there already
            return
        relay = Relay(target)
        with _listen(port) as listener:
            thread = threading.Thread(target=_accept, args=(listener, relay), name="forward", daemon=True)
            thread.start()
            try:
                yield listener.getsockname()[1]
            finally:
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
                thread.join(2)
                relay.close()

    def close(self) -> None:
        pass

    def _start(self, command: str, stdin: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._env,
            start_new_session=True,
        )


class LocalStream:
    """Stream of connect/base.py over a child process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._stderr = bytearray()
        self._returncode: int | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for pipe in (process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)

    def read(self, timeout: float | None = None) -> bytes | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._closed and self._selector.get_map():
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            ready = self._selector.select(left)
            if not ready:
                return None
            for key, _ in ready:
                data = os.read(key.fd, CHUNK)
                if not data:
                    self._selector.unregister(key.fileobj)
                elif key.fileobj is self._process.stdout:
                    return data
                else:
                    self._stderr += data
                    del self._stderr[:-KEEP_STDERR]
        return self._end(deadline)

    def _end(self, deadline: float | None) -> bytes | None:
        if self._returncode is None and not self._closed:
            try:
                left = None if deadline is None else max(deadline - time.monotonic(), 0)
                self._process.wait(left)
            except subprocess.TimeoutExpired:
                return None
            self._returncode = _code(self._process)
            self._release()
        return b""

    @property
    def returncode(self) -> int | None:
        return self._returncode

    @property
    def stderr(self) -> str:
        return bytes(self._stderr).decode(errors="replace")

    def close(self) -> None:
        """Ends the command's process group. A `read` in another thread then gives the end."""
        self._closed = True
        if self._returncode is None:
            _kill(self._process)

    def _release(self) -> None:
        with self._lock:
            self._selector.close()
            self._process.stdout.close()
            self._process.stderr.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()
            self._release()


class LocalConnector:
    """Connector of connect/base.py: every node is this machine."""

    def connect(self, node: Node, *, timeout: float = 15.0) -> LocalHost:
        return LocalHost(node)

    def close(self) -> None:
        pass


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process group, whose leader may have ended before its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _code(process: subprocess.Popen[bytes]) -> int:
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _listen(port: int) -> socket.socket:
    for candidate in (port, 0):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", candidate))
            sock.listen(64)
            return sock
        except OSError:
            sock.close()
    raise OSError("no free port on 127.0.0.1")


def _accept(listener: socket.socket, relay: Relay) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        relay.accept(connection)
