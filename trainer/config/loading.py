"""Recipes: found, read, overridden, validated, described.

An unknown key is an error that names its path and the nearest valid key. `describe()` lists every key with
its default for `--help`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from trainer.config.schema import Config, Section
from trainer.errors import ConfigError, nearest

RECIPES = Path(__file__).parent.parent / "recipes"


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe's configuration with `key.path=value` overrides applied.

    Raises ConfigError with one line that names the key.
    """
    path = find_recipe(recipe)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, this is a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(values, str(path))


def validate(values: Mapping[str, Any], where: str) -> Config:
    """`values` as a Config; raises ConfigError that names `where` and the first wrong key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe's name or path."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        if not path.is_file():
            raise ConfigError(f"recipe file {recipe} does not exist")
        return path
    named = RECIPES / f"{recipe}.yaml"
    if recipe not in recipe_names():
        near = nearest(recipe, recipe_names())
        guess = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"unknown recipe {recipe!r}{guess} (valid: {', '.join(recipe_names())}, or a path)")
    return named


def keys() -> dict[str, tuple[str, Any, str]]:
    """Every dotted key → (type, default, description)."""
    return {key: rest for key, *rest in _walk(Config, "")}  # type: ignore[misc]


def describe() -> str:
    """All keys with their defaults, for `--help`."""
    lines = []
    for key, (kind, default, text) in keys().items():
        shown = json.dumps(default) if isinstance(default, tuple) else yaml.safe_dump(default).split("\n")[0]
        lines.append(f"  {key + '=' + shown:<44} {kind:<24} {text}".rstrip())
    return "\n".join(lines)


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _walk(kind, f"{prefix}{name}.")
            continue
        choices = get_args(kind) if "Literal" in str(kind) else ()
        text = "|".join(map(str, choices)) if choices else getattr(kind, "__name__", str(kind))
        text = {"Union": "str, optional", "UnionType": "str, optional", "tuple": "two floats"}.get(text, text)
        yield f"{prefix}{name}", text, info.default, info.description or ""


def _is_text(key: str) -> bool:
    section: Any = Config
    *parents, last = key.split(".")
    for parent in parents:
        info = section.model_fields.get(parent)
        section = info.annotation if info else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return False
    info = section.model_fields.get(last)
    return info is not None and info.annotation in (str, str | None)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    value: Any = text
    if not _is_text(key.strip()) or text == "null":  # a text is taken as it stands, whatever YAML makes of it
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
    *parents, last = key.strip().split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"unknown key {key!r}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def _explain(error: ValidationError) -> str:
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        near = nearest(key, list(keys()))
        section = key.rpartition(".")[0]
        valid = [name for name in keys() if name.rpartition(".")[0] == section]
        tail = f"; did you mean {near!r}?" if near else f" (valid here: {', '.join(valid)})"
        return f"unknown key {key!r}{tail}{more}"
    reason = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{key}: {_one_line(reason)}{shown}{more}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
