"""Carries bytes between a forwarded connection and a TCP target, in both directions.

The ends are sockets or SSH channels: both have recv, sendall, shutdown and close.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Any

from orchestrator.connect.session import PIECE

SHUT_RD, SHUT_WR = 0, 1
DIAL_TIMEOUT = 10.0


class Relay:
    """Connects each accepted end to `target`. `close` ends all connections and their threads."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.carried = 0
        """Bytes that went from the target to the machine (an image pull's direction)."""
        self.error: OSError | None = None
        """Why the target could not be reached, the last time it could not."""
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Any, ...]] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def accept(self, end: Any) -> None:
        """Takes a new connection; returns at once."""
        thread = threading.Thread(target=self._serve, args=(end,), name="forward", daemon=True)
        with self._lock:
            if not self._closed:
                self._open[id(end)] = (end,)
                self._threads.add(thread)
                thread.start()
                return
        _quietly(end.close)

    def close(self, wait: float = 2.0) -> None:
        with self._lock:
            self._closed = True
            ends = [end for pair in self._open.values() for end in pair]
            threads = list(self._threads)
        for end in ends:
            _quietly(end.shutdown, 2)  # wakes a thread that waits in recv
            _quietly(end.close)
        deadline = time.monotonic() + wait
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _serve(self, end: Any) -> None:
        sock = None
        try:
            sock = socket.create_connection(self.target, timeout=DIAL_TIMEOUT)
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._closed:
                    return
                self._open[id(end)] = (end, sock)
            back = threading.Thread(target=_pump, args=(end, sock, 1 << 20), name="forward", daemon=True)
            back.start()
            self.carried += _pump(sock, end, PIECE)
            back.join()
        except OSError as error:
            self.error = error
        finally:
            _quietly(end.close)
            if sock:
                _quietly(sock.close)
            with self._lock:
                self._open.pop(id(end), None)
                self._threads.discard(threading.current_thread())


def _pump(source: Any, sink: Any, size: int) -> int:
    """Copies until `source` ends, then tells `sink` so; the number of bytes."""
    carried = 0
    try:
        while data := source.recv(size):
            sink.sendall(data)
            carried += len(data)
    except Exception:  # sockets and channels have errors of their own
        # One side is gone: stop taking from the other, so that its sender notices.
        _quietly(source.shutdown, SHUT_RD)
    _quietly(sink.shutdown, SHUT_WR)
    return carried


def _quietly(call: Any, *args: object) -> None:
    with suppress(Exception):  # an end that is closed already
        call(*args)
