"""What the Docker client itself does, for the fake node: options, and the Go templates of `--format`."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from typing import Any

_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
_PATH = re.compile(r"\.(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)?\Z")


class TemplateError(ValueError):
    pass


def render(template: str, value: Any) -> str:
    """`{{.A.B}}`, `{{json .A}}`, `{{index .A "k"}}`, `{{len .A}}`, `{{println .A}}`, `{{.Label "k"}}`,
    `{{range .A}}…{{end}}` and `{{if .A}}…{{end}}`; anything else raises TemplateError.
    """
    text, rest = _block(template, value)
    if rest is not None:
        raise TemplateError("unexpected {{end}}")
    return text


def _block(template: str, value: Any) -> tuple[str, str | None]:
    """Renders up to an unmatched `{{end}}`; gives what follows it, or None at the end of the text."""
    out: list[str] = []
    while match := _ACTION.search(template):
        out.append(template[: match.start()])
        template = template[match.end() :]
        words = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', match[1])
        if words == ["end"]:
            return "".join(out), template
        if words and words[0] in ("range", "if"):
            inner = _look(words[1], value)
            items = list(inner or []) if words[0] == "range" else [value] if inner else []
            _, rest = _skip(template)
            out += [_block(template, item)[0] for item in items]
            if rest is None:
                raise TemplateError("unclosed action")
            template = rest
        else:
            out.append(_call(words, value))
    return "".join(out) + template, None


def _skip(template: str) -> tuple[str, str | None]:
    depth = 1
    for match in _ACTION.finditer(template):
        word = match[1].split(" ")[0]
        depth += {"range": 1, "if": 1, "end": -1}.get(word, 0)
        if depth == 0:
            return "", template[match.end() :]
    return "", None


def _call(words: list[str], value: Any) -> str:
    if len(words) == 1:
        return show(_look(words[0], value))
    name, *rest = words
    if name == "json" and len(rest) == 1:
        return json.dumps(_look(rest[0], value), separators=(",", ":"), ensure_ascii=False)
    if name == "println" and len(rest) == 1:
        return show(_look(rest[0], value)) + "\n"
    if name == "len" and len(rest) == 1:
        return str(len(_look(rest[0], value) or ()))
    if name == "index" and len(rest) == 2:
        return show(_index(_look(rest[0], value), rest[1]))
    if name == ".Label" and len(rest) == 1:
        return show(value.get("_labels", {}).get(json.loads(rest[0]), ""))
    raise TemplateError(f'function "{name}" not defined')


def _index(container: Any, key: str) -> Any:
    if isinstance(container, list):
        return container[int(key)]
    return (container or {}).get(json.loads(key), "")


def _look(path: str, value: Any) -> Any:
    if not _PATH.match(path):
        raise TemplateError(f"unexpected {path!r}")
    for name in filter(None, path.split(".")):
        if not isinstance(value, dict) or name not in value:
            raise TemplateError(f'can\'t evaluate field {name} in type "{type(value).__name__}"')
        value = value[name]
    return value


def show(value: Any) -> str:
    """A value as Go's `%v` prints it."""
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{key}:{show(value[key])}" for key in sorted(value)) + "]"
    if isinstance(value, list):
        return "[" + " ".join(show(item) for item in value) + "]"
    return str(value)


VALUES = frozenset(
    [
        *[
            "name",
            "entrypoint",
            "network",
            "ipc",
            "pid",
            "shm-size",
            "mount",
            "volume",
            "user",
            "label",
            "env",
            "env-file",
        ],
        *["gpus", "stop-timeout", "stop-signal", "cidfile", "workdir", "log-opt", "log-driver", "ulimit", "cap-add"],
        *["device", "restart", "pull", "hostname", "security-opt", "memory", "cpus", "add-host", "group-add", "tmpfs"],
    ]
)
"""The options of `docker create` that take a value."""

FLAGS = frozenset(["init", "read-only", "privileged", "rm", "interactive", "tty", "detach", "quiet"])
SHORT = {"v": "volume", "u": "user", "l": "label", "e": "env", "w": "workdir", "h": "hostname", "i": "interactive"}


class Failure(Exception):
    """Printed to standard error as it is; the exit code is 1 unless given."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def options(
    args: list[str], value: Container[str], flag: Container[str], short: Mapping[str, str], *, stop: bool = False
) -> tuple[dict[str, list[str]], list[str]]:
    """({name: values}, positional arguments); with `stop`, options end at the first positional one."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        if arg == "--":
            return found, rest + queue
        if not arg.startswith("-") or arg == "-":
            rest.append(arg)
            if stop:
                return found, rest + queue
            continue
        if arg.startswith("--"):
            name, equals, given = arg[2:].partition("=")
            names = [name]
        else:
            # -aq are two flags; -fname=x and -n20 are one option with its value
            letters, equals, given = arg[1:].partition("=")
            if short.get(letters[:1]) in value and len(letters) > 1 and not equals:
                letters, equals, given = letters[0], "=", letters[1:]
            names = [short.get(letter, "-" + letter) for letter in letters]
        for name in names:
            if name in flag:
                found.setdefault(name, []).append(given or "true")
            elif name in value:
                if not equals and not queue:
                    raise Failure(f"flag needs an argument: --{name}", 125)
                found.setdefault(name, []).append(given if equals else queue.pop(0))
            else:
                dashes = "shorthand flag: " if name.startswith("-") else "flag: --"
                raise Failure(f"unknown {dashes}{name.lstrip('-')}", 125)
    return found, rest
