"""From configuration and command line to a `JobSpec`: which recipe or command, on how many processes, with what."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.commands.torchrun import normalise
from orchestrator.config.load import name_problem
from orchestrator.config.schema import Config, Target
from orchestrator.config.secrets import environment
from orchestrator.errors import ConfigError, UsageError, unknown
from orchestrator.files import recipe_files
from orchestrator.specs import ImageRef, JobSpec, Mount, Node, Secret, safe_name

LAUNCHERS = ("torchrun", "none")
_UNLIMITED = sys.maxsize
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_0-9]\w*)*\Z")


def recipes(config: Config) -> dict[str, Path]:
    """Recipe name → file: the trainer's own and `recipes/*.yaml` of the context, which win."""
    return recipe_files(config.image.context)


def recipe_argument(config: Config, name: str) -> str:
    """What `trainer run --config` is given for the recipe `name`.

    The bare name for one that is shipped with the trainer, `recipes/NAME.yaml` (the image's working folder holds
    the context) for one of the user's. Raises UsageError for an unknown recipe.
    """
    known = recipes(config)
    name = name.removeprefix("recipes/").removesuffix(".yaml")
    if name not in known:
        raise UsageError(
            unknown("recipe", name, list(known)), hint=f"or write {config.image.context}/recipes/{name}.yaml"
        )
    own = known[name].parent == config.image.context / "recipes"
    return f"recipes/{name}.yaml" if own else name


def parse_sets(sets: Sequence[str]) -> dict[str, str]:
    """`key=value` words of `--set` as key → text; of a repeated key the last wins. Raises UsageError."""
    values: dict[str, str] = {}
    for word in sets:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--set {word!r} is not of the form key=value", hint="for example --set train.steps=100")
        if not _KEY.match(key):
            raise UsageError(f"--set {word!r}: {key!r} is not a recipe's key", hint="keys are names joined by dots")
        values.pop(key, None)
        values[key] = value
    return values


def set_value(value: Any) -> str:
    """A value of run.set as the text that the trainer reads back (YAML) as the same value.

    >>> set_value(3), set_value(True), set_value("3"), set_value("plain text"), set_value([1, "a"])
    ('3', 'true', '"3"', 'plain text', '[1, a]')
    """
    if not isinstance(value, str):
        text = yaml.safe_dump(value, default_flow_style=True, width=_UNLIMITED, sort_keys=False)
        return text.removesuffix("...\n").removesuffix("\n")
    try:
        plain = yaml.safe_load(value) == value
    except yaml.YAMLError:
        plain = False
    return value if plain else yaml.safe_dump(value, default_style='"', width=_UNLIMITED).removesuffix("\n")


def job_name(config: Config, name: str | None = None) -> str:
    """The run's name: `name` (--name), else that of orch.yaml, else of the project's folder.

    It names the checkpoints too, so it is never bent silently: raises UsageError for a `name` that is not one.
    """
    if name is None:
        return safe_name(config.name or config.root.name)
    if safe_name(name) != name.lower():
        raise UsageError(f"--name: {name_problem(name)}")
    return safe_name(name)


