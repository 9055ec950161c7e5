"""Where merged lines go: one writer with one lock, shared by all readers."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

Write = Callable[[bytes], object]
Hook = Callable[[bytes, Write], None]
"""Called instead of the plain write, with the lock held: clear the status line, write, draw it again."""


class SinkClosed(Exception):
    """Nobody reads any more (`| head`, a closed terminal): the end of following, not an error."""


class Sink:
    """Writes whole lines in one piece. `terminal` says whether a terminal shows them.

    `hook` may be set at any time. `lock` is re-entrant: hold it to draw something between two writes.
    """

    def __init__(self, write: Write, *, terminal: bool = False, hook: Hook | None = None) -> None:
        self._write = write
        self.terminal = terminal
        self.hook = hook
        self.lock = threading.RLock()
        self.closed = False

    @classmethod
    def to(cls, stream: IO[Any], *, hook: Hook | None = None) -> Sink:
        """A sink for `sys.stdout`, another text stream, or a binary one."""
        return cls(_writer(stream), terminal=_is_terminal(stream), hook=hook)

    def write(self, data: bytes) -> None:
        """Writes `data`, whole lines, and flushes. Blocks as long as the reader is slow.

        Raises SinkClosed if nobody reads any more, also at every later call.
        """
        if not data:
            return
        with self.lock:
            if self.closed:
                raise SinkClosed
            try:
                if self.hook is None:
                    self._write(data)
                else:
                    self.hook(data, self._write)
            except (BrokenPipeError, ConnectionResetError, ValueError) as error:
                self._close(error)
            except OSError as error:
                # A terminal that is gone answers EIO; a full disk is a real error.
                if error.errno not in (errno.EIO, errno.EBADF):
                    raise
                self._close(error)

    def _close(self, error: Exception) -> None:
        # Python says "I/O operation on closed file" with a ValueError; others are bugs.
        if isinstance(error, ValueError) and "closed" not in str(error):
            raise error
        self.closed = True
        raise SinkClosed from error


def wants_color(terminal: bool, env: Mapping[str, str]) -> bool:
    """Whether to colour: on a terminal that can, unless NO_COLOR is set; FORCE_COLOR also in a pipe."""
    if env.get("NO_COLOR"):
        return False
    if env.get("FORCE_COLOR", "") not in ("", "0"):
        return True
    return terminal and env.get("TERM") != "dumb"


def _is_terminal(stream: IO[Any]) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _writer(stream: IO[Any]) -> Write:
    binary = getattr(stream, "buffer", stream)
    try:
        fd = stream.fileno()
    except (AttributeError, OSError, ValueError):
        fd = None  # a stream in memory

    def write(data: bytes) -> None:
        if fd is None:
            binary.write(data)
            binary.flush()
        else:
            stream.flush()
            write_all(fd, data)

    return write


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`, also where the file is non-blocking (a terminal shared with ssh often is)."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            # Not a busy wait: returns when the other side has read something.
            select.select((), (fd,), (), 1.0)
