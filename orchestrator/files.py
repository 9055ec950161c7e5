"""Finding and reading the project's files: YAML with positions, NAME=value files, recipes.

Below `config` and `inventory`, and without their imports, because shell completion reads the same files at every Tab.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

import orchestrator
from orchestrator.errors import ConfigError

CONFIG_NAME = "orch.yaml"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def find_config(given: str | os.PathLike[str] | None, start: Path | None = None) -> Path | None:
    """The configuration file: `given`, else the nearest orch.yaml from `start` (the working folder) upwards.

    Raises ConfigError when `given` does not exist.
    """
    if given is not None:
        path = Path(given).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {given}", hint="check --config")
        return path
    here = (start or Path.cwd()).absolute()
    for folder in (here, *here.parents):
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    return None


def recipe_files(context: Path) -> dict[str, Path]:
    """Recipe name → file: those shipped with the trainer, then the context's `recipes/`, which win.

    The trainer is found beside this package, never imported.
    """
    shipped = Path(orchestrator.__file__).parent.parent / "trainer" / "recipes"
    return {path.stem: path for folder in (shipped, context / "recipes") for path in sorted(folder.glob("*.yaml"))}


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: a key given twice is a mistake, not a replacement."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
                seen.add(key)
            except TypeError:
                break  # the base class says it better
            if twice:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


def read_text(path: Path, what: str) -> str:
    """The text of `path`. Raises ConfigError that calls the file `what`."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None


def parse_yaml(text: str, path: Path) -> Any:
    """The document in `text`. Raises ConfigError with file, line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None


def read_mapping(path: Path, what: str) -> dict[Any, Any]:
    """The mapping in the YAML file `path`; an empty file is an empty mapping. Raises ConfigError."""
    document = parse_yaml(read_text(path, what), path)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found a {type(document).__name__}")
    return document


def parse_env(text: str, path: Path) -> dict[str, str]:
    """The variables of an env file.

    One `NAME=value` a line; `export` in front, blank lines and `#` lines are skipped. A value in quotes is read as
    the shell reads it; without quotes it is taken as it stands, up to ` #`. Nothing is expanded.
    Raises ConfigError with the line.
    """
    values: dict[str, str] = {}
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.removeprefix("export ").lstrip().partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not is_env_name(name):
            raise ConfigError(f"{path}:{number}: expected NAME=value")
        if value[:1] in ("'", '"'):
            value = _quoted(value, lines, f"{path}:{number}")
        else:
            value = re.split(r"\s#", value, maxsplit=1)[0].rstrip()
        values[name] = value
    return values


def _quoted(value: str, lines: Any, where: str) -> str:
    """A quoted value, which may go on over the next lines."""
    while True:
        try:
            words = shlex.split(value, comments=True)
        except ValueError:
            following = next(lines, None)
            if following is None:
                raise ConfigError(f"{where}: the quote is never closed") from None
            value += "\n" + following[1]
            continue
        if len(words) > 1:
            raise ConfigError(f"{where}: text after the closing quote")
        return words[0] if words else ""


def is_env_name(name: str) -> bool:
    """Whether `name` can be the name of an environment variable."""
    return bool(_NAME.match(name))


def private(path: Path) -> Path:
    """`path`, a file with secrets. Raises ConfigError when others may read it."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"secrets file {path}: {(error.strerror or 'cannot be read').lower()}") from None
    if mode & 0o077:
        raise ConfigError(
            f"secrets file {path} can be read by others (mode {mode & 0o777:04o})",
            hint=f"chmod 600 {shlex.quote(str(path))}",
        )
    return path
