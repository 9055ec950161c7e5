"""Stays with a started run: its logs, its ends, and the operator's Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from orchestrator.backends.base import Backend, Found
from orchestrator.errors import Detached
from orchestrator.logs import Follower, Result, Sink, Source, Tail, View
from orchestrator.specs import Node, NodeResult, RunState
from orchestrator.workflows.signals import Signals
from orchestrator.workflows.watch import Watch

SECOND_CTRL_C_S = 3.0
DRAIN_S = 15.0
"""How long the last lines may take to arrive after the last launcher has ended."""
DRAIN_LOST_S = 4.0
"""The same when a node was lost: nothing more will come from that one."""

Notify = Callable[[str, str], None]
"""(node or "", what is happening), for the operator."""


class Attachment:
    """One operator's terminal on one run. `run` returns each node's result, or raises Detached."""

    def __init__(
        self,
        backend: Backend,
        found: Found,
        nodes: Sequence[Node],
        *,
        sink: Sink,
        view: View,
        notify: Notify,
        signals: Signals,
        stop_others: bool = True,
    ) -> None:
        self.tail = Tail()
        self._backend, self._found, self._nodes = backend, found, list(nodes)
        self._notify, self._signals = notify, signals
        self._sink = sink
        self._closing = threading.Event()
        self._stop_asked: float | None = None
        self._killed = False
        self._watch = Watch(backend, found, self._nodes, notify, stop_others=stop_others)
        self._follower = Follower(
            [Source(node.name, index, partial(backend.open_log, found, node)) for index, node in enumerate(nodes)],
            sink,
            on_event=self._log_event,
            stop=self._closing,
            view=view,
            tail=self.tail,
        )

    def run(self) -> dict[str, NodeResult]:
        self._signals.hold()
        self._watch.start()
        self._follower.start()
        try:
            while not self._watch.done:
                self._watch.step(0.1)
                if signum := self._signals.take():
                    self._signalled(signum)
                if self._sink.closed:
                    raise Detached("nobody reads the output any more; the run goes on", hint=self._pick_up(), signum=1)
            lost = any(result.state is RunState.LOST for result in self._watch.results.values())
            self._follower.join(DRAIN_LOST_S if lost else DRAIN_S)
        finally:
            self._watch.close()
            self._closing.set()
        return dict(self._watch.results)

    def logs(self) -> Result:
        return self._follower.join(0)

    # -- signals ------------------------------------------------------------------------------

    def _signalled(self, signum: int) -> None:
        """INT stops the run unless a second one detaches; TERM and HUP detach."""
        if signum != 2:
            raise Detached("detached; the run goes on", hint=self._pick_up(), signum=signum)
        if self._stop_asked is not None:
            if self._killed:
                raise Detached("detached while the run is being stopped", hint=self._pick_up(), signum=signum)
            self._killed = True
            self._notify("", "killing the ranks; Ctrl-C again detaches")
            self._in_background(kill=True)
            return
        self._notify("", f"Ctrl-C again within {SECOND_CTRL_C_S:.0f} s detaches; otherwise the run is stopped")
        until = time.monotonic() + SECOND_CTRL_C_S
        while time.monotonic() < until and not self._watch.done:
            self._watch.step(0.1)
            if again := self._signals.take():
                raise Detached("detached; the run goes on", hint=self._pick_up(), signum=again)
        if not self._watch.done:
            self._stop_asked = time.monotonic()
            self._notify("", "stopping the run (our trainer saves a checkpoint first); Ctrl-C again kills it")
            self._in_background(kill=False)

    def _in_background(self, *, kill: bool) -> None:
        def stop() -> None:
            for node, error in self._backend.stop(self._found, self._nodes, kill=kill).items():
                self._notify(node, f"could not be asked to stop: {error.message}")

        threading.Thread(target=stop, daemon=True).start()

    def _pick_up(self) -> str:
        return f"`orch logs -f {self._found.run.id}` picks it up, `orch stop {self._found.run.id}` stops it"

    def _log_event(self, node: str, event: str, error: Exception | None) -> None:
        if event == "reconnecting":
            self._notify(node, f"log connection dropped ({error}); reconnecting")
        elif event == "reconnected":
            self._notify(node, "log connection is back; no line was lost")
        else:
            self._notify(node, f"log not readable: {error}")
