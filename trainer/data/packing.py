"""Documents packed into rows of equal length, as a pure function of (seed, epoch, index).

Each document becomes `<s> tokens </s>`. All documents, in the epoch's order, form one stream of tokens;
row k is tokens k·L … k·L+L of it, so neighbouring rows share one token and every token is a target
exactly once. `<s>` is never a target: what comes before it belongs to another document. The last row is
padded, not dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from trainer.data.tokenizer import BOS_ID, EOS_ID, PAD_ID

IGNORE = -100
"""The label of a position that is no target (torch's `cross_entropy` default)."""


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each document with BOS before and EOS after, int32."""
    tokenizer.encode_special_tokens = True  # a literal "<s>" in the text is text
    encoded = tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    return [np.asarray([BOS_ID, *item.ids, EOS_ID], dtype=np.int32) for item in encoded]


class PackedDataset:
    """Rows of `seq_len + 1` tokens. `shuffle` gives each epoch a new order of documents and rows."""

    def __init__(self, documents: Sequence[np.ndarray], seq_len: int, seed: int, shuffle: bool) -> None:
        self._documents = list(documents)
        self._seed = seed
        self._shuffle = shuffle
        self.seq_len = seq_len
        self.tokens = sum(len(document) for document in self._documents)
        self.rows = -(-max(self.tokens - 1, 0) // seq_len)
        self._epoch = -1
        self._stream = np.empty(0, dtype=np.int32)
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.rows

    @property
    def fingerprint(self) -> str:
        """Changes with any token, the row length, the seed or the shuffling."""
        digest = hashlib.sha256(f"{self.seq_len} {self._seed} {self._shuffle}".encode())
        for document in self._documents:
            digest.update(document.tobytes())
        return digest.hexdigest()[:16]

    def row(self, epoch: int, index: int) -> np.ndarray:
        """Row `index` of `epoch`: (seq_len + 1) tokens, padded with PAD_ID at the end of the stream."""
        if epoch != self._epoch:
            self._arrange(epoch)
        start = int(self._order[index]) * self.seq_len
        tokens = self._stream[start : start + self.seq_len + 1]
        return np.pad(tokens, (0, self.seq_len + 1 - len(tokens)), constant_values=PAD_ID)

    def _arrange(self, epoch: int) -> None:
        documents: Sequence[int] = range(len(self._documents))
        order = np.arange(self.rows)
        if self._shuffle:
            # counter-based, so the same on every machine and without history
            random = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            documents = random.permutation(len(self._documents)).tolist()
            order = random.permutation(self.rows)
        self._stream = np.concatenate([self._documents[index] for index in documents])
        self._order = order
        self._epoch = epoch


def collate(rows: Sequence[np.ndarray], cross_document_attention: bool) -> dict[str, torch.Tensor]:
    """B rows of L+1 tokens → `input_ids`, `labels` (already shifted), `position_ids`, each (B, L) int64.

    Positions start again with each document: transformers derives the mask that keeps packed documents
    apart from that, if it gets no attention mask and no cache.
    """
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    labels[(labels == BOS_ID) | (labels == PAD_ID)] = IGNORE
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    if not cross_document_attention:
        starts = torch.where(inputs == BOS_ID, positions, 0)
        positions = positions - starts.cummax(dim=1).values
    return {"input_ids": inputs, "labels": labels, "position_ids": positions.contiguous()}
