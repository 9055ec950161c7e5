"""Lanes: as many endless streams of documents as the global batch has rows, whatever the number of ranks.

The permutations of all epochs, laid end to end, are one sequence: item g is document `order(g // N)[g % N]`
of the N documents. With V lanes, lane v reads the items v, v + V, v + 2V, … So every document of every
epoch is read exactly once, by one lane, also where V does not divide N or is larger: then a lane reads
some or all of an epoch's documents in none of its items, and its first item may belong to a later epoch.
Lanes with long documents fall behind others; each comes to its next epoch by itself.

Row v of every global batch is cut from lane v. What comes next in a lane is a pure function of its place,
so a lane may be continued by any rank and any process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from trainer.data.documents import Documents
from trainer.errors import DataError

_ALL_EMPTY = 10_000
"""So many documents in a row without a target in one lane are taken for a mistake."""


class Item(NamedTuple):
    """A document where it stands in the sequence."""

    epoch: int
    index: int
    tokens: np.ndarray
    """(n,) int32."""
    targets: np.ndarray
    """(n,) bool, the first one False: nothing in its document comes before it."""


class Source(Protocol):
    """Documents one after the other; None after the last."""

    def item(self, position: int) -> Item | None: ...


class Place(NamedTuple):
    """Where a lane goes on."""

    position: int = 0
    """Items of the lane that are read to their end."""
    offset: int = 0
    """Into the next item: its first token for `pack`, its window for `overflow`."""
    document: int = -1
    """Which document that item is, as a check that the order is still the same; -1: unknown."""


def read_item(documents: Documents, epoch: int, index: int) -> Item:
    document = documents.read(index)
    targets = np.ones(len(document.tokens), bool) if document.targets is None else document.targets.copy()
    targets[:1] = False
    return Item(epoch, index, document.tokens, targets)


class Orders:
    """The epochs' permutations; those of the last few epochs asked for are kept."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._count = len(documents)
        self._kept: dict[int, np.ndarray] = {}
        # lanes drift apart, over several epochs where these are small; large ones take memory
        self._room = min(64, max(2, 2**22 // max(self._count, 1)))

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, document) of item `number` of the sequence."""
        epoch, rank = divmod(number, self._count)
        order = self._kept.pop(epoch, None)
        if order is None:
            order = self._documents.order(epoch)
            if self._count < 2**31:
                order = order.astype(np.int32)
            while len(self._kept) >= self._room:
                del self._kept[next(iter(self._kept))]
        self._kept[epoch] = order  # the last one is the one used last
        return epoch, int(order[rank])


class Lane:
    """Lane `number` of `count`, as a Source without end. Keeps the document read last."""

    def __init__(self, documents: Documents, orders: Orders, number: int, count: int) -> None:
        self._documents, self._orders = documents, orders
        self._number, self._count = number, count
        self._position = -1
        self._item: Item | None = None
        self._empty = 0

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, document) of the lane's item `position`."""
        return self._orders.locate(self._number + position * self._count)

    def item(self, position: int) -> Item:
        """Raises DataError after very many documents in a row without a target."""
        if self._item is not None and position == self._position:
            return self._item
        self._item = read_item(self._documents, *self.locate(position))
        self._position = position
        self._empty = 0 if len(self._item.tokens) > 1 else self._empty + 1
        if self._empty > _ALL_EMPTY:
            raise DataError(
                f"{self._empty} documents in a row have fewer than two tokens (the last one is {self._item.index})",
                hint="Look at data.source, data.path and data.column.",
            )
        return self._item

    def mark(self, position: int, offset: int) -> Place:
        return Place(position, offset, self.locate(position)[1])

    def check(self, place: Place) -> None:
        """Raises DataError if another document stands at the place now."""
        found = self.locate(place.position)[1]
        if place.document not in (-1, found):
            raise DataError(
                f"the order of the documents changed: lane {self._number} was to go on with document"
                f" {place.document}, where document {found} stands now",
                hint="Use the versions of numpy and mosaicml-streaming that the run began with,"
                " or checkpoint.resume=none.",
            )


class Listed:
    """The documents `indices` of epoch 0, once, as a Source."""

    def __init__(self, documents: Documents, indices: Sequence[int]) -> None:
        self._documents, self._indices = documents, indices
        self._position = -1
        self._item: Item | None = None

    def item(self, position: int) -> Item | None:
        if position >= len(self._indices):
            return None
        if self._item is None or position != self._position:
            self._item = read_item(self._documents, 0, int(self._indices[position]))
            self._position = position
        return self._item
