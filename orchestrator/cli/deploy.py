"""`orch deploy`: from the command line to a followed run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.state import state

if TYPE_CHECKING:
    from orchestrator.backends.base import Backend, Plan
    from orchestrator.image import BuildPlan
    from orchestrator.runs import Record
    from orchestrator.specs import ImageRef, JobSpec, Node
    from orchestrator.workflows.signals import Signals


def deploy(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND…]",
            help="Instead of a recipe: what follows torchrun's own options, train.py --lr 1e-4 or -m pkg …",
        ),
    ] = None,
    on: options.On = None,
    nodes: options.Nodes = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", help="GPUs per node, else the target's or inventory's; 0: CPU."),
    ] = None,
    procs: Annotated[
        int | None, typer.Option("--procs", metavar="N", help="Processes per node; one per GPU when left out.")
    ] = None,
    recipe: options.Recipe = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeatable.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the run; the next one of that --name resumes from it."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Go on from that run's checkpoints, with its command and nodes."),
    ] = None,
    launcher: Annotated[
        str | None, typer.Option("--launcher", metavar="torchrun|none", help="none: run COMMAND once per node.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="Set it in the job's environment; repeatable."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when all nodes have started.")] = False,
    no_build: Annotated[bool, typer.Option("--no-build", help="Refuse if the image is not built yet.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; contact nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Start the job on the nodes and follow it.

    Builds and pushes the image if it has changed, checks every node, pulls, and starts one torchrun container per
    node: all or none. Every line is prefixed with node/rank. Closing this terminal leaves the run alone; Ctrl-C
    stops it after 3 seconds, a second Ctrl-C within them only detaches.

    \b
    orch deploy --nodes 4 --gpus 8 --recipe demo                   our trainer
    orch deploy --nodes gpu1,gpu3 --gpus 8 -- train.py --lr 1e-4   your script, as after `torchrun`
    orch deploy --nodes 2 --launcher none -- bash prepare.sh       a command once per node
    orch deploy --name 8b --gpus 8                                 resumes the last run of that name
    orch deploy --resume 8b-20260131-1                             the same job again, from its checkpoint
    orch deploy --on sim --dry-run                                 what would be run, to read or to paste
    """
    from orchestrator.workflows import backends
    from orchestrator.workflows.signals import Signals

    command = tuple(state().command or words or ())
    before = state().history().find(resume) if resume else None
    spec, target, inventory = _spec(
        before,
        command=command,
        on=on,
        nodes=nodes,
        gpus=gpus,
        procs=procs,
        recipe=recipe,
        sets=sets or [],
        name=name,
        launcher=launcher,
        env=env or [],
        dry_run=dry_run,
    )
    backend = backends.make(spec.backend, state().config(), spec.nodes, connect=not dry_run)  # while files are hashed
    image, contents = _content(spec, target)
    spec = replace(spec, image=image)
    if dry_run:
        _show_plan(backend.plan(spec), json)
        return
    with Signals() as signals:
        _deploy(backend, spec, target, inventory, contents, signals, detach=detach, json=json, build=not no_build)


def _spec(
    before: Record | None,
    *,
    command: tuple[str, ...],
    on: str | None,
    nodes: str | None,
    gpus: int | None,
    procs: int | None,
    recipe: str | None,
    sets: list[str],
    name: str | None,
    launcher: str | None,
    env: list[str],
    dry_run: bool,
) -> tuple[JobSpec, str, str]:
    """The job without its image, the target's name and the inventory's path."""
    from orchestrator.config import job_name, job_spec
    from orchestrator.specs import Secret, new_run_id

    config = state().config()
    target = state().target(on or (before.target if before and before.target else None))
    if nodes is None and before and target.backend != "local":
        nodes = ",".join(before.run.nodes)
    chosen, inventory = _nodes(target, nodes)
    run_name = name or (before.run.name if before else None)
    again = before is not None and not (command or recipe or sets)
    if again:
        command = tuple(before.spec.get("command", ()))
    base = job_name(config, run_name)
    masked = {each: Secret("***") for each in config.run.secrets} if dry_run else None
    spec = job_spec(
        config,
        run_id=f"{base}-DRYRUN" if dry_run else new_run_id(base),
        operator=state().operator(),
        target=target,
        nodes=chosen,
        recipe=recipe,
        command=command,
        sets=sets,
        name=run_name,
        gpus=gpus if gpus is not None or not before else before.spec.get("gpus"),
        procs=procs if procs is not None or not before else before.spec.get("procs"),
        launcher=launcher or (before.spec.get("launcher") if before else None),
        attempt=before.run.attempt + 1 if before else 1,
        env=_environment(env),
        secrets=masked,
    )
    series = before.spec.get("series", "") if before else ""
    spec = replace(spec, series=(base if name else series) or spec.run_id)
    if before and again:
        spec = replace(spec, stop=before.spec.get("stop", spec.stop))
    return spec, target.name, inventory


