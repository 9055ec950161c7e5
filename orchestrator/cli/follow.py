"""How a followed run looks: its log on stdout, what happens around it on stderr, its end as a summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import typer

from orchestrator.cli import output
from orchestrator.cli.state import state

if TYPE_CHECKING:
    from orchestrator.backends.base import Backend, Found
    from orchestrator.specs import Node, Storage
    from orchestrator.workflows.deploy import Ended
    from orchestrator.workflows.diagnose import Diagnosis
    from orchestrator.workflows.signals import Signals

SHOWN_LINES = 12


def follow(
    backend: Backend,
    found: Found,
    nodes: Sequence[Node],
    *,
    world: int,
    signals: Signals,
    to_stderr: bool = False,
    stop_others: bool = True,
    ranks: frozenset[str] | None = None,
    only: str | None = None,
) -> Ended:
    """Shows the run's log until it ends. Raises Detached when the operator leaves."""
    from orchestrator.logs import Sink, View, wants_color
    from orchestrator.workflows.deploy import follow as workflow

    stream = sys.stderr if to_stderr else sys.stdout
    sink = Sink.to(stream)
    view = View(
        names=tuple(node.name for node in nodes),
        world=world,
        nodes=None if only is None else {only},
        ranks=ranks,
        color=wants_color(sink.terminal, os.environ),
    )
    return workflow(
        backend,
        found,
        nodes,
        state().history(),
        sink=sink,
        view=view,
        notify=notify,
        signals=signals,
        stop_others=stop_others,
    )


def notify(node: str, text: str) -> None:
    if node:
        output.node_line(node, text)
    else:
        output.say(text)


def finish(
    ended: Ended, backend: Backend, nodes: Sequence[Node], storage: Storage, series: str, *, json: bool
) -> NoReturn:
    """The summary of an ended run, and its exit code."""
    from orchestrator.specs import RunState

    run = ended.run
    if json:
        output.emit_json(run.to_json() | {"why": ended.diagnosis.to_json() if ended.diagnosis else None})
    colour = output.STATE_COLOURS.get(run.state.value, "bold")
    took = output.duration((run.ended or run.started) - run.started)
    state_text = output.style(run.state.value, colour, sys.stderr)
    print(
        f"{output.style(run.id, 'bold', sys.stderr)} {state_text} after {took} (exit code {run.exit_code})",
        file=sys.stderr,
    )
    if ended.diagnosis:
        show_cause(ended.diagnosis)
        print(f"  again      orch why {run.id}", file=sys.stderr)
    else:
        checkpoints = f"{storage.checkpoint_root}/{series}"
        print(f"  run folder {ended.found.dir(nodes[0].name)} on {', '.join(run.nodes)}", file=sys.stderr)
        print(f"  checkpoints {checkpoints}  (home: orch pull {run.id} --checkpoint latest)", file=sys.stderr)
    if run.state is RunState.PREEMPTED:
        print(f"  go on with orch deploy --resume {run.id}", file=sys.stderr)
    raise typer.Exit(run.exit_code or 0)


def show_cause(cause: Diagnosis, stream=None) -> None:
    """The first cause, its last lines, what to do next, and how many only lost their partner."""
    stream = stream or sys.stderr
    bold = output.style("first cause", "red", stream)
    print(f"  {bold} {output.printable(cause.cause)}", file=stream)
    for line in cause.lines[-SHOWN_LINES:]:
        print(f"    {output.style('|', 'dim', stream)} {output.printable(line)}", file=stream)
    if cause.remedy:
        print(f"  {output.style('next', 'green', stream)}       {output.printable(cause.remedy)}", file=stream)
    if cause.victims:
        print(f"  victims    {len(cause.victims)}, not causes: {output.printable(cause.victims[0])[:100]}", file=stream)
