"""The patterns of a .dockerignore file, with Docker's own meaning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


def compile_ignore(text: str) -> Callable[[str], bool]:
    """A test of a relative posix path: True when the file is left out.

    As in Docker: patterns are anchored at the context's root, `*` and `?` stop at `/`, `**` does not,
    a pattern also takes everything below a folder it matches, `!` brings back, the last match decides.
    """
    rules = [(row[:1] != "!", re.compile(_regex(row.removeprefix("!").strip()))) for row in _patterns(text)]
    if not rules:
        return lambda _path: False

    def ignored(path: str) -> bool:
        out = False
        for excludes, pattern in rules:
            if excludes != out and pattern.match(path):
                out = excludes
        return out

    return ignored


def _patterns(text: str) -> Iterable[str]:
    for row in text.lstrip("\ufeff").splitlines():
        row = row.strip()
        if row and not row.startswith("#") and row.removeprefix("!").strip(" /."):
            yield row


def _class(body: str) -> str:
    """`[body]`; what is no valid class (`[]`, `[z-a]`) stands for itself."""
    escaped = "[" + body.replace("\\", "\\\\").replace("[", "\\[") + "]"
    try:
        re.compile(escaped)
    except re.error:
        return re.escape(f"[{body}]")
    return escaped


def _regex(pattern: str) -> str:
    """`pattern` matched against a whole path or one of its parent folders."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    out, at, text = "", 0, "/".join(parts)
    while at < len(text):
        char = text[at]
        if text.startswith("**", at):
            at += 2
            if text[at : at + 1] == "/":
                at += 1
                out += "(?:.*/)?"
            else:
                out += ".*"
            continue
        at += 1
        if char == "*":
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "[" and "]" in text[at:]:
            end = text.index("]", at)
            out += _class(text[at:end])
            at = end + 1
        elif char == "\\" and at < len(text):
            out += re.escape(text[at])
            at += 1
        else:
            out += re.escape(char)
    return out + r"(?:/.*)?\Z"
