"""Reads the logs of all nodes at once; a dropped connection is taken up again at the cursor.

One thread per node reads chunks, formats the whole lines in them and writes them in one piece. The cursor
(byte offset in the node's log, always the start of a line) moves after the write, so a reader that reopens
there neither loses nor repeats a line. A slow terminal slows the readers; the log waits on the node's disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.connect.base import Stream
from orchestrator.errors import (
    ConnectionLost,
    DeadlineError,
    HostKeyError,
    OrchError,
    RemoteError,
    UnreachableError,
)
from orchestrator.logs.sink import Sink, SinkClosed, wants_color
from orchestrator.logs.tail import Tail
from orchestrator.logs.view import Formatter, LineCutter, View

POLL = 0.25
"""Seconds after which a quiet reader looks whether it is to stop."""

BACKOFF = (0.2, 2.0)
"""First and longest pause between two attempts, in seconds; it doubles."""

COMMAND_RETRIES = 3
"""How often the reading command itself may fail, without a line in between, before the node is given up."""

JOIN_GRACE = 3.0
"""Seconds that readers get to end after a stop; one that hangs in a dead terminal is left behind."""

OnEvent = Callable[[str, str, Exception | None], None]
"""(node, `reconnecting` | `reconnected` | `lost`, the error or None), from the reader's thread."""


@dataclass(frozen=True)
class Source:
    """One node's log. `open(offset)` gives it from that byte on; `offset` is where to begin."""

    node: str
    index: int
    open: Callable[[int], Stream]
    offset: int = 0


@dataclass(frozen=True)
class Result:
    """How following ended. `cursors`: where each node's reader stood, to go on from there."""

    cursors: Mapping[str, int]
    errors: Mapping[str, OrchError] = field(default_factory=dict)
    """Nodes given up, with the reason; a node whose log ended is not here."""
    closed: bool = False
    """Nobody reads our output any more."""


class AnyView(Protocol):
    def shows(self, node: str) -> bool: ...

    def formatter(self, node: str) -> Formatter: ...


class Follower:
    """Follows `sources` into `sink` until all have ended, `stop` is set, or the sink is closed."""

    def __init__(
        self,
        sources: Iterable[Source],
        sink: Sink,
        *,
        on_event: OnEvent,
        stop: threading.Event,
        reconnect_deadline: float = 60.0,
        view: AnyView | None = None,
        tail: Tail | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        chosen = list(sources)
        shown = view or View(
            names=tuple(source.node for source in chosen), color=wants_color(sink.terminal, os.environ)
        )
        self.sink, self.stop, self.tail = sink, stop, tail
        self.on_event, self.clock = on_event, clock
        self.reconnect_deadline = reconnect_deadline
        self.sleep = sleep or stop.wait
        self._readers = [
            _Reader(self, source, shown.formatter(source.node)) for source in chosen if shown.shows(source.node)
        ]
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the readers and returns."""
        for reader in self._readers:
            thread = threading.Thread(target=reader.run, name=f"log-{reader.source.node}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def cursor(self, node: str) -> int:
        """Byte offset in `node`'s log up to which everything has been written. Raises KeyError."""
        return self.cursors()[node]

    def cursors(self) -> dict[str, int]:
        return {reader.source.node: reader.cursor for reader in self._readers}

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self, timeout: float | None = None) -> Result:
        """Waits for the readers (at most `timeout` seconds); after a stop at most JOIN_GRACE seconds.

        Waits in short pieces, so that signal handlers of the main thread run.
        """
        deadline = None if timeout is None else self.clock() + timeout
        for thread in self._threads:
            while thread.is_alive():
                thread.join(POLL)
                if deadline is None and (self.stop.is_set() or self.sink.closed):
                    deadline = self.clock() + JOIN_GRACE
                if deadline is not None and self.clock() >= deadline:
                    break
        errors = {reader.source.node: reader.error for reader in self._readers if reader.error}
        return Result(self.cursors(), errors, self.sink.closed)


