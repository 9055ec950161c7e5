"""Identical lines of many ranks, shown once: `n[1-2]/[0-3] text`. Pure."""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from orchestrator.logs.text import RESET, sanitize
from orchestrator.logs.view import LAUNCHER, Formatter, View, paint, split_lines

Text = TypeVar("Text", str, bytes)

_NEAR = 8
"""How far ahead a line without letters (blank, a ruler) is looked for: it is no landmark."""

_NAME = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)


@dataclass
class _Group:
    text: bytes | str
    launcher: bool
    members: list[tuple[str, str]] = field(default_factory=list)


def fold(items: Iterable[tuple[str, str, Text]]) -> list[tuple[str, Text]]:
    """(label, text) in which a text that several ranks wrote at the same place stands once.

    `items` are (node, rank, text); rank `-` is the launcher, "" means that there are no ranks (the output
    of a command per node). Every line of every rank is in the result, each rank's own in its order; nothing
    is said about the order between ranks. Works with the items in any interleaving, also node after node.
    """
    return [(_label(group.members), group.text) for group in merge(items)]  # type: ignore[misc]


def merge(items: Iterable[tuple[str, str, Text]]) -> list[_Group]:
    """The groups behind `fold`: the ranks' sequences laid over each other one by one, O(ranks × lines)."""
    streams: dict[tuple[str, str], list[Text]] = {}
    for node, rank, text in items:
        streams.setdefault((node, rank), []).append(text)
    groups: list[_Group] = []
    for member, lines in streams.items():
        groups = _overlay(groups, member, lines)
    return groups


def _overlay(groups: list[_Group], member: tuple[str, str], lines: Sequence[Text]) -> list[_Group]:
    """`groups` with one more rank: each line joins the next group of its text, else stands for itself."""
    launcher = member[1] == LAUNCHER
    places: dict[bytes | str, list[int]] = {}
    for position, group in enumerate(groups):
        if group.launcher == launcher:
            places.setdefault(group.text, []).append(position)
    merged: list[_Group] = []
    here = 0
    for text in lines:
        found = places.get(text, ())
        at = bisect_left(found, here)
        if at < len(found) and (found[at] - here < _NEAR or _landmark(text)):
            merged += groups[here : found[at] + 1]
            here = found[at] + 1
        else:
            merged.append(_Group(text, launcher))
        merged[-1].members.append(member)
    return merged + groups[here:]


def _landmark(text: bytes | str) -> bool:
    return (text if isinstance(text, str) else text.decode(errors="replace")).strip("=-*#_ \t.") != ""


def _label(members: Sequence[tuple[str, str]]) -> str:
    nodes = compress_nodes({node for node, _ in members})
    ranks = compress_ranks({rank for _, rank in members})
    return f"{nodes}/{ranks}" if ranks else nodes


def compress_ranks(ranks: Collection[str]) -> str:
    """`3`, `[0-3,6]`; `-` for the launcher, empty for no rank."""
    numbers = sorted(int(rank) for rank in ranks if rank.isdigit())
    parts = sorted(rank for rank in ranks if rank and not rank.isdigit()) + _ranges(numbers, 0)
    text = ",".join(parts)
    return f"[{text}]" if len(parts) > 1 or "-" in text[1:] else text


def compress_nodes(names: Collection[str]) -> str:
    """`n1`, `n[1-4]`, `gpu[01-16]`, `head,n[1-2]`: names that differ only in their last number are joined."""
    families: dict[tuple[str, int, str], list[int]] = {}
    plain: list[str] = []
    for name in names:
        match = _NAME.fullmatch(name)
        if not match:
            plain.append(name)
            continue
        digits = match[2]
        width = len(digits) if digits.startswith("0") and len(digits) > 1 else 0
        families.setdefault((match[1], width, match[3]), []).append(int(digits))
    _join_padded(families)
    shown = sorted(plain)
    for (before, width, after), numbers in sorted(families.items()):
        ranges = ",".join(_ranges(sorted(numbers), width))
        several = len(numbers) > 1
        shown.append(f"{before}[{ranges}]{after}" if several else f"{before}{ranges}{after}")
    return ",".join(shown)


def _join_padded(families: dict[tuple[str, int, str], list[int]]) -> None:
    """`gpu10` belongs to `gpu09`'s family: two digits are padded to two."""
    for before, width, after in [key for key in families if key[1]]:
        rest = families.get((before, 0, after), [])
        fitting = [number for number in rest if len(str(number)) == width]
        families[before, width, after] += fitting
        left = [number for number in rest if number not in fitting]
        if rest and not left:
            del families[before, 0, after]
        elif rest:
            families[before, 0, after] = left


def _ranges(numbers: Sequence[int], width: int) -> list[str]:
    """Sorted numbers as `a-b` and `c`, zero-padded to `width`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in runs]


class FoldView:
    """Stands in for a View in `follow` of ended logs: collects, and `render` gives the folded text.

    Holds all that is shown in memory: for whole logs that are read once, not for following.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self._items: list[tuple[str, str, bytes]] = []
        self._lock = threading.Lock()

    def shows(self, node: str) -> bool:
        return self.view.shows(node)

    def formatter(self, node: str) -> Formatter:
        view = self.view

        def collect(whole: bytes) -> bytes:
            items = [
                (node, rank, text if view.raw else sanitize(text, color=view.color))
                for rank, text in split_lines(whole)
                if view.ranks is None or rank in view.ranks
            ]
            with self._lock:
                self._items += items
            return b""

        return collect

    def render(self) -> bytes:
        """All lines collected so far, folded, each with its label."""
        order = {name: place for place, name in enumerate(self.view.names)}
        with self._lock:
            # Stable: each rank's lines keep their order; the nodes come in the run's order.
            items = sorted(self._items, key=lambda item: order.get(item[0], len(order)))
        folded = [(group.members, _label(group.members), group.text) for group in merge(items)]
        width = max((len(label) for _, label, _ in folded), default=0)
        return b"".join(self._line(members, label, width, text) for members, label, text in folded)

    def _line(self, members: list[tuple[str, str]], label: str, width: int, text: bytes | str) -> bytes:
        assert isinstance(text, bytes)
        if not self.view.prefix:
            return text + b"\n"
        rank = members[0][1]
        end = RESET if self.view.color and rank == LAUNCHER else b""
        return paint(label, rank, width, self.view.color) + text + end + b"\n"
