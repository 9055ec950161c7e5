"""Reads orch.yaml into a `Config`: every problem at once, each with its key path, paths resolved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from orchestrator.config.schema import BUILT_IN, Config, Target
from orchestrator.errors import ConfigError, unknown
from orchestrator.files import find_config, read_mapping
from orchestrator.specs import safe_name

_PATHS = {
    "image": ("context", "dockerfile", "ca_bundle", "wheels"),
    "run": ("env_file", "secrets_file"),
    "local": ("python",),
}
_TARGET_PATHS = ("inventory",)


def load(path: str | os.PathLike[str] | None = None, *, start: Path | None = None) -> Config:
    """The configuration at `path`, else the nearest orch.yaml from the working folder upwards, else the defaults.

    Raises ConfigError: one line for one problem; for several, a count and a line for each.
    """
    found = find_config(path, start)
    document = read_mapping(found, "configuration") if found else {}
    return parse(document, found, root=found.parent if found else (start or Path.cwd()).absolute())


def parse(document: dict[Any, Any], path: Path | None, *, root: Path) -> Config:
    """`document`, the content of `path`, with relative paths taken from `root`. Raises ConfigError."""
    where = str(path) if path else "configuration"
    document, default, problems = _lift_targets(document)
    config = None
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        problems += [_describe(row) for row in error.errors(include_url=False)]
    if config is not None and config.name is not None and safe_name(config.name) != config.name.lower():
        problems.append(f"name: {name_problem(config.name)}")
    if problems:
        raise _as_error(where, problems)
    assert config is not None
    return _resolve(config, path, root, default)


def _lift_targets(document: dict[Any, Any]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Takes `targets.default`, a name, out of the table of targets that surrounds it, and names the targets."""
    document = dict(document)
    problems = []
    if "default_target" in document:
        document.pop("default_target")
        problems.append("default_target: unknown key 'default_target'; did you mean 'targets.default'?")
    sections = [key for key, value in document.items() if value is None and key in Config.model_fields]
    for key in sections:
        del document[key]  # `run:` with nothing below it is an empty section
    targets = document.get("targets")
    if not isinstance(targets, dict):
        return document, None, problems
    targets = dict(targets)
    default = targets.pop("default", None)
    if default is not None and not isinstance(default, str):
        problems.append("targets.default: expected the name of a target")
        default = None
    known = [*(str(name) for name in targets), *BUILT_IN]
    if default is not None and default not in known:
        problems.append(f"targets.default: {unknown('target', default, sorted(set(known)))}")
    for name, row in targets.items():
        if isinstance(row, dict) and "name" in row:
            problems.append(f"targets.{name}.name: {unknown('key', 'name', _valid(Target))}")
        if row is None or isinstance(row, dict):
            targets[name] = {**(row or {}), "name": str(name)}
    document["targets"] = targets
    return document, default, problems


def name_problem(name: str) -> str:
    """Why `name` cannot name a run, with one that could."""
    return (
        f"{name!r} cannot name a run: up to 80 of a-z 0-9 . _ - , beginning and ending with none of . -"
        f" (for example {safe_name(name)!r})"
    )


def _resolve(config: Config, path: Path | None, root: Path, default: str | None) -> Config:
    updates: dict[str, Any] = {"default_target": default}
    for section, keys in _PATHS.items():
        updates[section] = _with_paths(getattr(config, section), keys, root)
    updates["targets"] = {name: _with_paths(row, _TARGET_PATHS, root) for name, row in config.targets.items()}
    resolved = config.model_copy(update=updates)
    resolved._path = path
    resolved._root = root
    return resolved


def _with_paths(section: BaseModel, keys: tuple[str, ...], root: Path) -> Any:
    changed = {}
    for key in keys:
        value = getattr(section, key)
        if value is not None:
            # normpath, not resolve: a venv's python is a symlink that must stay one
            changed[key] = Path(os.path.normpath(root / value.expanduser()))
    return section.model_copy(update=changed)


def _as_error(where: str, problems: list[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{where}: {problems[0]}")
    return ConfigError(f"{where} has {len(problems)} problems", lines=problems)


def _describe(row: Any) -> str:
    """One pydantic error as `key.path: what is wrong`."""
    loc = [part for part in row["loc"] if part != "[key]"]
    key = ".".join(part if str(part).isprintable() else repr(part) for part in map(str, loc))
    if row["type"] == "extra_forbidden":
        return f"{key}: {unknown('key', str(loc[-1]), _valid(_model_at(loc[:-1])))}"
    if row["type"] == "missing":
        return f"{key}: is missing"
    message = row["msg"].removeprefix("Value error, ")
    if row["type"] == "string_pattern_mismatch":
        message = f"{row['input']!r} is not of the form 8g, 512m"
    elif row["type"] != "value_error" and not isinstance(row["input"], dict | list):
        message = f"{message[:1].lower()}{message[1:]} (found {row['input']!r})"
    elif row["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]} (found a {type(row['input']).__name__})"
    return f"{key}: {message}" if key else message


def _valid(model: type[BaseModel]) -> list[str]:
    if model is Config:
        return [key for key in Config.model_fields if key != "default_target"]
    return [key for key in model.model_fields if not (model is Target and key == "name")]


def _model_at(loc: list[Any]) -> type[BaseModel]:
    """The section that the key path `loc` leads to; indices and keys of mappings are passed over."""
    model: type[BaseModel] = Config
    annotation: Any = None
    for part in loc:
        if annotation is None:
            annotation = model.model_fields[part].annotation
        found = _section_in(annotation)
        if found is not None and (annotation is found or isinstance(part, int) or part not in model.model_fields):
            model, annotation = found, None
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _section_in(part)
        if found is not None:
            return found
    return None
