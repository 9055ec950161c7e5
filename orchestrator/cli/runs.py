"""Commands on runs: ps, runs, status, logs, stop, why, exec, pull, prune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.state import state

if TYPE_CHECKING:
    from orchestrator.workflows.locate import Located


def _locate(run: str | None, on: str | None = None) -> Located:
    from orchestrator.workflows.locate import locate

    there = state()
    return locate(run, there.config(), there.history(), there.target(on), there.inventory)


def ps(on: options.On = None, json: options.Json = False) -> None:
    """Runs that the nodes say are going on now.

    Asks the nodes themselves, so it shows what any operator has started, also with an empty history.
    """
    from orchestrator.workflows.runs import running

    found, errors = running(state().config(), state().target(on), state().inventory)
    for error in errors.values():
        output.warn(str(error))
    if json:
        output.emit_json([each.run.to_json() | {"operator": each.operator} for each in found])
    elif found:
        rows = [
            (each.run.id, each.run.state.value, ",".join(each.run.nodes), output.ago(each.run.started), each.operator)
            for each in found
        ]
        output.table(("RUN", "STATE", "NODES", "STARTED", "OPERATOR"), rows)
    else:
        output.say("no run is going on")
    if errors:
        raise typer.Exit(max(error.exit_code for error in errors.values()))


def runs(
    json: options.Json = False,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", help="How many, newest first.")] = 30,
) -> None:
    """History of runs, newest first.

    It is kept on this machine only; `orch ps` asks the nodes.
    """
    records = state().history().list(limit)
    if json:
        output.emit_json([record.run.to_json() for record in records])
        return
    if not records:
        output.say("no runs yet: `orch deploy` starts one")
        return
    rows = []
    for record in records:
        run = record.run
        took = output.duration(run.ended - run.started) if run.ended else "-"
        rows.append((run.id, run.state.value, run.exit_code, ",".join(run.nodes), output.ago(run.started), took))
    output.table(("RUN", "STATE", "EXIT", "NODES", "STARTED", "TOOK"), rows, right=("EXIT",))


def status(run: options.RunId = None, on: options.On = None, json: options.Json = False) -> None:
    """One run: state of each node, progress, checkpoints.

    Asks the nodes of the run, so it is true also after this machine was away.
    """
    from orchestrator.workflows.runs import inspect

    view = inspect(_locate(run, on), state().history())
    if json:
        output.emit_json(view.to_json())
        return
    head = view.run
    took = output.duration((head.ended or view.now) - head.started)
    colour = output.STATE_COLOURS[head.state.value]
    print(
        f"{output.style(head.id, 'bold')} {output.style(head.state.value, colour)} "
        f"({took}, {head.backend}, attempt {head.attempt})"
    )
    if view.progress:
        print(f"  {view.progress}")
    for place in view.checkpoints:
        print(f"  checkpoint {place}")
    output.table(("NODE", "STATE", "EXIT", "DETAIL"), [row.cells() for row in view.nodes], right=("EXIT",))


def logs(
    run: options.RunId = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends; Ctrl-C leaves it alone.")
    ] = False,
    node: options.NodeName = None,
    rank: Annotated[
        str | None, typer.Option("--rank", metavar="RANKS", help="Global ranks: 0 or 0,4-7; - is the launcher.")
    ] = None,
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="10m, 2h, or 2026-01-31T12:00.")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Show lines that several ranks share once.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Leave control sequences in the text.")] = False,
    on: options.On = None,
) -> None:
    """Output of every rank, merged, each line with its node/rank.

    It shows the same lines that `orch deploy` showed, from the nodes' own files, during the run and after it. A
    dropped connection is opened again where it broke: no line is lost or repeated.

    \b
    orch logs -f                 picks up the latest run
    orch logs --rank 0 | less
    orch logs --rank -           what the launchers and torchrun said
    orch logs --since 10m --fold
    """
    from orchestrator.cli.logs import show

    show(_locate(run, on), follow=follow, node=node, rank=rank, since=since, fold=fold, raw=raw)


def stop(
    run: options.RunId = None,
    kill: Annotated[bool, typer.Option("--kill", help="Kill the ranks at once, without a checkpoint.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait for the end.")] = 180,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask only.")] = False,
    on: options.On = None,
    json: options.Json = False,
) -> None:
    """Stop a run; our trainer saves a checkpoint first.

    Our trainer ends the step, all ranks agree, and it exits with 75 (preempted): `orch deploy --resume RUN` goes on.
    A command of yours gets SIGTERM, run.grace seconds later SIGKILL. Works from any machine with the same inventory.
    """
    from orchestrator.workflows.runs import stop_run

    asked: list[str] = []

    def tell(text: str) -> None:
        asked.append(text)
        output.say(text)

    ended = stop_run(_locate(run, on), state().history(), kill=kill, wait=0 if no_wait else timeout, notify=tell)
    if json:
        output.emit_json(ended.to_json())
    else:
        code = "" if ended.exit_code is None else f" (exit code {ended.exit_code})"
        output.say(f"{ended.id} {'' if asked else 'has already ended: '}{ended.state}{code}")


def why(run: options.RunId = None, on: options.On = None, json: options.Json = False) -> None:
    """Why a run failed: first node, rank and exception, its last lines, and what to do next.

    When one rank dies the others lose their partner and fail too. Those that only complain of a closed connection
    are told apart; of the rest the earliest counts, by clocks that are corrected for their difference.
    """
    import sys

    from orchestrator.cli.follow import show_cause
    from orchestrator.workflows.runs import explain

    run_now, cause = explain(_locate(run, on), state().history())
    if json:
        output.emit_json(cause.to_json() if cause else None)
        return
    took = output.duration((run_now.ended or run_now.started) - run_now.started)
    print(f"{output.style(run_now.id, 'bold')} {run_now.state} after {took}")
    if cause:
        show_cause(cause, sys.stdout)
        for victim in cause.victims[1:]:
            print(f"              {output.printable(victim)[:110]}")
    else:
        print("  nothing failed")


def exec(  # noqa: A001: the command's name
    words: Annotated[list[str], typer.Argument(metavar="[RUN] -- COMMAND…", help="What to run beside the job.")],
    node: options.NodeName = None,
    on: options.On = None,
) -> None:
    """Run a command inside a run's containers, beside the job.

    On all its nodes, each line prefixed with the node. With --node and a terminal it is interactive.

    \b
    orch exec -- nvidia-smi
    orch exec --node n1 -- bash
    """
    from orchestrator.cli.logs import run_inside

    command = list(state().command or ())
    rest = words[: len(words) - len(command)] if command else words
    run_inside(_locate(rest[0] if rest else None, on), node, command or None)


exec.context_settings = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def pull(
    run: options.RunId = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="latest|all|STEP", help="Bring checkpoints too.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FOLDER", help="Where to; ./runs/RUN when left out.")
    ] = None,
    on: options.On = None,
    json: options.Json = False,
) -> None:
    """Bring a run's logs and checkpoints home.

    Without --checkpoint: log, events, TensorBoard files, result of every node. What is already here whole is replaced
    only when all of it has arrived.
    """
    from pathlib import Path

    from orchestrator.workflows.pull import pull_run

    located = _locate(run, on)
    target = Path(to) if to else Path("runs") / located.found.run.id
    got = pull_run(located, target, checkpoint, notify=output.node_line)
    if json:
        output.emit_json({"run": located.found.run.id, "folder": str(target), "files": got.files, "bytes": got.bytes})
    else:
        output.say(f"{got.files} files, {output.size(got.bytes)} in {target}")


def prune(
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", help="How many of the newest ended runs keep their folders.")
    ] = 10,
    on: options.On = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: options.Yes = False,
) -> None:
    """Remove the folders of old, ended runs from the nodes.

    Checkpoints, live runs and this machine's history stay. Says what would go and asks first.
    """
    from orchestrator.workflows.runs import prunable, prune_runs

    backend, nodes, found = prunable(state().config(), state().target(on), state().inventory, keep)
    for each in found:
        what = f"{each.run.id} ({each.run.state}, {output.ago(each.run.started)})"
        output.say(f"{'would remove' if dry_run else 'remove'} {what}")
    if dry_run or not found:
        output.say("nothing to remove" if not found else f"{len(found)} runs")
        return
    if not yes and not output.confirm(f"remove {len(found)} runs from {len(nodes)} nodes?"):
        raise typer.Exit(0)
    for node, error in prune_runs(backend, nodes, found).items():
        output.warn(f"{node}: {error.message}")
    output.say(f"{len(found)} runs removed")
