"""A part of a set of documents: what is held out for evaluation, and the rest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from trainer.data.documents import Document, Documents


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out): document indices, int64, each sorted; drawn with the seed.

    ⌈share · count⌉ documents are held out, but never all of them.
    """
    held = min(math.ceil(share * count), max(count - 1, 0))
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


class Subset:
    """The documents `indices` (distinct, sorted) of others, numbered anew from 0.

    The order is that of the whole set without the others, so it keeps the locality that a source's
    shuffle gives it (an MDS shard is read as a whole).
    """

    def __init__(self, documents: Documents, indices: np.ndarray) -> None:
        self._documents = documents
        self._indices = np.asarray(indices, np.int64)
        self.fingerprint = hashlib.sha256(documents.fingerprint.encode() + self._indices.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._indices)

    def order(self, epoch: int) -> np.ndarray:
        number = np.full(len(self._documents), -1, np.int64)
        number[self._indices] = np.arange(len(self))
        order = number[self._documents.order(epoch)]
        return order[order >= 0]

    def read(self, index: int) -> Document:
        return self._documents.read(int(self._indices[index]))

    def expect(self, indices: Sequence[int]) -> None:
        self._documents.expect(self._indices[np.asarray(indices, np.int64)].tolist())
