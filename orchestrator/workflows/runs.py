"""What can be asked of a run, or asked about it, after it was started: list, status, stop, why, prune."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import events
from orchestrator.backends.base import Backend, Errors, Found, NodeStatus
from orchestrator.backends.found import conclude
from orchestrator.config import Config, Target
from orchestrator.errors import DeadlineError, NodesFailed, OrchError, UnreachableError
from orchestrator.runs import History
from orchestrator.specs import Node, NodeResult, Run, RunState
from orchestrator.workflows import backends
from orchestrator.workflows.deploy import WHY
from orchestrator.workflows.diagnose import Diagnosis, diagnose
from orchestrator.workflows.locate import InventoryOf, Located, target_nodes

POLL_S = 0.5
PULL_S = 3600.0


def running(config: Config, target: Target, inventory: InventoryOf) -> tuple[list[Found], Errors]:
    """Live runs as the target's nodes tell them, and the nodes that did not answer."""
    found, errors = _discover(config, target, inventory)[2:]
    return [each for each in found if not each.run.state.is_terminal], errors


def _discover(
    config: Config, target: Target, inventory: InventoryOf
) -> tuple[Backend, tuple[Node, ...], list[Found], Errors]:
    nodes = target_nodes(config, target, inventory)
    backend = backends.make(target.backend, config, nodes)
    found, errors = backend.discover(nodes, config.storage_spec().runs)
    if errors and len(errors) == len(nodes):
        raise NodesFailed("no node answered", errors) if len(errors) > 1 else next(iter(errors.values()))
    return backend, nodes, found, errors


@dataclass(frozen=True)
class NodeRow:
    node: str
    state: str
    exit_code: int | None
    detail: str

    def cells(self) -> tuple[Any, ...]:
        return (self.node, self.state, self.exit_code, self.detail)


@dataclass(frozen=True)
class RunView:
    """The answer to `orch status`."""

    run: Run
    nodes: tuple[NodeRow, ...]
    progress: str
    last_step: Mapping[str, Any] | None
    checkpoints: tuple[str, ...]
    now: float

    def to_json(self) -> dict[str, Any]:
        return self.run.to_json() | {
            "per_node": [vars(row) for row in self.nodes],
            "last_step": self.last_step,
            "checkpoints": list(self.checkpoints),
        }


def inspect(located: Located, history: History) -> RunView:
    """Asks the nodes; brings the history up to date. Raises UnreachableError if no node answers."""
    found, nodes, backend = located.found, located.nodes, located.backend
    statuses = backend.status(found, nodes)
    _need_one(statuses)
    run = _told(found.run.id, history)[0] or conclude(found.run, statuses)
    history.update(run)
    rows = []
    for node in nodes:
        status = statuses[node.name]
        if isinstance(status, OrchError):
            rows.append(NodeRow(node.name, "unreachable", None, status.message))
        else:
            code = status.result.exit_code if status.result else None
            rows.append(NodeRow(node.name, status.state.value, code, status.detail))
    step, places = _progress(located, statuses)
    return RunView(run, tuple(rows), _sentence(step), step, places, time.time())


def _progress(located: Located, statuses: Mapping[str, object]) -> tuple[dict | None, tuple[str, ...]]:
    """The last step and the checkpoints of rank 0, which may be on any node: group order is torchrun's."""
    for node in located.nodes:
        if isinstance(statuses[node.name], OrchError):
            continue
        stream = events.read(located.backend.read_file(located.found, node, "events/rank-0.jsonl"))
        if stream:
            step = events.last_step(stream)
            kept = [event for event in stream if isinstance(event, events.Checkpoint)]
            row = {key: getattr(step, key) for key in ("step", "loss", "tokens_per_s")} if step else None
            folder = f"{located.found.dir(node.name)}/checkpoints"
            return row, tuple(f"{node.name}:{folder}/{event.path.rpartition('/')[2]}" for event in kept[-3:])
    return None, ()


