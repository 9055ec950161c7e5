"""Made-up tokens: for tests, dry runs and measurements, without a tokenizer or a disk."""

from __future__ import annotations

import numpy as np

from trainer.config import DataConfig
from trainer.data.sources.base import Site, Store, digest

DOCUMENTS = 100_000
"""How many, without data.limit."""
BOS_ID, EOS_ID, FIRST_ID = 0, 1, 3
"""As in the tokenizers that the trainer trains: BOS, EOS, PAD come first."""


class SyntheticTokens(Store):
    """Uniform tokens in documents of ragged length (log-normal, on average about `mean_length` tokens).

    Each is a pure function of (seed, index), so nothing is stored.
    """

    kind = "tokens"

    def __init__(self, count: int, vocab_size: int, seed: int, mean_length: int) -> None:
        self._count, self._vocab_size, self._seed, self._mean_length = count, vocab_size, seed, mean_length
        self.fingerprint = digest([f"synthetic {count} {vocab_size} {seed} {mean_length}".encode()])

    def __len__(self) -> int:
        return self._count

    def get(self, index: int) -> np.ndarray:
        random = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        # the mean of a log-normal is median * exp(sigma² / 2)
        length = max(3, int(self._mean_length * np.exp(random.normal(-0.32, 0.8))))
        tokens = random.integers(min(FIRST_ID, self._vocab_size - 1), self._vocab_size, length, dtype=np.int32)
        tokens[0], tokens[-1] = BOS_ID, EOS_ID
        return tokens


def synthetic(data: DataConfig, site: Site) -> Store:
    """`data.limit` documents whose mean length is a row's."""
    return SyntheticTokens(data.limit or DOCUMENTS, site.vocab_size, site.seed, data.seq_len)
