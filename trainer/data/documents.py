"""Where documents come from, as packing sees it: random access, and an order for each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Document:
    tokens: np.ndarray
    """(n,) int32, with the tokenizer's BOS before and EOS after where it has them."""
    targets: np.ndarray | None = None
    """(n,) bool: whether token i may be a target (chat: the assistant's tokens only); None: all but the first."""


class Documents(Protocol):
    """A fixed, numbered set of documents; the same on every rank."""

    fingerprint: str
    """16 hex digits that change with the content, the tokenizer and the numbering."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> np.ndarray:
        """(len,) int64: a permutation, a pure function of (seed, epoch); the identity without shuffling."""
        ...

    def read(self, index: int) -> Document:
        """Document `index`; may fetch or tokenise. Safe to call in a forked loader process."""
        ...

    def expect(self, indices: Sequence[int]) -> None:
        """Hint: these will be read soon, in this order (starts downloads in the background)."""
        ...
