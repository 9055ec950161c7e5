"""The documents name only files, make targets, commands and flags that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import COMMANDS, app, load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {
    *("--local_rank", "--dry_run", "--tokenizer", "--only", "--quick"),  # the trainer's
    *("--rank", "--entrypoint", "--init", "--mount", "--privileged", "--cgroupns"),  # the launcher's, the engine's
    *("--max-restarts", "--rdzv-conf", "--local-addr", "--no-deps"),
}
"""Flags of other programs that stand alone in a code span."""

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def code(page: Path) -> Iterator[str]:
    """Code spans, and the lines of code blocks with continued ones joined."""
    text = page.read_text()
    blocks = re.compile(r"^( *)```.*?\n(.*?)^ *```", re.S | re.M)
    for found in blocks.finditer(text):
        yield from found[2].replace("\\\n", " ").splitlines()
    for span in re.findall(r"`([^`]+)`", blocks.sub("", text)):
        yield " ".join(span.split())


def calls(page: Path, program: str) -> Iterator[list[str]]:
    """The words after `program` in each command line of the page's code."""
    for line in code(page):
        for piece in re.split(r"&&|\|\||;|·|\s\|\s", line.strip().removeprefix("$ ")):
            words = piece.strip().split(maxsplit=1)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # NODES=3 make demo
                words = words[1].split(maxsplit=1) if len(words) > 1 else []
            if words and words[0] == program:
                rest = words[1] if len(words) > 1 else ""
                try:
                    yield shlex.split(rest, comments=True)
                except ValueError:
                    yield rest.split()


@cache
def options(path: tuple[str, ...]) -> set[str]:
    """The options of the command `path`; of orch itself for ()."""
    command = app() if not path else load(path[0])
    for name in path[1:]:
        command = command.commands[name]
    found = {name for param in command.params for name in (*param.opts, *param.secondary_opts) if name[:1] == "-"}
    return found | {"--help", "-h"}


def resolve(words: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The command that `words` name, as a path, and the words after it. Fails for one that does not exist."""
    values = {"--config", "--inventory"}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        assert flag in options(()), f"orch has no {flag}"
        if flag in values and rest:
            rest.pop(0)
    if not rest or not re.fullmatch(r"[a-z|]+", rest[0]):
        return (), rest  # `orch …`, `orch COMMAND --help`
    name = rest.pop(0)
    assert name in COMMANDS, f"there is no `orch {name}`"
    children = set(getattr(load(name), "commands", {}))
    if not children or not rest or not re.fullmatch(r"[a-z|]+", rest[0]):
        return (name,), rest
    below = rest.pop(0).split("|")
    assert set(below) <= children, f"`orch {name}` has no {set(below) - children}"
    return (name, below[0]), rest


def flags(words: list[str]) -> Iterator[str]:
    """The flags among `words`, up to a lone `--`, freed of the brackets of a synopsis."""
    for word in words:
        if word == "--":
            return
        bare = word.strip("[]…").partition("=")[0]
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", bare):
            yield bare


@each_page
def test_links_lead_somewhere(page: Path):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and not link.startswith("#")]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


@each_page
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for words in calls(page, "make") for word in words if re.fullmatch(r"[a-z-]+", word)}
    assert named <= targets


@each_page
def test_orch_commands_and_flags_exist(page: Path):
    wrong = []
    for words in calls(page, "orch"):
        try:
            path, rest = resolve(words)
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
            continue
        if path:
            wrong += [f"orch {' '.join(path)} has no {flag}" for flag in flags(rest) if flag not in options(path)]
    assert not wrong


@each_page
def test_flags_that_stand_alone_are_some_commands(page: Path):
    paths: list[tuple[str, ...]] = [()]
    for name in COMMANDS:
        command: Any = load(name)
        paths += [(name,), *((name, child) for child in getattr(command, "commands", {}))]
    known = set().union(*(options(path) for path in paths)) | FOREIGN
    named = {flag for line in code(page) if line.startswith("--") for flag in flags(line.split())}
    if page.name != "flags.md":  # a table of other programs' flags
        assert named <= known


def test_every_command_is_in_the_documents():
    named = {words[0] for page in PAGES for words in calls(page, "orch") if words}
    assert set(COMMANDS) <= named


def test_pictures_fetch_nothing():
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        assert "url(http" not in picture.read_text() and "@font-face" not in picture.read_text()
        assert picture.name in (ROOT / "README.md").read_text()
