"""One function on many nodes at once. Every node answers, with a result or with an error."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from orchestrator.errors import DeadlineError, NodesFailed, OrchError

T = TypeVar("T")
R = TypeVar("R")

WIDTH = 64
"""Nodes worked on at once; more threads than this gain nothing (SSH is bound by the CPU here)."""


def fanout(
    items: Iterable[T],
    fn: Callable[[T], R],
    *,
    deadline: float,
    what: str,
    width: int = WIDTH,
) -> dict[str, R | OrchError]:
    """`fn(item)` for each node (or host, or plan of a node), in the order given, by node name.

    Comes back within `deadline` seconds whatever `fn` does; a node that is not done by then has a
    DeadlineError saying that it waited for `what`. Other exceptions of `fn` become OrchError.
    """
    work = [(name_of(item), item) for item in items]
    crew = _Crew(deque(work), fn, what)
    for _ in range(min(width, len(work))):
        threading.Thread(target=crew.work, name=f"fanout {what}", daemon=True).start()
    end = time.monotonic() + deadline
    try:
        done = crew.wait(len(work), end)
    finally:
        crew.stop()
    for name, _ in work:
        if name not in done:
            why = "" if name in crew.started else f" (its turn had not come: {width} nodes at a time)"
            done[name] = DeadlineError(f"{what}: not done after {deadline:g} s{why}", node=name)
    return {name: done[name] for name, _ in work}


class _Crew:
    """Threads that share a queue of nodes."""

    def __init__(self, queue: deque, fn: Callable, what: str) -> None:
        self.started: set[str] = set()
        self._queue = queue
        self._fn = fn
        self._what = what
        self._done: dict[str, Any] = {}
        self._change = threading.Condition()

    def work(self) -> None:
        while True:
            try:
                name, item = self._queue.popleft()
            except IndexError:
                return
            self.started.add(name)
            result = self._one(name, item)
            with self._change:
                self._done[name] = result
                self._change.notify_all()

    def _one(self, name: str, item: Any) -> Any:
        try:
            return self._fn(item)
        except OrchError as error:
            return error.on(name)
        except BaseException as error:  # a thread has nobody above it to tell
            detail = str(error).strip().splitlines()
            said = f"{type(error).__name__}: {detail[0]}" if detail else type(error).__name__
            wrapped = OrchError(f"{self._what}: unexpected {said}", node=name, hint="see it all with --debug")
            wrapped.__cause__ = error
            return wrapped

    def wait(self, count: int, end: float) -> dict[str, Any]:
        with self._change:
            while len(self._done) < count and (left := end - time.monotonic()) > 0:
                self._change.wait(left)
            return dict(self._done)

    def stop(self) -> None:
        """Nobody starts on a further node; what is under way ends by its own deadlines."""
        self._queue.clear()


def raise_failures(results: Mapping[str, R | OrchError], message: str) -> dict[str, R]:
    """The results if all nodes have one; else raises the one error, or NodesFailed with all of them."""
    errors = {name: result for name, result in results.items() if isinstance(result, OrchError)}
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        hints = list(dict.fromkeys(error.hint for error in errors.values() if error.hint))
        names = ", ".join(errors)
        raise NodesFailed(
            f"{message} on {len(errors)} of {len(results)} nodes ({names})",
            errors,
            hint=hints[0] if len(hints) == 1 else None,
        )
    return dict(results)


def name_of(item: Any) -> str:
    """The node name of a node, of a host or plan (their `.node`), or of a name itself."""
    node = getattr(item, "node", item)
    return node if isinstance(node, str) else node.name
