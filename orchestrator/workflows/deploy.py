"""One deploy, from a specification to the end of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.backends.base import Backend, Found, Plan
from orchestrator.backends.found import exit_code, overall, planned
from orchestrator.errors import Detached, Interrupted, OrchError
from orchestrator.logs import Sink, View
from orchestrator.runs import History, Record
from orchestrator.specs import JobSpec, Node, NodeResult, Run, RunState
from orchestrator.workflows.attach import Attachment
from orchestrator.workflows.diagnose import Diagnosis, diagnose
from orchestrator.workflows.signals import Signals

Notify = Callable[[str, str], None]

WHY = "why"
"""The history's key of the cause that an attached operator was told: a node that was lost may say otherwise later."""


@dataclass(frozen=True)
class Ended:
    """How an attached run ended."""

    run: Run
    results: Mapping[str, NodeResult]
    diagnosis: Diagnosis | None
    found: Found


def start(
    backend: Backend,
    plan: Plan,
    history: History,
    notify: Notify,
    *,
    target: str,
    inventory: str,
    on_started: Callable[[], None] = lambda: None,
) -> Found:
    """Submits `plan` on all nodes or on none, and keeps the history right whatever happens.

    `on_started` is called at once when all nodes have started: from then on a signal must not look like a rollback.
    """
    spec = plan.spec
    found = planned(plan, time.time())
    record = record_of(spec, found, target=target, inventory=inventory)
    history.record(record)
    try:
        backend.submit(plan, notify)
        on_started()
    except BaseException as error:  # also a KeyboardInterrupt, or a bug: the row must not stay `pending`
        interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
        code = error.exit_code if isinstance(error, OrchError) else 130 if interrupted else 1
        state = RunState.STOPPED if interrupted else RunState.FAILED
        run = found.run.at(state, exit_code=code, ended=time.time())
        history.record(replace(record, run=run, started=False))
        raise
    running = Found(found.run.at(RunState.RUNNING), found.dirs, found.operator)
    history.update(running.run)
    return running


def record_of(spec: JobSpec, found: Found, *, target: str, inventory: str) -> Record:
    """The history's row of a run: enough to find its nodes and to start it again, and no secret."""
    return Record(
        run=found.run,
        nodes=spec.nodes,
        run_dir=next(iter(found.dirs.values())),
        target=target,
        inventory=inventory,
        operator=spec.operator,
        storage=spec.storage,
        dirs=dict(found.dirs),
        spec={
            "command": list(spec.command),
            "series": spec.series,
            "stop": spec.stop,
            "launcher": spec.launcher,
            "procs": spec.procs,
            "gpus": spec.gpus,
        },
    )


def found_of(record: Record) -> Found:
    """A history row as the backends want it."""
    dirs = record.dirs or {node.name: record.run_dir for node in record.nodes}
    return Found(record.run, dirs, record.operator)


def follow(
    backend: Backend,
    found: Found,
    nodes: Sequence[Node],
    history: History,
    *,
    sink: Sink,
    view: View,
    notify: Notify,
    signals: Signals,
    stop_others: bool = True,
) -> Ended:
    """Stays with the run to its end; then its containers are removed and the history is brought up to date.

    Raises Detached when the operator leaves; the run goes on.
    """
    attachment = Attachment(
        backend, found, nodes, sink=sink, view=view, notify=notify, signals=signals, stop_others=stop_others
    )
    try:
        results = attachment.run()
    except Detached:
        raise
    return conclude(backend, found, nodes, history, results)


def conclude(
    backend: Backend, found: Found, nodes: Sequence[Node], history: History, results: Mapping[str, NodeResult]
) -> Ended:
    """The run's end: state, cause, history; the ended containers free their nodes."""
    state = overall([result.state for result in results.values()])
    if state is RunState.LOST and any(result.state is RunState.FAILED for result in results.values()):
        state = RunState.FAILED
    ended = max((result.ended_ns / 1e9 for result in results.values()), default=0) or time.time()
    run = found.run.at(state, exit_code=exit_code(state, list(results.values())), ended=ended)
    backend.remove(found, nodes)
    cause = diagnose(run.id, results) if state in (RunState.FAILED, RunState.LOST) else None
    history.update(run)
    if cause and (record := history.get(run.id)):
        history.record(replace(record, spec={**record.spec, WHY: cause.to_json()}))
    return Ended(run, results, cause, found)