def follow(
    sources: Iterable[Source],
    sink: Sink,
    *,
    on_event: OnEvent,
    stop: threading.Event,
    reconnect_deadline: float = 60.0,
    view: AnyView | None = None,
    tail: Tail | None = None,
) -> Result:
    """Follows until all logs have ended or `stop` is set. Raises nothing: see Result.errors.

    A broken connection is reopened at the cursor, with growing pauses, until `reconnect_deadline` seconds
    have passed without success; then the node is given up (event `lost`) and the others go on.
    """
    follower = Follower(
        sources,
        sink,
        on_event=on_event,
        stop=stop,
        reconnect_deadline=reconnect_deadline,
        view=view,
        tail=tail,
    )
    follower.start()
    return follower.join()


class _Reader:
    """Reads one node's log; `run` is its thread."""

    def __init__(self, owner: Follower, source: Source, formatter: Formatter) -> None:
        self.owner, self.source, self.formatter = owner, source, formatter
        self.cursor = source.offset
        self.error: OrchError | None = None
        self._down_since: float | None = None
        self._delay = BACKOFF[0]
        self._command_failures = 0

    def run(self) -> None:
        try:
            while not self._stopped():
                try:
                    if self._read_stream():
                        return
                except (UnreachableError, DeadlineError, RemoteError) as error:
                    self._pause(error)
        except SinkClosed:
            return
        except OrchError as error:
            self._lose(error)
        except Exception as error:  # a bug must not end a thread without a word
            self._lose(OrchError(f"following the log failed: {type(error).__name__}: {error}"))

    def _read_stream(self) -> bool:
        """Opens at the cursor and reads to the end: True. False after a stop."""
        stream = self.source.open(self.cursor)
        try:
            lines = LineCutter()
            while not self._stopped():
                chunk = stream.read(POLL)
                if chunk == b"":
                    self._check_end(stream)
                    self._connected()
                    # The launcher was killed in the middle of a line: show what there is.
                    self._emit(lines.rest())
                    return True
                self._connected()
                if chunk:
                    self._emit(lines.feed(chunk))
            return False
        finally:
            with contextlib.suppress(OrchError, OSError, EOFError):
                stream.close()

    def _check_end(self, stream: Stream) -> None:
        """An end of output with a failed command is not the end of the log."""
        code = stream.returncode
        if code:
            words = (stream.stderr or "").strip().splitlines()
            why = f": {words[-1]}" if words else ""
            raise RemoteError(f"the command that reads the log ended with {code}{why}")

    def _emit(self, whole: bytes) -> None:
        if not whole:
            return
        self.owner.sink.write(self.formatter(whole))
        # Only now: what could not be written is read again.
        self.cursor += len(whole)
        self._command_failures = 0
        if self.owner.tail is not None:
            self.owner.tail.feed(self.source.node, whole)

    def _connected(self) -> None:
        """Something came back from the node: the outage, if there was one, is over."""
        if self._down_since is None:
            return
        self._down_since, self._delay = None, BACKOFF[0]
        self.owner.on_event(self.source.node, "reconnected", None)

    def _pause(self, error: OrchError) -> None:
        """Waits before the next attempt. Raises `error` when there is to be none."""
        if self._stopped():
            return
        now = self.owner.clock()
        first = self._down_since is None
        if first:
            self._down_since = now
        if isinstance(error, RemoteError):
            self._command_failures += 1
        left = (self._down_since or 0.0) + self.owner.reconnect_deadline - now
        if isinstance(error, HostKeyError) or self._command_failures > COMMAND_RETRIES:
            raise error
        if left <= 0:
            raise self._gave_up(error)
        if first:
            self.owner.on_event(self.source.node, "reconnecting", error)
        self.owner.sleep(min(self._delay, left))
        self._delay = min(self._delay * 2, BACKOFF[1])

    def _gave_up(self, error: OrchError) -> OrchError:
        seconds = f"{self.owner.reconnect_deadline:g} s"
        return ConnectionLost(
            f"the log could not be read for {seconds}: {error.message}",
            node=self.source.node,
            hint="the run itself goes on; `orch logs -f` follows it again once the node answers",
        )

    def _lose(self, error: OrchError) -> None:
        self.error = error.on(self.source.node)
        with contextlib.suppress(SinkClosed):  # whoever is told may want to print it
            self.owner.on_event(self.source.node, "lost", self.error)

    def _stopped(self) -> bool:
        return self.owner.stop.is_set() or self.owner.sink.closed
