"""What a source is made of: a store of records with random access, and the documents made from them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.data.documents import Document


@dataclass(frozen=True)
class Site:
    """Where and for whom a source is opened."""

    cache: Path
    """Shared by all processes of this node; made when needed."""
    leader: bool = True
    """Whether this process prepares what its node has only once (the node's rank 0)."""
    say: Callable[[str], None] = print
    seed: int = 0
    vocab_size: int = 2048
    """Only for sources that make tokens up."""


class Store(ABC):
    """A fixed, numbered set of records; the same on every rank. Safe to read after a fork."""

    kind: Literal["text", "tokens", "messages"] = "text"
    """What `get` returns: a str, a 1-D integer array, or a list of `{role, content}`."""
    fingerprint: str
    """16 hex digits that change with the content and the numbering."""
    tokenizer: str | None = None
    """kind `tokens`: fingerprint of the tokenizer that made them, where it is known."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, index: int) -> Any: ...

    def where(self, index: int) -> str:
        """Record `index`, named for an error message."""
        return f"record {index}"

    def permutation(self, seed: int, epoch: int) -> np.ndarray:
        """(len,) int64: a pure function of (seed, epoch), the same on every machine."""
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self))

    def expect(self, indices: Sequence[int]) -> None:  # noqa: B027 - most stores have nothing to fetch
        """Hint: these will be read soon, in this order."""


class ListStore(Store):
    """Texts in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(texts)
        self.fingerprint = digest(text.encode("utf-8", "surrogatepass") for text in self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, index: int) -> str:
        return self._texts[index]


class First(Store):
    """The first records of a store, in an order that keeps the store's locality."""

    def __init__(self, store: Store, count: int) -> None:
        self._store = store
        self._count = min(count, len(store))
        self.kind, self.tokenizer = store.kind, store.tokenizer
        self.fingerprint = digest([store.fingerprint.encode(), str(self._count).encode()])

    def __len__(self) -> int:
        return self._count

    def get(self, index: int) -> Any:
        return self._store.get(index)

    def where(self, index: int) -> str:
        return self._store.where(index)

    def expect(self, indices: Sequence[int]) -> None:
        self._store.expect(indices)

    def permutation(self, seed: int, epoch: int) -> np.ndarray:
        whole = self._store.permutation(seed, epoch)
        return whole[whole < self._count]


class StoreDocuments:
    """The `Documents` of a store: `encode` makes one of a record."""

    def __init__(
        self,
        store: Store,
        encode: Callable[[Store, int], Document],
        *,
        seed: int,
        shuffle: bool,
        fingerprint: str,
    ) -> None:
        self._store, self._encode = store, encode
        self._seed, self._shuffle = seed, shuffle
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._store)

    def order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self), dtype=np.int64)
        return self._store.permutation(self._seed, epoch)

    def read(self, index: int) -> Document:
        return self._encode(self._store, int(index))

    def expect(self, indices: Sequence[int]) -> None:
        self._store.expect(indices)


def digest(parts: Iterable[bytes]) -> str:
    """16 hex digits of SHA-256 over the parts and their lengths."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:16]
