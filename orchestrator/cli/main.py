"""The frame of `orch`: the table of commands, the global options and the one place that catches errors.

A command's module is imported only when that command runs, completes or shows its own help, so `orch --help`
costs little more than the interpreter. The table below is therefore the only place that names every command:
`name → (section, "module:attribute", one line of help)`. The attribute is a function with typer annotations
(it may carry a `context_settings` dict) or a `typer.Typer` for a group of commands.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from orchestrator.cli.state import reset, state

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str, str]] = {
    "sim": ("Set up", "orchestrator.cli.sim:app", "A simulated cluster on this machine: up, down, status."),
    "registry": ("Set up", "orchestrator.cli.sim:registry_app", "A local image registry: up, down."),
    "nodes": ("Set up", "orchestrator.cli.nodes:app", "The machines: list, check, trust, exec."),
    "build": ("Run", "orchestrator.cli.build:build", "Build the job's image and push it."),
    "deploy": ("Run", "orchestrator.cli.deploy:deploy", "Start the job on the nodes and follow it."),
    "stop": ("Run", "orchestrator.cli.runs:stop", "Stop a run; our trainer saves a checkpoint first."),
    "ps": ("Look", "orchestrator.cli.runs:ps", "Runs that the nodes say are going on now."),
    "runs": ("Look", "orchestrator.cli.runs:runs", "History of runs, newest first."),
    "status": ("Look", "orchestrator.cli.runs:status", "One run: state of each node, progress, checkpoints."),
    "logs": ("Look", "orchestrator.cli.runs:logs", "Output of every rank, merged; -f follows."),
    "why": ("Look", "orchestrator.cli.runs:why", "Why a run failed: first node, rank, exception, remedy."),
    "exec": ("Look", "orchestrator.cli.runs:exec", "Run a command inside a run's containers."),
    "pull": ("Keep", "orchestrator.cli.runs:pull", "Bring a run's logs and checkpoints home."),
    "prune": ("Keep", "orchestrator.cli.runs:prune", "Remove old runs' folders from the nodes; checkpoints stay."),
}

HELP = """Takes a training job from this machine to N machines that have only sshd and Docker.

`orch build && orch deploy --nodes 4 --gpus 8` is the whole use: one image, one torchrun container per node,
every rank's output in this terminal. RUN may be left out (the latest) or shortened to a unique prefix."""

EPILOG = """New here? In a checkout of orch this trains a small model on two simulated nodes:

\b
  orch sim up && orch build && orch deploy --nodes 2 --gpus 0 --procs 2 --recipe demo

Exit codes: 0 done; 1 the job failed (127: its command is not in the image); 2 wrong usage or configuration;
3 nodes or registry unreachable; 4 preflight or lease refused; 75 preempted, resume possible; 130/143 interrupted."""


class LazyGroup(TyperGroup):
    """A group whose commands live in `COMMANDS` and are imported one at a time."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        if cmd_name not in self.commands and cmd_name in COMMANDS:
            self.commands[cmd_name] = load(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from orchestrator.errors import UsageError, unknown

            raise UsageError(unknown("command", name, list(COMMANDS)), hint="`orch --help` explains each of them")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        for section in dict.fromkeys(row[0] for row in COMMANDS.values()):
            with formatter.section(section):
                formatter.write_dl([(name, row[2]) for name, row in COMMANDS.items() if row[0] == section])

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> list[Any]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        from orchestrator.cli.complete import items

        return items((name, row[2]) for name, row in COMMANDS.items() if name.startswith(incomplete))


def load(name: str) -> Any:
    """The command `name` as a click object, its module imported now; accepts the global options too."""
    module, _, attribute = COMMANDS[name][1].partition(":")
    found = getattr(import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name, context_settings=getattr(found, "context_settings", None))(found)
        found = app
    found.rich_markup_mode = None  # click's plain help: rich would cost its import at every --help
    found._add_completion = False
    command = typer.main.get_command(found)
    command.name = name
    _accept_globals(command)
    _plain_arguments(command)
    return command


def _accept_globals(command: Any) -> None:
    """Lets `--config`, `--inventory` and `--debug` stand after the command's name as well."""
    if isinstance(command, TyperGroup):
        for child in command.commands.values():
            _accept_globals(child)
    taken = {name for param in command.params for name in param.opts}
    shared = typer.Typer(add_completion=False, rich_markup_mode=None)
    shared.command()(_globals)
    for param in typer.main.get_command(shared).params:
        if not taken & set(param.opts):
            param.expose_value = False
            command.params.append(param)


def _plain_arguments(command: Any) -> None:
    """Shows arguments as their metavar spells them: typer would add braces and Python types (`<list[str]>`)."""
    for child in getattr(command, "commands", {}).values():
        _plain_arguments(child)
    for param in command.params:
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: None
            param.get_usage_pieces = lambda ctx, param=param: [param.display_name_raw]


def _set_config(value: str | None) -> str | None:
    if value:
        state().config_path = value
    return value


def _set_inventory(value: str | None) -> str | None:
    if value:
        state().inventory_path = value
    return value


def _set_debug(value: bool) -> bool:
    if value:
        state().debug = True
    return value


Config = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="orch.yaml to use instead of the nearest one.", callback=_set_config),
]
Inventory = Annotated[
    str | None,
    typer.Option(
        "--inventory", metavar="FILE", help="Inventory or hostfile instead of the target's.", callback=_set_inventory
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", callback=_set_debug)]


def _globals(config: Config = None, inventory: Inventory = None, debug: Debug = False) -> None:
    """Only carries the three global options' declarations."""


def _version(value: bool) -> None:
    if value:
        from orchestrator import __version__

        print(f"orch {__version__}")
        raise typer.Exit


def _root(
    config: Config = None,
    inventory: Inventory = None,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    from orchestrator.cli.output import route_warnings

    route_warnings()


def app() -> Any:
    """The whole command line as a click object."""
    frame = typer.Typer(
        name="orch",
        cls=LazyGroup,
        callback=_root,
        help=HELP,
        epilog=EPILOG,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110},
    )
    return typer.main.get_command(frame)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command line and exits with its code; the only place that catches `OrchError`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    gc.set_threshold(100_000)  # importing makes many objects and no garbage: collecting costs 20-70 ms of a start
    reset(argv)
    if "_ORCH_COMPLETE" in os.environ:
        from orchestrator.cli.complete import answer

        answer(app())
    sys.exit(_finish(_run(argv)))


def _run(argv: list[str]) -> int:
    command = app()
    try:
        # not command.main(): it swallows every broken pipe, a node's connection included
        with command.make_context("orch", argv or ["--help"]) as context:
            command.invoke(context)
        return 0
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return 130
    except typer.Abort:
        return 130
    except Exception as error:  # the one catch point of the program
        return _report(error)


def _report(error: Exception) -> int:
    from orchestrator.cli import output
    from orchestrator.errors import OrchError

    if isinstance(error, BrokenPipeError) and error.filename is None and output.stdout_is_broken():
        return 141  # what a shell reports for a program ended by SIGPIPE
    if state().debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OrchError):
        output.print_error(error)
        return error.exit_code
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's errors share no public class
        output.print_usage_error(error)
        return error.exit_code
    output.print_internal_error(error, debug=state().debug)
    return 1


def _finish(code: int) -> int:
    """Flushes what is left; a reader that has gone away (`orch runs | head -1`) is not an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        from orchestrator.cli.output import discard_stdout

        discard_stdout()
        return code or 141
    return code