def _environment(words: list[str]) -> dict[str, str]:
    """`NAME=VALUE` words; a bare NAME takes the operator's own value."""
    import os

    from orchestrator.errors import UsageError

    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and key not in os.environ:
            raise UsageError(f"--env {word!r} is not of the form NAME=VALUE, and {word} is not set here")
        values[key] = value if equals else os.environ[key]
    return values


def _nodes(target, nodes: str | None) -> tuple[tuple[Node, ...], str]:
    from orchestrator.errors import UsageError

    if target.backend == "local":
        from orchestrator.backends.local import local_node

        if nodes not in (None, "1"):
            raise UsageError(f"--nodes {nodes}: the local backend has one node, this machine", hint="leave --nodes out")
        return (local_node(target.gpus),), ""
    inventory = state().inventory(target)
    return inventory.select(nodes), str(inventory.path)


def _content(spec: JobSpec, target: str) -> tuple[ImageRef | None, BuildPlan | None]:
    """The image by the hash of what goes in, and what would be built for it; contacts nothing."""
    if spec.backend == "local":
        return None, None
    from orchestrator.workflows.build import build_plan, content_ref

    config = state().config()
    if config.image.ref:
        return content_ref(config), None
    plan = build_plan(config, state().target(target))
    return plan.image, plan


def _deploy(
    backend: Backend,
    spec: JobSpec,
    target: str,
    inventory: str,
    contents: BuildPlan | None,
    signals: Signals,
    *,
    detach: bool,
    json: bool,
    build: bool,
) -> None:
    from orchestrator.cli.follow import finish, follow
    from orchestrator.workflows import deploy as workflow

    _announce(spec, target)
    if spec.image:
        from orchestrator.workflows.build import ensure_image

        config, chosen = state().config(), state().target(target)
        pinned = ensure_image(config, build=build, target=chosen, plan=contents, report=output.say)
        spec = replace(spec, image=pinned)
    phases = _Phases(spec.nodes)
    found = workflow.start(
        backend,
        backend.plan(spec),
        state().history(),
        phases,
        target=target,
        inventory=inventory,
        on_started=signals.hold,
    )
    output.say(f"{found.run.id} started on {', '.join(found.run.nodes)}")
    if detach:
        if json:
            output.emit_json(found.run.to_json())
        else:
            print(found.run.id)
        return
    ended = follow(backend, found, spec.nodes, world=spec.world_size, signals=signals, to_stderr=json)
    finish(ended, backend, spec.nodes, spec.storage, spec.series, json=json)


def _announce(spec: JobSpec, target: str) -> None:
    """Target, nodes and image in one line, before anything starts."""
    shape = (
        f"{len(spec.nodes)} × {spec.gpus} GPUs" if spec.gpus else f"{len(spec.nodes)} × {spec.procs} processes (CPU)"
    )
    names = ", ".join(node.name for node in spec.nodes)
    image = spec.image.tagged if spec.image else "no image"
    output.say(f"deploying {spec.run_id} to {target} ({names}; {shape}) with {image}")


class _Phases:
    """The phases of a start, one line each however many nodes there are; what concerns one node is told of it."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._names = ", ".join(node.name for node in nodes)
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, node: str, text: str) -> None:
        with self._lock:
            first = text not in self._told
            self._told.add(text)
        if not node:
            output.say(text)
        elif text.startswith("not "):
            output.node_line(node, text)
        elif first:
            output.say(f"{text} ({self._names})")


def _show_plan(plan: Plan, json: bool) -> None:
    """The plan as commands that can be pasted; environment with secrets masked."""
    if json:
        output.emit_json(
            {
                "run": plan.spec.run_id,
                "image": plan.spec.image.tagged if plan.spec.image else None,
                "nodes": [
                    {
                        "node": each.node.name,
                        "job": dict(each.job),
                        "secrets": sorted(plan.spec.secrets),
                        "steps": [
                            {"title": step.title, "command": step.command, "stdin": step.stdin} for step in each.steps
                        ],
                    }
                    for each in plan.nodes
                ],
            }
        )
        return
    spec = plan.spec
    print(f"# image {spec.image.tagged if spec.image else 'none (local backend)'}")
    for each in plan.nodes:
        print(f"\n# ---- {each.node.name} ({each.node.address}), rank group {each.index} of {len(plan.nodes)}")
        torchrun = " ".join(_shown(each.job["torchrun"]))
        print(f"# runs: {'torchrun ' + torchrun + ' ' if torchrun else ''}{' '.join(_shown(each.job['command']))}")
        for key, value in each.job["env"].items():
            print(f"# env:  {key}={' '.join(_shown([value]))}")
        for key in sorted(spec.secrets):
            print(f"# env:  {key}=***")
        for step in each.steps:
            source = f" < {step.stdin}" if step.stdin else ""
            print(f"\n# {step.title}{source}\n{step.command.rstrip()}")


def _shown(words) -> list[str]:
    from orchestrator.commands.shell import quote

    return [quote(word) for word in words]
