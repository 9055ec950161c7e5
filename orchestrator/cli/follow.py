"""How a followed run looks: its log on stdout, what happens around it on stderr, its end as a summary."""

from __future__ import annotations

import os
import re
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
    if sys.stderr.isatty():
        print(file=sys.stderr)  # apart from the log
    print(
        f"{output.style(run.id, 'bold', sys.stderr)} {state_text} after {took} (exit code {run.exit_code})",
        file=sys.stderr,
    )
    if ended.diagnosis:
        show_cause(ended.diagnosis)
        lines = [("again", f"orch why {run.id}")]
    else:
        lines = [
            ("run folder", f"{ended.found.dir(nodes[0].name)} on {', '.join(run.nodes)}"),
            ("checkpoints", f"{storage.checkpoint_root}/{series}"),
            ("bring home", f"orch pull {run.id} --checkpoint latest"),
        ]
    if run.state is RunState.PREEMPTED:
        lines.append(("go on with", f"orch deploy --resume {run.id}"))
    for label, text in lines:
        print(output.field(label, text), file=sys.stderr)
    raise typer.Exit(run.exit_code or 0)


def show_cause(cause: Diagnosis, stream=None) -> None:
    """The first cause, its last lines, what to do next, and how many only lost their partner."""
    stream = stream or sys.stderr
    print(output.field("first cause", cause.cause, "red", stream), file=stream)
    for line in cause.lines[-SHOWN_LINES:]:
        print(f"    {output.style('|', 'dim', stream)} {output.printable(line)}", file=stream)
    if cause.remedy:
        print(output.field("next", cause.remedy, "green", stream), file=stream)
    if cause.victims:
        count, first = len(cause.victims), _cut(cause.victims[0], 70)
        print(output.field("others", f"{count} failed in its wake: {first}"), file=stream)


def _cut(text: str, width: int) -> str:
    """At most `width` characters of `text`; the source file that torch's C++ errors begin with says nothing."""
    text = re.sub(r"\[/\S*\] ", "", text)
    return text if len(text) <= width else text[: width - 1] + "…"
