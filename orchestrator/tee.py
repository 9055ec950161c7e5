"""Runs a command that shows its progress on our stderr, and keeps the end of what it said."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from orchestrator.errors import BuildError

_KEEP = 64 << 10
_PATIENCE = 10.0
"""Seconds a command has to end after Ctrl-C before it is killed."""


def run_tee(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    feed: Callable[[BinaryIO], None] | None = None,
) -> tuple[int, str]:
    """(exit code, last 64 KiB of output) of `argv`; `feed` writes its stdin from a thread.

    Where our stderr is a terminal the command gets one too, so its progress looks as it does by hand. All its
    output goes to our stderr. An error raised by `feed` ends the command and is raised here.
    Raises BuildError when the command is not installed.
    """
    reader, writer = _terminal() if sys.stderr.isatty() else os.pipe()
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=dict(env) if env is not None else None,
        )
    except FileNotFoundError:
        os.close(reader)
        raise BuildError(
            f"{argv[0]} is not installed on this machine", hint="install Docker, or Docker Desktop"
        ) from None
    finally:
        os.close(writer)
    problems: list[BaseException] = []
    thread = threading.Thread(target=_feed, args=(process, feed, problems), daemon=True)
    thread.start()
    tail = bytearray()
    try:
        _copy(reader, tail)
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        os.close(reader)
    thread.join(_PATIENCE)
    if problems:
        raise problems[0]
    return code, tail.decode(errors="replace")


def _terminal() -> tuple[int, int]:
    """A pseudo-terminal of our terminal's size; it passes every byte through as it is."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    try:
        size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    except OSError:
        pass  # a terminal that does not know its size
    return master, slave


def _feed(
    process: subprocess.Popen[bytes], feed: Callable[[BinaryIO], None] | None, problems: list[BaseException]
) -> None:
    if feed is None or process.stdin is None:
        return
    try:
        feed(process.stdin)  # type: ignore[arg-type]
        process.stdin.close()
    except BrokenPipeError:
        pass  # the command has ended and says why itself
    except BaseException as error:
        problems.append(error)
        process.terminate()


def _copy(reader: int, tail: bytearray) -> None:
    while True:
        try:
            data = os.read(reader, 1 << 16)
        except OSError:  # EIO: the last writer has closed the pseudo-terminal
            return
        if not data:
            return
        tail += data
        del tail[:-_KEEP]
        sys.stderr.write(data.decode(errors="replace"))
        sys.stderr.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """After Ctrl-C, which the command got as well: wait for it, then insist."""
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
