"""Everything that commands print: tables, JSON, status lines and errors.

Results go to stdout, everything else to stderr, so a pipe sees results only. Tables are drawn by rich on a
terminal and as plain aligned text elsewhere; log lines never pass through here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from orchestrator.errors import NodesFailed, OrchError

_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

STATE_COLOURS = {
    "running": "cyan",
    "starting": "cyan",
    "pending": "dim",
    "stopping": "yellow",
    "succeeded": "green",
    "failed": "red",
    "stopped": "yellow",
    "preempted": "yellow",
    "lost": "red",
}


def coloured(stream: TextIO) -> bool:
    """Whether `stream` gets ANSI codes: a terminal, and neither NO_COLOR nor TERM=dumb is set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def style(text: str, colour: str, stream: TextIO | None = None) -> str:
    """`text` in `colour` (`red`, `bold`, …) if `stream` (stdout) shows colours."""
    if not text or not coloured(stream or sys.stdout):
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def printable(text: str) -> str:
    """`text` with control characters spelled out: what a remote machine says cannot drive the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


def emit_json(value: Any) -> None:
    """`value` on stdout as indented JSON. With --json this is the only thing printed there."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def say(text: str) -> None:
    """One status line to stderr."""
    _line(printable(text))


def warn(text: str) -> None:
    """One warning to stderr."""
    _line(f"{style('warning:', 'yellow', sys.stderr)} {printable(text)}")


def node_line(node: str, text: str) -> None:
    """What one node does, to stderr."""
    _line(f"{style(f'{node:<10}', 'cyan', sys.stderr)} {printable(text)}")


def _line(text: str) -> None:
    """One write for text and line end: threads of several nodes speak at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def field(label: str, text: str, colour: str = "", stream: TextIO | None = None) -> str:
    """`  LABEL       text`, the lines of a run's summary, in `colour` where `stream` (stdout) shows it."""
    name = f"{label:<12}"
    return f"  {style(name, colour, stream) if colour else name}{printable(text)}"


def confirm(question: str) -> bool:
    """Asks on the terminal; False when there is nobody to ask."""
    if not sys.stdin.isatty():
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout; columns named in `right` are aligned to the right, a STATE column is coloured."""
    cells = [["-" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(headers, cells, right)
        return
    print(plain_table(headers, cells, right))


def plain_table(headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Aligned text, two spaces between columns, nothing cut off."""
    lines = [list(headers), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    text = []
    for line in lines:
        parts = [
            cell.rjust(width) if header in right else cell.ljust(width)
            for cell, width, header in zip(line, widths, headers, strict=True)
        ]
        text.append("  ".join(parts).rstrip())
    return "\n".join(text)


def _rich_table(headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in headers:
        drawn.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(
            *(
                Text(cell, style=STATE_COLOURS.get(cell, "") if header == "STATE" else "")
                for cell, header in zip(row, headers, strict=True)
            )
        )
    Console(no_color=not coloured(sys.stdout), highlight=False).print(drawn)


def duration(seconds: float | None) -> str:
    """`0.4s`, `12s`, `3m05s`, `2h07m`, `4d03h`; `-` for None."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def ago(then: float | None, now: float | None = None) -> str:
    """`3m05s ago`; `-` for None. Both times in seconds since the epoch."""
    return "-" if then is None else f"{duration((now or time.time()) - then)} ago"


def size(count: float | None) -> str:
    """Bytes as `512 B`, `1.5 kB`, `2.3 GB` (powers of 1000, as Docker prints them)."""
    if count is None:
        return "-"
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count /= 1000
        power += 1
    number = f"{count:.0f}" if power == 0 or abs(count) >= 99.95 else f"{count:.1f}"
    return f"{number} {units[power]}"


def print_error(error: OrchError) -> None:
    """`error: node: message`, the last lines, each node's own error, and `hint: …`, to stderr."""
    _error_line(str(error))
    for line in error.lines:
        print(f"  {printable(line)}", file=sys.stderr)
    said = _print_nodes(error.errors) if isinstance(error, NodesFailed) else set()
    if error.hint and error.hint not in said:
        print(f"{style('hint:', 'yellow', sys.stderr)} {printable(error.hint)}", file=sys.stderr)
    sys.stderr.flush()


def _print_nodes(errors: Mapping[str, Exception]) -> set[str]:
    """Each node's own error, and each different hint once; returns the nodes' hints."""
    hints: dict[str, list[str]] = {}
    own: dict[str, str] = {}
    for node, error in errors.items():
        message = error.message if isinstance(error, OrchError) else f"{type(error).__name__}: {error}"
        print(f"  {style(node, 'cyan', sys.stderr)}: {printable(message)}", file=sys.stderr)
        for line in getattr(error, "lines", ()):
            print(f"    {printable(line)}", file=sys.stderr)
        if getattr(error, "hint", None):
            own[node] = error.hint
            hints.setdefault(re.sub(rf"(?<!\w){re.escape(node)}(?!\w)", "NODE", error.hint), []).append(node)
    for hint, nodes in hints.items():
        shown = own[nodes[0]] if len(nodes) == 1 else hint
        print(f"{style('hint:', 'yellow', sys.stderr)} {', '.join(nodes)}: {printable(shown)}", file=sys.stderr)
    return {*own.values()}


def print_usage_error(error: Any) -> None:
    """A mistake in the command line that click found: what is wrong and where to read more."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)  # its message is the help text
        return
    _error_line(error.format_message())
    context = getattr(error, "ctx", None)
    if context is not None:
        print(f"hint: `{context.command_path} --help` shows what it takes", file=sys.stderr)


def print_internal_error(error: Exception, *, debug: bool) -> None:
    """A fault of orch itself, in one line."""
    what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    again = "" if debug else "; run again with --debug"
    _error_line(f"internal error: {what}{again}")


def _error_line(text: str) -> None:
    print(f"{style('error:', 'red', sys.stderr)} {printable(text)}", file=sys.stderr, flush=True)


class _Warnings(logging.Handler):
    """Shows what lower layers log (`logging.getLogger("orch")`) as warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def route_warnings() -> None:
    """Sends the layers' warnings to stderr, once."""
    logger = logging.getLogger("orch")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings(logging.WARNING))
        logger.propagate = False


def stdout_is_broken() -> bool:
    """True when nobody reads stdout any more; what is still to be written there is then thrown away."""
    try:
        asked = select.poll()
        asked.register(sys.stdout.fileno(), select.POLLOUT)
        broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    except (OSError, ValueError):
        return False
    if broken:
        discard_stdout()
    return broken


def discard_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
