"""The few Go templates that `docker … --format` is given here, rendered as the Docker client does."""

from __future__ import annotations

import json
import re
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
            items = (list(inner or []) if words[0] == "range" else [value] if inner else []) or [None]
            skip = items == [None]
            body = ""
            for item in items:
                body, rest = _block(template, item if not skip else value) if not skip else _skip(template)
                out.append(body)
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