def _sentence(step: Mapping[str, Any] | None) -> str:
    """The last step in words, as far as its numbers are known."""
    if not step:
        return ""
    parts = [f"step {step['step']}"]
    if step["loss"] is not None:
        parts.append(f"loss {step['loss']:.4f}")
    if step["tokens_per_s"] is not None:
        parts.append(f"{step['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)


def _need_one(statuses: Mapping[str, NodeStatus | OrchError]) -> None:
    errors = {name: error for name, error in statuses.items() if isinstance(error, OrchError)}
    if len(errors) == len(statuses):
        if len(errors) == 1:
            raise next(iter(errors.values()))
        raise NodesFailed("no node of this run answers", errors)


def stop_run(located: Located, history: History, *, kill: bool, wait: float, notify: Callable[[str], None]) -> Run:
    """Asks all nodes to stop and waits for the end; frees the nodes. Raises DeadlineError if they do not end."""
    found, nodes, backend = located.found, located.nodes, located.backend
    before = conclude(found.run, _answered(backend.status(found, nodes)))
    if before.state.is_terminal:
        history.update(before)
        backend.remove(found, nodes)
        return before
    errors = backend.stop(found, nodes, kill=kill)
    if len(errors) == len(nodes):
        raise NodesFailed("no node could be asked to stop", errors) if len(errors) > 1 else next(iter(errors.values()))
    for node, error in errors.items():
        notify(f"{node}: not asked to stop: {error.message}")
    notify(f"asked {found.run.id} to stop" + (" at once" if kill else "; waiting for its checkpoint and its end"))
    if not wait:
        return found.run.at(RunState.STOPPING)
    return _wait_for_end(located, history, wait, kill)


def _wait_for_end(located: Located, history: History, wait: float, kill: bool) -> Run:
    found, nodes, backend = located.found, located.nodes, located.backend
    deadline = time.monotonic() + wait
    forced = False
    while True:
        statuses = backend.status(found, nodes)
        _need_one(statuses)
        run = conclude(found.run, statuses)
        if run.state.is_terminal:
            history.update(run)
            backend.remove(found, nodes)
            return run
        left = deadline - time.monotonic()
        if kill and not forced and left < wait - 8:
            forced = True
            backend.end(found, nodes, grace=1)
        if left <= 0:
            alive = [name for name, status in statuses.items() if not _over(status)]
            raise DeadlineError(
                f"{found.run.id} has not ended within {wait:.0f} s of being asked to (still on {', '.join(alive)})",
                hint=f"`orch stop --kill {found.run.id}` kills its ranks",
            )
        time.sleep(min(POLL_S, left))


def _over(status: NodeStatus | OrchError) -> bool:
    return isinstance(status, NodeStatus) and status.state.is_terminal


def _answered(statuses: Mapping[str, NodeStatus | OrchError]) -> Mapping[str, NodeStatus | OrchError]:
    _need_one(statuses)
    return statuses


def explain(located: Located, history: History) -> tuple[Run, Diagnosis | None]:
    """The run and the first cause of its failure: as it was told when it ended, else from what its nodes keep."""
    ended, cause = _told(located.found.run.id, history)
    if ended:
        return ended, cause
    statuses = located.backend.status(located.found, located.nodes)
    _need_one(statuses)
    run = conclude(located.found.run, statuses)
    history.update(run)
    if run.state not in (RunState.FAILED, RunState.LOST):
        return run, None
    results: dict[str, NodeResult | OrchError] = {}
    for name, status in statuses.items():
        if isinstance(status, OrchError):
            results[name] = UnreachableError(f"does not answer now: {status.message}", node=name, hint=status.hint)
        elif status.result:
            results[name] = status.result
    return run, diagnose(run.id, results)


def _told(run_id: str, history: History) -> tuple[Run | None, Diagnosis | None]:
    """The end and the cause that were told to an attached operator, if this history saw them."""
    record = history.get(run_id)
    if record is None or WHY not in record.spec:
        return None, None
    return record.run, Diagnosis.from_json(record.spec[WHY])


def prunable(
    config: Config, target: Target, inventory: InventoryOf, keep: int
) -> tuple[Backend, tuple[Node, ...], list[Found]]:
    """The ended runs beyond the `keep` newest ended ones."""
    backend, nodes, found, _ = _discover(config, target, inventory)
    ended = [each for each in found if each.run.state.is_terminal and not _maybe_starting(each)]
    return backend, nodes, ended[keep:]


def _maybe_starting(found: Found) -> bool:
    """A run whose image is still being pulled has a folder and no container yet, like one that was lost."""
    return found.run.state is RunState.LOST and time.time() - found.run.started < PULL_S


def prune_runs(backend: Backend, nodes: Sequence[Node], found: Sequence[Found]) -> Errors:
    """Removes the runs' folders and ended containers; what could not be removed, by node."""
    errors: Errors = {}
    for each in found:
        there = [node for node in nodes if node.name in each.dirs]
        errors |= backend.remove(each, there, files=True)
    return errors
