"""Rows of equal length, cut from a stream of documents; and batches of rows.

The strategies (`data.strategy`), with L = seq_len:
- `pack`: all documents joined. Row k covers tokens k·L … k·L+L of the stream, so neighbouring rows share a
  token, and every token but the first of each document is a target exactly once. Nothing is padded.
- `fit`: likewise, but a document that fits into a row is never cut: the row before it is padded instead. For
  conversations, whose answers mean little without the question.
- `overflow`: each document for itself, in windows of L inputs that repeat the last `stride` inputs of the
  window before as context. Repeated targets do not count again, so here, too, each is one exactly once.
- `trunc`: the first window of each document only.
The last window of a document is padded. Documents without a target give no window.

Where a document begins is known from the stream, not from a token: GPT-2's BOS is its EOS, others have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from trainer.config import DataConfig
from trainer.data.lanes import Source
from trainer.errors import ConfigError, DataError

IGNORE = -100
"""The label of a position that is no target (torch's `cross_entropy` default)."""

PACKED = ("pack", "fit")
"""Strategies with several documents in a row."""

Batch = dict[str, torch.Tensor]


class Piece(NamedTuple):
    """Part of a document in a row."""

    epoch: int
    document: int
    begin: int
    """First token, counted in the document."""
    end: int

    def __str__(self) -> str:
        return f"epoch {self.epoch} document {self.document} tokens {self.begin}–{self.end - 1}"


@dataclass(frozen=True)
class Row:
    """`input_ids`, `labels` (already shifted) and `position_ids`: (L,) int32 each."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    pieces: tuple[Piece, ...] = ()

    def __str__(self) -> str:
        return ", ".join(map(str, self.pieces))


class Next(NamedTuple):
    """A row, and where the next one begins: (position in the source, offset)."""

    row: Row
    position: int
    offset: int


@dataclass(frozen=True)
class Cutter:
    """Cuts the row that begins at a given place; a pure function of source and place."""

    strategy: str
    seq_len: int
    stride: int
    pad_id: int
    cross_document: bool

    @classmethod
    def of(cls, data: DataConfig, pad_id: int) -> Cutter:
        """Raises ConfigError."""
        overflow = data.strategy == "overflow"
        if overflow and data.stride >= data.seq_len:
            raise ConfigError(
                f"data.stride={data.stride} must be smaller than data.seq_len={data.seq_len}:"
                " a window would bring nothing new",
                hint=f"Set data.stride={data.seq_len // 4}.",
            )
        return cls(data.strategy, data.seq_len, data.stride if overflow else 0, pad_id, data.cross_document)

    def row(self, source: Source, position: int, offset: int) -> Next | None:
        """None where nothing is left to predict. Raises DataError if the place is not in the document."""
        return (self._pack if self.strategy in PACKED else self._window)(source, position, offset)

    def filler(self) -> Row:
        """A row without targets."""
        tokens = np.full(self.seq_len + 1, self.pad_id, np.int32)
        return self._row(tokens, np.zeros(len(tokens), bool), self._positions(), [])

    def _pack(self, source: Source, position: int, offset: int) -> Next | None:
        size = self.seq_len + 1
        tokens = np.full(size, self.pad_id, np.int32)
        targets = np.zeros(size, bool)
        position_ids = self._positions()
        pieces = []
        filled = 0
        while item := source.item(position):
            if offset and offset >= len(item.tokens):
                raise _outside(item.index, offset, len(item.tokens))
            if self.strategy == "fit" and filled > 1 and filled + len(item.tokens) > size:
                break
            end = min(offset + size - filled, len(item.tokens))
            upto = filled + end - offset
            tokens[filled:upto] = item.tokens[offset:end]
            targets[filled:upto] = item.targets[offset:end]
            if not self.cross_document and upto > filled:
                position_ids[filled:] -= position_ids[filled]
            if upto > filled and filled < self.seq_len:
                pieces.append(Piece(item.epoch, item.index, offset, end))
            filled = upto
            if filled == size:
                if self.strategy == "fit" and end == len(item.tokens):
                    return Next(self._row(tokens, targets, position_ids, pieces), position + 1, 0)
                # the last target is the next row's first input
                return Next(self._row(tokens, targets, position_ids, pieces), position, end - 1)
            position, offset = position + 1, 0
        return Next(self._row(tokens, targets, position_ids, pieces), position, 0) if filled > 1 else None

    def _window(self, source: Source, position: int, window: int) -> Next | None:
        advance = self.seq_len - self.stride
        while item := source.item(position):
            count = len(item.tokens)
            begin = window * advance
            first = begin + (self.stride if window else 0) + 1
            if first < count:
                break
            if window:
                raise _outside(item.index, first, count)
            position += 1
        else:
            return None
        end = min(begin + self.seq_len + 1, count)
        tokens = np.full(self.seq_len + 1, self.pad_id, np.int32)
        targets = np.zeros(self.seq_len + 1, bool)
        tokens[: end - begin] = item.tokens[begin:end]
        targets[first - begin : end - begin] = item.targets[first:end]
        row = self._row(tokens, targets, self._positions(), [Piece(item.epoch, item.index, begin, end)])
        more = self.strategy == "overflow" and begin + advance + self.stride + 1 < count
        return Next(row, position, window + 1) if more else Next(row, position + 1, 0)

    def _positions(self) -> np.ndarray:
        return np.arange(self.seq_len + 1, dtype=np.int32)

    @staticmethod
    def _row(tokens: np.ndarray, targets: np.ndarray, position_ids: np.ndarray, pieces: Sequence[Piece]) -> Row:
        labels = np.where(targets[1:], tokens[1:], np.int32(IGNORE))
        return Row(tokens[:-1], labels, position_ids[:-1], tuple(pieces))


def collate(rows: Sequence[Row]) -> Batch:
    """B rows → `input_ids`, `labels` (already shifted), `position_ids`, each (B, L) int64.

    Positions start again with each document unless `data.cross_document`: transformers derives the mask
    that keeps packed documents apart from that, if it gets no attention mask and no cache. Padding goes on
    counting; it is behind all that attends causally.
    """
    return {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows]).astype(np.int64))
        for name in ("input_ids", "labels", "position_ids")
    }


def _outside(document: int, offset: int, count: int) -> DataError:
    return DataError(
        f"the checkpoint continues at token {offset} of document {document}, which has {count}: the data changed",
        hint="Use the original data and tokenizer, or checkpoint.resume=none.",
    )