def job_spec(
    config: Config,
    *,
    run_id: str,
    operator: str,
    target: Target,
    nodes: Sequence[Node],
    recipe: str | None = None,
    command: Sequence[str] = (),
    sets: Sequence[str] = (),
    name: str | None = None,
    series: str = "",
    image: ImageRef | None = None,
    gpus: int | None = None,
    procs: int | None = None,
    launcher: str | None = None,
    attempt: int = 1,
    env: Mapping[str, str] | None = None,
    secrets: Mapping[str, Secret] | None = None,
) -> JobSpec:
    """The job that orch.yaml and the command line describe together; the command line wins.

    `gpus` and `procs` are per node: of the command line, the target, for GPUs the inventory; with GPUs there is one
    process for each unless said otherwise, without there is one. Checkpoints belong to `series`, else to `name`
    where it is given, else to this run alone. `secrets` None takes them from the environment. Contacts nothing.
    Raises UsageError, ConfigError.
    """
    check_backend(target)
    if not nodes:
        raise UsageError("no nodes to run on", hint="give --nodes, or write nodes into the inventory")
    launcher = launcher or config.run.launcher
    if launcher not in LAUNCHERS:
        raise UsageError(unknown("launcher", launcher, LAUNCHERS))
    argv, stop = _command(config, recipe, tuple(command), sets, launcher)
    gpus = _gpus(gpus, target, nodes)
    return JobSpec(
        run_id=run_id,
        name=job_name(config, name),
        nodes=tuple(nodes),
        procs=_procs(procs, target, gpus, launcher),
        command=argv,
        gpus=gpus,
        attempt=attempt,
        series=series or (job_name(config, name) if name is not None else ""),
        launcher=launcher,
        stop=stop,
        image=image,
        env=environment(config, env),
        secrets=config.secrets() if secrets is None else secrets,
        mounts=tuple(Mount(row.source, row.target, row.readonly) for row in config.run.mounts),
        storage=config.storage_spec(),
        port=config.run.port,
        shm=config.run.shm,
        grace=config.run.grace,
        operator=operator,
        backend=target.backend,
    )


def check_backend(target: Target) -> None:
    """Raises ConfigError for a backend that this version only knows by name."""
    if target.backend == "slurm":
        raise ConfigError(
            f"target {target.name!r}: backend slurm is not available in this version",
            hint="choose another target with --on",
        )


def _command(
    config: Config, recipe: str | None, command: tuple[str, ...], sets: Sequence[str], launcher: str
) -> tuple[tuple[str, ...], str]:
    """The words after torchrun's own options, and how the job is asked to stop."""
    if recipe is not None and command:
        raise UsageError("--recipe and a command after -- cannot both be given", hint="leave one of them out")
    overrides = parse_sets(sets)
    if recipe is None and not command:
        recipe, command = config.run.recipe, tuple(config.run.command or ())
    if command:
        if overrides:
            raise UsageError("--set changes a recipe, but a command is run", hint="give the command its own options")
        return normalise(command, launcher), "signal"
    if recipe is None:
        raise UsageError(
            f"nothing to run: neither a recipe nor a command (recipes: {', '.join(sorted(recipes(config))) or 'none'})",
            hint="give --recipe NAME or -- COMMAND…, or set run.recipe in orch.yaml",
        )
    if launcher == "none":
        raise UsageError(
            "a recipe needs torchrun: --launcher none is for commands", hint="leave --launcher (run.launcher) out"
        )
    of_file = config.run.recipe in (None, recipe)
    values = {key: set_value(value) for key, value in config.run.set.items()} if of_file else {}
    for key in values:
        if not _KEY.match(key):
            raise ConfigError(f"{config.where}: run.set: {key!r} is not a recipe's key")
    values |= overrides
    words = [f"{key}={value}" for key, value in values.items()]
    return ("-m", "trainer", "run", "--config", recipe_argument(config, recipe), *words), "file"


def _gpus(gpus: int | None, target: Target, nodes: Sequence[Node]) -> int:
    wanted = gpus if gpus is not None else target.gpus
    if wanted is None:
        counts = {node.gpus or 0 for node in nodes}
        if len(counts) > 1:
            shown = ", ".join(f"{node.name} {node.gpus or 0}" for node in nodes)
            raise UsageError(f"the nodes differ in GPUs ({shown})", hint="say how many per node with --gpus")
        return counts.pop()
    if wanted < 0:
        raise UsageError(f"--gpus {wanted}: cannot be negative")
    short = [node for node in nodes if node.gpus is not None and node.gpus < wanted]
    if short:
        raise UsageError(
            f"--gpus {wanted}: node {short[0].name} has {short[0].gpus} in the inventory",
            hint="ask for fewer, choose other nodes, or correct the inventory",
        )
    return wanted


def _procs(procs: int | None, target: Target, gpus: int, launcher: str) -> int:
    wanted = procs
    if wanted is None and (target.procs is not None and gpus == 0):
        wanted = target.procs
    if wanted is None:
        wanted = gpus or 1
    if wanted < 1:
        raise UsageError(f"--procs {wanted}: at least one process per node")
    return wanted if launcher == "torchrun" else 1
