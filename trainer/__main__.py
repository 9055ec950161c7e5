"""`python -m trainer run --config RECIPE [key=value …] [--dry_run]`, `plan`, `prepare`, `merge`: parsing, exit codes.

Exit codes: 0 done · 1 failed · 2 wrong configuration · 75 stopped after a checkpoint, resume possible.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from trainer import config as configuration
from trainer.context import Context, Folders, Outcome
from trainer.distributed.env import RankEnv
from trainer.distributed.layout import layout_for
from trainer.errors import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, ConfigError, TrainerError
from trainer.events import Events
from trainer.stop import StopRequest

TOOLS = {
    "plan": ("trainer.plan", "what a recipe needs on a cluster: memory by part, FLOPs, time; no GPU"),
    "prepare": ("trainer.data.prepare", "text, JSONL or a data set → MDS, as text or tokens"),
    "merge": ("trainer.models.merge", "a LoRA adapter and its base → a plain model folder"),
}
"""The commands that run as one process without ranks: module with `add_arguments` and `run`, and what it does."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train as a recipe says, alone or as one rank under torchrun, srun, mpirun or deepspeed.",
        epilog="other commands (each has --help):\n"
        + "".join(f"  {name:<8} {text}\n" for name, (_, text) in TOOLS.items())
        + "\nkeys, with their defaults:\n"
        + configuration.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # not a subparser: those do not allow overrides and flags in any order
    parser.add_argument("command", choices=["run"])
    names = ", ".join(configuration.recipe_names())
    parser.add_argument(
        "--config", required=True, metavar="RECIPE", help=f"a recipe's name ({names}) or a YAML file"
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="try the recipe, tiny, on this CPU"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by old launchers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-3")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. Every failure has been reported on stderr and in the event stream when it returns."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in TOOLS:
        return _tool(argv[0], argv[1:])
    args = build_parser().parse_intermixed_args(argv)
    events: Events | None = None
    try:
        env = RankEnv.read(os.environ, args.local_rank)
        attempt = _attempt()
        if os.environ.get("ORCH_RUN_DIR"):  # known before the recipe is read, so that its errors are recorded
            events = Events(Folders.read(os.environ, "").run, env.rank, attempt)
        config = configuration.load(args.config, args.overrides)
        if args.dry_run:
            from trainer import dry_run

            dry_run.run(config)
            return EXIT_OK
        configuration.check_world(config, layout_for(config, env.world_size, env.local_world_size))
        folders = Folders.read(os.environ, config.name)
        events = events or Events(folders.run, env.rank, attempt)
        outcome = _run(env, config, folders, events)
    except Exception as error:
        _report(error, events)
        return error.exit_code if isinstance(error, TrainerError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return EXIT_PREEMPTED if outcome.status == "preempted" else EXIT_OK


def _tool(name: str, argv: Sequence[str]) -> int:
    module_name, text = TOOLS[name]
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(prog=f"python -m trainer {name}", description=text)
        module.add_arguments(parser)
        return module.run(parser.parse_intermixed_args(argv))
    except Exception as error:
        _report(error, None)
        return error.exit_code if isinstance(error, TrainerError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(env: RankEnv, config: configuration.Config, folders: Folders, events: Events) -> Outcome:
    if env.is_main:
        (folders.run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    events.heartbeats(config.log.heartbeat)
    stop = StopRequest(folders.run)
    stop.listen()
    task = importlib.import_module(f"trainer.tasks.{config.task}")
    outcome = task.run(Context(env, config, folders, events, stop))
    events.emit("end", status=outcome.status)
    events.close()
    return outcome


def _attempt() -> int:
    text = os.environ.get("ORCH_ATTEMPT", "1")
    if not text.isdigit():
        raise ConfigError(f"ORCH_ATTEMPT is {text!r}, not a number")
    return int(text)


def _report(error: Exception, events: Events | None) -> None:
    """One line and a hint for what a user can mend; the traceback for the rest."""
    if events is not None:
        events.error(error)
        events.emit("end", status="failed")
        events.close()
    if not isinstance(error, TrainerError):  # its event has the traceback of any error
        traceback.print_exception(error)
    if isinstance(error, TrainerError):
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # No destructors: after a failure those of the process group may wait for the other ranks, or abort
    # and replace the exit code.
    os._exit(code)
