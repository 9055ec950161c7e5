"""`orch logs` and `orch exec`: wiring of what is shown and of what is run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import typer

from orchestrator.cli import output
from orchestrator.cli.follow import notify

if TYPE_CHECKING:
    from orchestrator.specs import Node
    from orchestrator.workflows.locate import Located


def show(
    located: Located,
    *,
    follow: bool,
    node: str | None,
    rank: str | None,
    since: str | None,
    fold: bool,
    raw: bool,
) -> None:
    """Prints the run's log; with `follow` until the run has ended, else what there is now."""
    from orchestrator.errors import NodesFailed, UsageError, unknown
    from orchestrator.logs import FoldView, Sink, Source, View, parse_ranks, parse_since, wants_color
    from orchestrator.logs import follow as read
    from orchestrator.logs.sink import SinkClosed

    found, backend = located.found, located.backend
    names = tuple(each.name for each in located.nodes)
    if node and node not in names:
        raise UsageError(unknown("node", node, names))
    if fold and follow:
        raise UsageError("--fold needs the whole log, --follow never has it", hint="leave one of them out")
    chosen = [each for each in located.nodes if node in (None, each.name)]
    offsets = _offsets(located, chosen, parse_since(since)) if since else {}
    sink = Sink.to(sys.stdout)
    view = View(
        names=names,
        world=located.spec.get("procs", 1) * len(names),
        ranks=parse_ranks(rank) if rank else None,
        color=wants_color(sink.terminal, os.environ) and not raw,
        raw=raw,
    )
    shown = FoldView(view) if fold else view
    opened = backend.open_log if follow else backend.open_log_so_far
    sources = [
        Source(each.name, index, partial(opened, found, each), offsets.get(each.name, 0))
        for index, each in enumerate(chosen)
    ]
    result = read(sources, sink, on_event=_tell, stop=threading.Event(), view=shown)
    if isinstance(shown, FoldView):
        with contextlib.suppress(SinkClosed):
            sink.write(shown.render())
    if len(result.errors) > 1:
        raise NodesFailed("the logs of several nodes could not be read", result.errors)
    for error in result.errors.values():
        raise error


def _offsets(located: Located, nodes: list[Node], moment: float) -> dict[str, int]:
    """Where each node's log stood at `moment`; a node that does not answer is told of when its log is read."""
    from orchestrator.connect.fanout import fanout
    from orchestrator.logs import offset_since

    def one(node: Node) -> int:
        index = located.backend.read_file(located.found, node, "log.index")
        return offset_since(index.decode("ascii", "replace"), moment)

    answers = fanout(nodes, one, deadline=60, what="find the place in the log")
    return {name: answer for name, answer in answers.items() if isinstance(answer, int)}


def _tell(node: str, event: str, error: Exception | None) -> None:
    if event == "reconnecting":
        notify(node, f"connection dropped ({error}); reconnecting")
    elif event == "reconnected":
        notify(node, "connection is back; no line was lost")


def run_inside(located: Located, node: str | None, command: list[str] | None) -> None:
    """`command` in the containers of the run: interactive on one node of a terminal, else on all with a prefix."""
    from orchestrator.errors import UsageError, unknown

    names = [each.name for each in located.nodes]
    if not command:
        raise UsageError("no command", hint="for example: orch exec -- nvidia-smi, or orch exec --node n1 -- bash")
    if node and node not in names:
        raise UsageError(unknown("node", node, names))
    run = located.found.run
    if run.state.is_terminal:
        raise UsageError(
            f"{run.id} has ended ({run.state}), and its containers with it",
            hint=f"`orch logs {run.id}` shows what it printed, `orch pull {run.id}` brings its files here",
        )
    chosen = [each for each in located.nodes if node in (None, each.name)]
    if len(chosen) == 1 and sys.stdin.isatty() and sys.stdout.isatty():
        argv = located.backend.attach(located.found, chosen[0], command)
        raise typer.Exit(subprocess.run(argv, check=False).returncode)
    raise typer.Exit(_on_all(located, chosen, command))


def _on_all(located: Located, nodes: list[Node], command: list[str]) -> int:
    from orchestrator.connect.fanout import fanout
    from orchestrator.errors import OrchError

    def one(node: Node) -> tuple[int, str, str]:
        done = located.backend.execute(located.found, node, command)
        return done.returncode, done.stdout, done.stderr

    worst = 0
    for node, answer in fanout(nodes, one, deadline=3600, what="run the command").items():
        if isinstance(answer, OrchError):
            output.warn(str(answer))
            worst = max(worst, answer.exit_code)
            continue
        code, out, err = answer
        for text, stream in ((out, sys.stdout), (err, sys.stderr)):
            for line in text.splitlines():
                print(f"{output.style(f'{node}', 'cyan', stream)} {output.printable(line)}", file=stream)
        worst = max(worst, code)
    return worst
