"""`orch sim` and `orch registry`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Json

app = typer.Typer(help="A simulated cluster on this machine: real sshd, a real engine and a disk of its own per node.")
registry_app = typer.Typer(help="A local image registry, which the nodes reach through their SSH connections.")

Name = Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the cluster; its inventory bears it.")]


def _project() -> Path:
    """The folder of orch.yaml, or the working folder: where .orch/ and inventory/ lie."""
    from orchestrator.cli.state import state
    from orchestrator.files import find_config

    config = find_config(state().config_path)
    return config.parent if config else Path.cwd()


@app.command()
def up(
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="How many nodes: n1 … nN.")] = 2,
    name: Name = "sim",
    shared: Annotated[bool, typer.Option("--shared", help="Give all nodes one shared folder, /shared.")] = False,
    registry_port: Annotated[
        int, typer.Option("--registry-port", metavar="PORT", help="Registry on 127.0.0.1:PORT; 0 takes a free one.")
    ] = 5001,
) -> None:
    """Start the cluster, or bring it to this size and heal it; writes inventory/NAME.yaml.

    Needs a Docker engine: where none answers and apt and root are at hand, it is installed and started; else the
    error says what to install. Images that cannot be pulled are built from this machine's Debian packages. The
    cluster's own key and pinned host keys lie in .orch/NAME/. Safe to repeat.
    """
    from orchestrator.cli import output
    from orchestrator.sim import cluster

    made = cluster.up(nodes, name, _project(), shared, registry_port, output.say)
    output.say(f"cluster {name}: {', '.join(made.nodes)}; registry {made.registry}; inventory {_short(made.inventory)}")


@app.command()
def down(
    name: Name = "sim",
    keep_disks: Annotated[
        bool, typer.Option("--keep-disks", help="Keep the nodes' disks, the registry's images and the keys.")
    ] = False,
    images: Annotated[
        bool,
        typer.Option("--images", help="Also remove the images built here: nodes, bases, jobs, and the build cache."),
    ] = False,
    engine: Annotated[
        bool, typer.Option("--engine", help="Also stop the Docker engine, if `orch sim up` started it by hand.")
    ] = False,
) -> None:
    """Remove the cluster: containers, network, disks, keys, inventory, and its runs in the history.

    Nothing else is touched.
    """
    from orchestrator.cli import output
    from orchestrator.sim import cluster, image
    from orchestrator.sim import engine as local_engine

    if not keep_disks:
        _forget_runs(_project() / "inventory" / f"{name}.yaml")
    cluster.down(name, not keep_disks, _project(), output.say)
    if images and local_engine.answers():
        image.remove_images()
    if engine and not local_engine.stop_ours(say=output.say):
        output.say("no engine was started here by `orch sim up`: left alone")


def _forget_runs(inventory: Path) -> None:
    """The nodes go, and with them all that could be asked about their runs."""
    from orchestrator.cli.state import state

    history = state().history()
    for record in history.list():
        if record.inventory == str(inventory):
            history.delete(record.run.id)


@app.command()
def engine(
    stop: Annotated[bool, typer.Option("--stop", help="Stop it instead, if it was started here by hand.")] = False,
) -> None:
    """Make a Docker engine answer on this machine, with buildx and compose; `up` does this by itself.

    Prints the base image that jobs are built on.
    """
    from orchestrator.cli import output
    from orchestrator.sim import base, plugins
    from orchestrator.sim import engine as local_engine

    if stop:
        if not local_engine.stop_ours(say=output.say):
            output.say("no engine was started here: left alone")
        return
    local_engine.ensure_engine(output.say)
    plugins.ensure_plugins(output.say)
    print(base.ensure_base(base.JOB, output.say))


@app.command()
def status(name: Name = "sim", json: Json = False) -> None:
    """Each node: address, whether SSH and engine answer, the container's state."""
    from dataclasses import asdict

    from orchestrator.cli import output
    from orchestrator.sim import cluster

    rows = cluster.status(name, _project())
    if json:
        output.emit_json([asdict(row) for row in rows])
        return
    table = [(row.node, row.address, row.ssh, row.engine, row.state) for row in rows]
    output.table(("NODE", "ADDRESS", "SSH", "ENGINE", "STATE"), table)


@registry_app.command("up")
def registry_up(
    port: Annotated[int, typer.Option("--port", metavar="PORT", help="Where it listens, on 127.0.0.1.")] = 5001,
) -> None:
    """Start the registry; prints its address for image.repository in orch.yaml."""
    from orchestrator.cli import output
    from orchestrator.sim import registry

    print(registry.up(port, output.say))


@registry_app.command("down")
def registry_down(
    images: Annotated[bool, typer.Option("--images", help="Also remove the images that were pushed to it.")] = False,
) -> None:
    """Stop and remove the registry; its images stay for the next time."""
    from orchestrator.cli import output
    from orchestrator.sim import registry

    registry.down(images, output.say)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
