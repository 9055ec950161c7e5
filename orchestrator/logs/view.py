"""From whole log lines `RANK<TAB>text` to what is shown: filtered, prefixed, safe. Pure.

Works on chunks of many lines: the usual chunk (no control characters) costs one pass over its bytes
and one dictionary look-up a line, so that about two million lines a second go through one core.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from orchestrator.errors import UsageError
from orchestrator.logs.text import RESET, is_plain, sanitize

LAUNCHER = "-"
"""The rank of the launcher's own lines."""

UNKNOWN = "?"
"""Shown as rank of a line that is not `RANK<TAB>text` (a damaged log): never dropped silently."""

LIMIT = 1 << 20
"""Bytes after which a line without end is passed on as it is; the launcher's longest is 64 KiB."""

Formatter = Callable[[bytes], bytes]
"""Whole lines of one node's log in, what is to be written out; one per source, used by one thread."""

# No red: it reads as an error.
_PALETTE = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class LineCutter:
    """Cuts a byte stream at the end of its last whole line; linear in whatever pieces it comes."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> bytes:
        """All whole lines that are complete with `chunk`, as one piece (may be empty)."""
        cut = chunk.rfind(b"\n") + 1
        if not cut and self._size + len(chunk) < LIMIT:
            self._pending.append(chunk)
            self._size += len(chunk)
            return b""
        cut = cut or len(chunk)
        whole = b"".join((*self._pending, chunk[:cut])) if self._pending else chunk[:cut]
        self._pending, self._size = [], len(chunk) - cut
        if self._size:
            self._pending.append(chunk[cut:])
        return whole

    def rest(self) -> bytes:
        """The unfinished line, if any; the cutter is empty afterwards."""
        rest, self._pending, self._size = b"".join(self._pending), [], 0
        return rest


def is_rank(rank: bytes) -> bool:
    return rank == b"-" or (rank.isdigit() and len(rank) < 10)


def split_line(line: bytes) -> tuple[str, bytes]:
    """Rank and text of one log line without its newline; UNKNOWN and the whole line if damaged."""
    rank, _, text = line.partition(b"\t")
    return (rank.decode(), text) if is_rank(rank) else (UNKNOWN, line)


def cut_lines(whole: bytes) -> list[bytes]:
    """The lines of a chunk of whole lines, without their newlines."""
    lines = whole.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def split_lines(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """(rank, text) of each line of a chunk of whole lines."""
    return map(split_line, cut_lines(whole))


def parse_ranks(text: str) -> frozenset[str]:
    """`0,4-7` as ranks; `-` is the launcher. Raises UsageError."""
    ranks: set[str] = set()
    for part in text.split(","):
        part = part.strip()
        first, dash, last = part.partition("-")
        if part == LAUNCHER:
            ranks.add(LAUNCHER)
        elif _decimal(first) and not dash:
            ranks.add(str(int(first)))
        elif _decimal(first) and _decimal(last) and int(first) <= int(last) < 1_000_000:
            ranks.update(map(str, range(int(first), int(last) + 1)))
        else:
            hint = "write for example 0 or 0,4-7; - is the launcher"
            raise UsageError(f"cannot read ranks {text!r}", hint=hint)
    return frozenset(ranks)


def _decimal(text: str) -> bool:
    return text.isascii() and text.isdigit()


@dataclass(frozen=True)
class View:
    """How logs are shown.

    `names`: all nodes' names and `world`: the number of ranks; both only for the width of the prefix.
    `nodes`, `ranks`: what is shown, None for all; ranks are global, as text, `-` is the launcher.
    `color`: our prefix in colours, the job's own colours kept; without it no escape sequence comes out.
    `raw`: the text untouched, whatever it does to the terminal. `prefix`: `n1/0 ` before each line.
    """

    names: tuple[str, ...] = ()
    world: int = 1
    nodes: Collection[str] | None = None
    ranks: Collection[str] | None = None
    color: bool = False
    raw: bool = False
    prefix: bool = True
    width: int = field(init=False)

    def __post_init__(self) -> None:
        longest = max(map(len, self.names), default=0)
        object.__setattr__(self, "width", longest + 1 + len(str(max(self.world - 1, 0))))

    def shows(self, node: str) -> bool:
        return self.nodes is None or node in self.nodes

    def label(self, node: str, rank: str) -> bytes:
        """`n1/0`, padded to the common width, in the rank's colour, with the space after it."""
        return paint(f"{node}/{rank}", rank, self.width, self.color) if self.prefix else b""

    def formatter(self, node: str) -> Formatter:
        return _Format(self, node)


def paint(label: str, rank: str, width: int, color: bool) -> bytes:
    """A prefix: `label` padded to `width`, coloured by rank (the launcher's is dim, left open)."""
    plain, pad = label.encode(), b" " * max(width - len(label), 0) + b" "
    if not color:
        return plain + pad
    if rank == LAUNCHER:
        return b"\x1b[2m" + plain + pad
    code = _PALETTE[int(rank) % len(_PALETTE)] if _decimal(rank) else 31
    return b"\x1b[%dm" % code + plain + RESET + pad


class _Damaged(Exception):
    """A line of the chunk is not `RANK<TAB>text`."""


class _Prefixes(dict[bytes, bytes]):
    """Rank as it stands in the log → prefix, made when the rank is first seen."""

    def __init__(self, view: View, node: str) -> None:
        self._view, self._node = view, node

    def __missing__(self, rank: bytes) -> bytes:
        if not is_rank(rank):
            raise _Damaged
        self[rank] = prefix = self._view.label(self._node, rank.decode())
        return prefix


class _Format:
    """The formatter of one node's log."""

    def __init__(self, view: View, node: str) -> None:
        self._view, self._node = view, node
        self._prefixes = _Prefixes(view, node)
        self._unknown = view.label(node, UNKNOWN)
        self._wanted = None if view.ranks is None else {rank.encode() for rank in view.ranks}

    def __call__(self, whole: bytes) -> bytes:
        if not whole:
            return b""
        lines = cut_lines(whole)
        try:
            out = self._fast(lines) if self._simple(whole) else self._clean(lines)
        except _Damaged:
            out = self._clean(lines)
        if not out:
            return b""
        out.append(b"")
        return b"\n".join(out)

    def _simple(self, whole: bytes) -> bool:
        """Whether every line is just prefix + text: nothing to clean, no dimmed line to close."""
        if self._view.color and (whole.startswith(b"-\t") or b"\n-\t" in whole):
            return False
        return self._view.raw or is_plain(whole)

    def _fast(self, lines: list[bytes]) -> list[bytes]:
        prefixes, wanted = self._prefixes, self._wanted
        if wanted is None:
            return [prefixes[rank] + text for rank, _, text in [line.partition(b"\t") for line in lines]]
        parts = [line.partition(b"\t") for line in lines]
        return [prefixes[rank] + text for rank, _, text in parts if rank in wanted]

    def _clean(self, lines: list[bytes]) -> list[bytes]:
        """Line by line: cleaned, the launcher's closed after its dimming, damaged ones marked."""
        wanted, raw, color = self._wanted, self._view.raw, self._view.color
        out = []
        for line in lines:
            rank, _, text = line.partition(b"\t")
            known = is_rank(rank)
            if wanted is not None and (rank if known else b"?") not in wanted:
                continue
            prefix = self._prefixes[rank] if known else self._unknown
            text = text if known else line
            if not raw and not is_plain(text):
                text = sanitize(text, color=color)
            if color and rank == b"-":
                text += RESET
            out.append(prefix + text)
        return out
