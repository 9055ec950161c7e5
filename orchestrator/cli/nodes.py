"""`orch nodes`: the inventory, whether its machines are fit, their host keys, and a command on all of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import complete, output
from orchestrator.cli.options import Json, Nodes, On, Yes
from orchestrator.cli.state import state

if TYPE_CHECKING:
    from orchestrator.connect.base import Completed
    from orchestrator.connect.known_hosts import HostKey
    from orchestrator.connect.ssh import SshConnector
    from orchestrator.errors import OrchError
    from orchestrator.inventory import Inventory
    from orchestrator.specs import Node
    from orchestrator.workflows.nodes import NodeReport

app = typer.Typer(
    no_args_is_help=True,
    help="The machines of the inventory. NODES are names, groups, globs (gpu*), ranges (gpu[1-4]) or labels "
    "(rack=a), joined by commas or spaces; all nodes when left out.",
)

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NODES]…", help="Which nodes; all when left out.", autocompletion=complete.nodes),
]

_SCAN_S = 15.0
_SLACK_S = 20.0


@app.command("list")
def list_nodes(names: Names = None, on: On = None, json: Json = False) -> None:
    """Show the inventory; contacts no node."""
    inventory, nodes = _choose(names, on)
    if json:
        output.emit_json([_to_json(node, inventory) for node in nodes])
        return
    rows = []
    for node in nodes:
        row = _to_json(node, inventory)
        labels = ",".join(f"{key}={value}" for key, value in row["labels"].items())
        where = f"{node.user}@{node.address}" if node.user else node.address
        where += f":{node.port}" if node.port != 22 else ""
        private = node.private if node.private != node.address else None
        rows.append((node.name, where, private, node.jump, node.gpus, ",".join(row["groups"]) or None, labels or None))
    output.table(("NODE", "ADDRESS", "PRIVATE", "JUMP", "GPUS", "GROUPS", "LABELS"), rows, right=("GPUS",))


@app.command()
def check(
    names: Names = None,
    on: On = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", help="GPUs that each node must have, instead of the inventory's.", min=0),
    ] = None,
    json: Json = False,
) -> None:
    """Ask the nodes what a deploy needs of them.

    That is: engine, GPUs, stray GPU processes, disk, clock, a free port, the way to the head. Changes nothing on
    the nodes. Exit code 4 if one is not fit, 3 if one does not answer.
    """
    from orchestrator.workflows import nodes as workflow

    inventory, nodes = _choose(names, on)
    config = state().config()
    target = None if state().inventory_path else state().target(on)
    wanted = gpus if gpus is not None or target is None else target.gpus
    connector = _connector(inventory)
    try:
        reports = workflow.check(
            nodes,
            connector,
            storage=config.storage_spec(),
            gpus=wanted,
            port=config.run.port,
            mounts=[mount.source for mount in config.run.mounts],
        )
    finally:
        connector.close()
    if json:
        output.emit_json([report.to_json() for report in reports])
    else:
        _show_reports(reports)
    code = max((report.exit_code for report in reports), default=0)
    if code:
        raise typer.Exit(code)


def _show_reports(reports: Sequence[NodeReport]) -> None:
    rows = []
    for report in reports:
        row = report.to_json()
        disk = None if row["disk_gb"] is None else f"{row['disk_gb']:g} GB"
        memory = None if row["memory_gb"] is None else f"{row['memory_gb']:g} GB"
        verdict = "ok" if report.ok else "no answer" if report.error else "not fit"
        rows.append((row["node"], verdict, row["engine"], row["gpus"], row["cpus"], memory, disk, row["run"]))
    headers = ("NODE", "STATUS", "ENGINE", "GPUS", "CPUS", "MEMORY", "DISK FREE", "RUN")
    output.table(headers, rows, right=("GPUS", "CPUS", "MEMORY", "DISK FREE"))
    for report in reports:
        for problem in (report.error, *report.problems):
            if problem is not None:
                output.node_line(report.node.name, problem.message)
                if problem.hint:
                    output.node_line(report.node.name, f"hint: {problem.hint}")


@app.command()
def trust(
    names: Names = None,
    on: On = None,
    yes: Yes = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also pin a key that differs from the pinned one (a reinstalled machine).")
    ] = False,
    json: Json = False,
) -> None:
    """Show the nodes' host keys and pin them.

    They are written to known_hosts once you say that they are right. Compare the fingerprints with `ssh-keygen -lf
    /etc/ssh/ssh_host_ed25519_key.pub` on the machine's own console. A machine whose key is not pinned, or has
    changed, is never connected to.
    """
    from orchestrator.connect.fanout import fanout
    from orchestrator.errors import OrchError, UsageError

    inventory, nodes = _choose(names, on)
    connector = _connector(inventory)
    try:
        found = fanout(
            nodes,
            lambda node: connector.scan(node, timeout=_SCAN_S),
            deadline=_SCAN_S + _SLACK_S,
            what="read host keys",
        )
        errors = {name: keys for name, keys in found.items() if isinstance(keys, OrchError)}
        scanned = {node: found[node.name] for node in nodes if node.name not in errors}
        news = {node: _unpinned(connector, node, keys) for node, keys in scanned.items()}
        for node, keys in news.items():
            for key, note in keys:
                output.node_line(node.name, f"{key}{note}")
            if not keys:
                output.node_line(node.name, "already pinned")
        wanted = [node for node in news if news[node]]
        if wanted and not yes and not output.confirm(f"Pin these keys for {_fold(node.name for node in wanted)}?"):
            raise UsageError("nothing was pinned", hint="compare the fingerprints, then answer y or give --yes")
        rows = []
        for node in news:
            try:
                added = connector.trust(node, scanned[node], replace=replace) if news[node] else []
                rows.append({"node": node.name, "pinned": [{"type": k.type, "key": k.fingerprint} for k in added]})
            except OrchError as error:
                errors[node.name] = error.on(node.name)
    finally:
        connector.close()
    if json:
        output.emit_json(rows)
    _raise(errors, len(nodes), "host keys are not pinned")


def _unpinned(connector: SshConnector, node: Node, keys: Sequence[HostKey]) -> list[tuple[HostKey, str]]:
    """The keys that known_hosts does not hold for the node, each with a word on what it holds instead."""
    from orchestrator.connect import known_hosts

    endpoint = connector.endpoint(node)
    pinned = [entry.key for entry in known_hosts.lookup(endpoint.alias, endpoint.known_hosts) if not entry.marker]
    kinds = {key.type for key in pinned}
    return [(key, "  CHANGED" if key.type in kinds else "  new") for key in keys if key not in pinned]


@app.command("exec", context_settings={"allow_interspersed_args": False})
def execute(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND…", help="What to run; one word alone is a line for the shell.")
    ],
    nodes: Nodes = None,
    on: On = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="For the command on a node.")] = 60.0,
    json: Json = False,
) -> None:
    """Run a command on all nodes at once.

    Several words are run exactly as they are; one word alone is a line for the node's shell, so it may hold pipes.
    Nodes with the same output are shown once. Ends with the worst exit code.

    \b
    orch nodes exec --nodes gpu[1-4] -- nvidia-smi -L
    orch nodes exec 'df -h / | tail -1'
    """
    from orchestrator.commands import shell
    from orchestrator.connect.fanout import fanout
    from orchestrator.errors import OrchError

    inventory, chosen = _choose([nodes] if nodes else None, on)
    line = command[0] if len(command) == 1 else shell.join(command)
    connector = _connector(inventory)
    try:
        answers = fanout(
            chosen,
            lambda node: connector.connect(node).run(line, timeout=timeout),
            deadline=timeout + _SLACK_S,
            what="run the command",
        )
    finally:
        connector.close()
    errors = {name: answer for name, answer in answers.items() if isinstance(answer, OrchError)}
    done = {name: answer for name, answer in answers.items() if name not in errors}
    if json:
        output.emit_json([_answer_json(name, answer) for name, answer in answers.items()])
    else:
        _show_answers(done)
    code = max((answer.returncode for answer in done.values()), default=0)
    if errors and (json or not code):
        _raise(errors, len(chosen), "the command could not be run")
    for name, error in errors.items():
        output.node_line(name, f"error: {error.message}")
    if code:
        raise typer.Exit(code)


def _show_answers(done: Mapping[str, Completed]) -> None:
    """Each different output once, prefixed with the nodes that gave it; stderr to stderr."""
    groups: dict[Completed, list[str]] = {}
    for name, answer in done.items():
        groups.setdefault(answer, []).append(name)
    labels = {answer: _fold(names) for answer, names in groups.items()}
    width = max((len(label) for label in labels.values()), default=0)
    for answer, label in labels.items():
        for text, stream in ((answer.stdout, sys.stdout), (answer.stderr, sys.stderr)):
            prefix = output.style(f"{label:<{width}}", "cyan", stream)
            for line in text.splitlines():
                print(f"{prefix} | {output.printable(line)}", file=stream)
            stream.flush()
        if answer.returncode:
            output.say(f"{label:<{width}} | exit code {answer.returncode}")


def _fold(names: Iterable[str]) -> str:
    """Node names as short as `--nodes` reads them back: n1 n2 n3 x → `n[1-3],x`.

    >>> _fold(["n1", "n2", "n3", "n7", "login"])
    'n[1-3,7],login'
    """
    families: dict[tuple[str, str, int], list[int]] = {}
    for name in names:
        found = re.match(r"(.*?)(\d+)(\D*)\Z", name)
        # zero-padded numbers make a family of their own for each width
        padded = len(found[2]) if found and found[2].startswith("0") else 0
        family = (found[1], found[3], padded) if found else (name, "", -1)
        families.setdefault(family, []).append(int(found[2]) if found else 0)
    parts = []
    for (head, tail, width), numbers in families.items():
        if width < 0:
            parts.append(head)
        elif len(numbers) == 1:
            parts.append(f"{head}{numbers[0]:0{width}d}{tail}")
        else:
            spans = ",".join(
                f"{first:0{width}d}" if first == last else f"{first:0{width}d}-{last:0{width}d}"
                for first, last in _spans(sorted(numbers))
            )
            parts.append(f"{head}[{spans}]{tail}")
    return ",".join(parts)


def _spans(numbers: Sequence[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans


def _choose(names: Sequence[str] | None, on: str | None) -> tuple[Inventory, tuple[Node, ...]]:
    inventory = state().inventory(on)
    return inventory, inventory.select(",".join(names) if names else None)


def _connector(inventory: Inventory) -> SshConnector:
    from orchestrator.connect.ssh import SshConnector

    return SshConnector({node.name: node for node in inventory.nodes})


def _raise(errors: Mapping[str, OrchError], total: int, message: str) -> None:
    from orchestrator.connect.fanout import raise_failures

    if errors:
        others = {f"{number}": None for number in range(total - len(errors))}  # only counted
        raise_failures({**errors, **others}, message)


def _to_json(node: Node, inventory: Inventory) -> dict[str, Any]:
    return {
        "name": node.name,
        "address": node.address,
        "private": node.private,
        "user": node.user,
        "port": node.port,
        "jump": node.jump,
        "gpus": node.gpus,
        "labels": dict(node.labels),
        "groups": [name for name, members in inventory.groups.items() if node.name in members],
    }


def _answer_json(name: str, answer: Completed | OrchError) -> dict[str, Any]:
    from orchestrator.errors import OrchError

    if isinstance(answer, OrchError):
        return {"node": name, "exit_code": None, "stdout": "", "stderr": "", "error": answer.message}
    return {
        "node": name,
        "exit_code": answer.returncode,
        "stdout": answer.stdout,
        "stderr": answer.stderr,
        "error": None,
    }
