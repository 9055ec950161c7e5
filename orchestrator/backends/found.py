"""Runs as the nodes tell them: container labels and run folders, put together over all nodes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from orchestrator.backends.base import Found, NodeStatus, Plan
from orchestrator.commands.report import Report, verdict
from orchestrator.errors import OrchError
from orchestrator.specs import LABEL_DIR, LABEL_JOB, LABEL_OPERATOR, LABEL_RUN, NodeResult, Run, RunState


def planned(plan: Plan, started: float) -> Found:
    spec = plan.spec
    run = Run(
        id=spec.run_id,
        name=spec.name,
        state=RunState.PENDING,
        backend=spec.backend,
        nodes=tuple(node.name for node in spec.nodes),
        started=started,
        image=spec.image.pinned if spec.image else None,
        attempt=spec.attempt,
    )
    return Found(run, {each.node.name: each.run_dir for each in plan.nodes}, spec.operator)


def overall(states: Iterable[RunState]) -> RunState:
    """The run's state from its nodes': alive if any is; then failed before stopped before preempted before done."""
    seen = set(states)
    order = (
        RunState.RUNNING,
        RunState.STARTING,
        RunState.FAILED,
        RunState.LOST,
        RunState.STOPPED,
        RunState.PREEMPTED,
        RunState.SUCCEEDED,
    )
    return next((state for state in order if state in seen), RunState.LOST)


def node_status(report: Report, node: str, index: int) -> NodeStatus:
    result = verdict(report, node, index)
    if result is not None:
        return NodeStatus(node, result.state, result, result.reason)
    return NodeStatus(node, RunState.STARTING if report.state == "created" else RunState.RUNNING)


def exit_code(state: RunState, results: Iterable[NodeResult | None]) -> int | None:
    """The run's exit code: fixed by its state, or the first of the nodes that are in it (1, 127, 143 …)."""
    if not state.is_terminal:
        return None
    fixed = {RunState.SUCCEEDED: 0, RunState.PREEMPTED: 75, RunState.LOST: 3}
    if state in fixed:
        return fixed[state]
    codes = [result.exit_code for result in results if result and result.state is state]
    return next((code for code in codes if code), 1)


def conclude(run: Run, statuses: Mapping[str, NodeStatus | OrchError]) -> Run:
    """The run as its nodes see it now; a node that does not answer makes an otherwise ended run `lost`."""
    known = [status for status in statuses.values() if isinstance(status, NodeStatus)]
    if not known:
        return run
    states = [status.state for status in known]
    if len(known) < len(statuses) and all(state.is_terminal for state in states):
        states.append(RunState.LOST)
    state = overall(states)
    results = [status.result for status in known]
    ended = max((result.ended_ns / 1e9 for result in results if result), default=0.0) or None
    return run.at(state, exit_code=exit_code(state, results), ended=ended if state.is_terminal else None)


def merge(answers: Mapping[str, tuple[Sequence[dict], Sequence[dict]]]) -> list[Found]:
    """Puts together what each node (by its inventory name) said in `docker.parse_discover`; newest first."""
    runs: dict[str, Run] = {}
    dirs: dict[str, dict[str, str]] = defaultdict(dict)
    operators: dict[str, str] = {}
    states: dict[str, list[RunState]] = defaultdict(list)
    codes: dict[str, list[NodeResult]] = defaultdict(list)
    for node, (containers, folders) in answers.items():
        live = {row["labels"].get(LABEL_RUN): row for row in containers}
        for folder in folders:
            job = folder["job"]
            run_id = job.get("run")
            if not run_id or (run_id in dirs and node in dirs[run_id]):
                continue
            if job.get("node") != node and len(job.get("node_names", ())) > 1 and node in job["node_names"]:
                continue
            state, result = _folder_state(folder, live.get(run_id))
            runs.setdefault(run_id, _run(job, folder["time"]))
            dirs[run_id][node] = folder["dir"]
            operators[run_id] = job.get("operator", "")
            states[run_id].append(state)
            if result:
                codes[run_id].append(result)
        for run_id, row in live.items():
            if run_id and node not in dirs[run_id]:
                labels = row["labels"]
                runs.setdefault(run_id, _run(_json(labels.get(LABEL_JOB)) | {"run": run_id}, _created(row)))
                dirs[run_id][node] = labels.get(LABEL_DIR, "")
                operators[run_id] = labels.get(LABEL_OPERATOR, "")
                states[run_id].append(_container_state(row))
    found = []
    for run_id, run in runs.items():
        state = overall(states[run_id])
        ended = max((each.ended_ns / 1e9 for each in codes[run_id]), default=0.0) or None
        run = run.at(state, exit_code=exit_code(state, codes[run_id]), ended=ended if state.is_terminal else None)
        found.append(Found(run, dict(dirs[run_id]), operators[run_id]))
    return sorted(found, key=lambda each: each.run.started, reverse=True)


def _folder_state(folder: dict, container: dict | None) -> tuple[RunState, NodeResult | None]:
    if folder["result"]:
        try:
            result = NodeResult.from_json(folder["result"])
            return result.state, result
        except (KeyError, ValueError, TypeError, AttributeError):
            return RunState.FAILED, None
    if folder.get("alive"):
        return RunState.RUNNING, None
    return (_container_state(container), None) if container else (RunState.LOST, None)


def _container_state(row: dict) -> RunState:
    status = row["state"].get("Status", "")
    if status in ("running", "paused", "restarting"):
        return RunState.RUNNING
    return RunState.STARTING if status == "created" else RunState.LOST


def _run(job: Mapping[str, Any], started: float) -> Run:
    return Run(
        id=job["run"],
        name=job.get("name", job["run"]),
        state=RunState.LOST,
        backend=job.get("backend", "ssh"),
        nodes=tuple(job.get("node_names", ())),
        started=started,
        image=job.get("image"),
        attempt=job.get("attempt", 1),
    )


def _created(row: dict) -> float:
    try:
        # (the engine's word for "never" lies in the year 1)
        return max(0.0, datetime.fromisoformat(row["state"]["StartedAt"][:19] + "+00:00").timestamp())
    except (KeyError, ValueError):
        return 0.0


def _json(text: str | None) -> dict[str, Any]:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}
