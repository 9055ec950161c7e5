"""Text for POSIX `sh`, built so that no value can ever become syntax.

Everything that is not marked `Raw` is data: it is quoted. The parts that *are* shell
(redirections, `$(…)`, already built commands) are marked `Raw` by the code that wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from orchestrator.errors import UsageError

_PLAIN = re.compile(r"[A-Za-z0-9_@%+:,./-][A-Za-z0-9_@%+=:,./-]*\Z")
_COMMAND = re.compile(r"[A-Za-z0-9_./-]+\Z")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_RESERVED = frozenset(["case", "do", "done", "elif", "else", "esac", "fi", "for", "if", "in", "then", "until", "while"])
"""Words that start or end a construct where a command could stand."""

_DISPUTED = "\n\\!"
"""What login shells read differently inside single quotes."""
_RESTORE = r'''exec sh -c "$(printf %s "$1" | tr "\001\002\003" "\012\134\041")"'''


class Raw(str):
    """Text that is shell already and goes in as it stands."""

    __slots__ = ()


def quote(text: str) -> str:
    """`text` as one word of `sh` whatever it holds; plain words stay as they are, for the reader.

    Raises UsageError for what no argument can hold: a NUL, or text that is not valid Unicode.
    """
    _check(text)
    return str(text) if _PLAIN.match(text) else _single(text)


def path(text: str) -> str:
    """A path on the node as one word; a leading `~/` is the home folder *there*.

    A leading `-` is kept from being read as an option. Raises UsageError for `~user/…`, which
    would silently be a folder of that odd name, and for an empty path.
    """
    if isinstance(text, Raw):
        return str(text)
    if not text:
        raise UsageError("a path is empty")
    if text == "~":
        return '"$HOME"'
    if text.startswith("~/"):
        rest = text[2:]
        return '"$HOME"/' + (quote(rest) if rest else "")
    if text.startswith("~"):
        raise UsageError(
            f"the path {text!r} starts with another user's home",
            hint="write it out, or use ~/… (your own home)",
        )
    return quote("./" + text if text.startswith("-") else text)


def join(argv: Sequence[str]) -> str:
    """A simple command from its words. The first is always a command, never an assignment or keyword."""
    if not argv:
        raise UsageError("a command is empty")
    first, *rest = argv
    if not isinstance(first, Raw):
        _check(first)
        first = first if _COMMAND.match(first) and first not in _RESERVED else _single(first)
    return " ".join([str(first), *(_word(word) for word in rest)])


def assign(name: str, value: str) -> str:
    """`name='value'`; a `Raw` value such as `$(id -u)` goes in as it stands."""
    if not _NAME.match(name):
        raise UsageError(f"{name!r} cannot be the name of a variable", hint="letters, digits and _ only")
    return f"{name}={_word(value)}"


def export(env: Mapping[str, str]) -> str:
    """`export a='…' b='…'`, in the order given; `:` (do nothing) for none."""
    return "export " + " ".join(assign(name, value) for name, value in env.items()) if env else ":"


def chain(*commands: str) -> str:
    """Each command only if the one before it succeeded."""
    return " && ".join(part for part in commands if part)


def lines(*commands: str) -> str:
    """One command a line; empty ones are left out."""
    return "".join(part.rstrip("\n") + "\n" for part in commands if part)


def script(*commands: str) -> str:
    """`lines` that stop at the first failure (`-e`) and at an unset variable (`-u`)."""
    return lines("set -eu", *commands)


def sh(command: str, *args: str) -> str:
    """`sh -c '<command>' sh arg…`: built shell text as one command, its `$1`… given as data."""
    return join(["sh", "-c", command, "sh", *args]) if args else join(["sh", "-c", command])


def login(command: str) -> str:
    """`command` for `sh`, as the text that any login shell (sh, bash, zsh, fish, csh) passes on unchanged.

    Those shells agree on single quotes, except where there is a backslash (fish), a newline or an
    exclamation mark (csh): such text travels with these three replaced, and `tr` puts them back.
    """
    _check(command)
    if not any(char in command for char in _DISPUTED) or any(char in command for char in "\1\2\3"):
        return "sh -c " + _single(command)
    safe = command.translate({ord(char): code for code, char in enumerate(_DISPUTED, 1)})
    return "sh -c " + _single(_RESTORE) + " sh " + _single(safe)


def tethered(command: str) -> str:
    """`command`, whose process group is terminated when standard input ends: its caller is gone.

    For commands that may stay silent for hours, which no broken pipe would ever tell.
    """
    return lines(
        "exec 3<&0 </dev/null",
        "if command -v setsid >/dev/null 2>&1; then g=setsid; else g=; fi",
        f"$g sh -c {_single(command)} 3<&- & p=$!",
        '{ cat <&3; kill -s TERM -- "${g:+-}$p"; } >/dev/null 2>&1 & w=$!',
        "exec 3<&-",
        "wait $p; r=$?",
        "kill $w 2>/dev/null",
        "exit $r",
    )


def _word(word: str) -> str:
    return str(word) if isinstance(word, Raw) else quote(word)


def _single(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _check(text: str) -> None:
    if "\0" in text:
        raise UsageError(f"{text!r} holds a NUL character, which no command line can carry")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!r} is not valid Unicode text") from error
