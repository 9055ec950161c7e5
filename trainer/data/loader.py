"""The training stream: which rows each rank gets in each step.

The only state is the number of rows consumed by all ranks together. Rows are consumed in global order,
so the next step's rows are the same at any world size, and an epoch's end need not meet a step's.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.packing import PackedDataset, collate
from trainer.errors import DataError

Batch = dict[str, torch.Tensor]


class BatchStream:
    """Micro-batches of one rank. `peek` does not move; `advance` is called once the step was taken."""

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        cross_document_attention: bool = False,
    ) -> None:
        self._dataset = dataset
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._share = global_batch // world_size
        self._first = rank * self._share
        self._cross = cross_document_attention
        self.position = 0
        """Rows consumed so far by all ranks."""
        if not len(dataset):
            raise DataError("the training split has no rows: more text, or a smaller data.holdout")

    @property
    def epoch(self) -> int:
        return self.position // len(self._dataset)

    def peek(self) -> list[Batch]:
        """This rank's micro-batches of the next step, each of (micro_batch, seq_len)."""
        start = self.position + self._first
        rows = [
            self._dataset.row(*divmod(index, len(self._dataset)))
            for index in range(start, start + self._share)
        ]
        size = self._micro_batch
        return [collate(rows[i : i + size], self._cross) for i in range(0, len(rows), size)]

    def advance(self) -> None:
        self.position += self._global_batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "rows": len(self._dataset),
            "fingerprint": self._dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state is of other data, where the position would mean other rows."""
        if state["fingerprint"] != self._dataset.fingerprint:
            raise DataError(
                f"the checkpoint was trained on other data ({state['rows']} rows, {state['fingerprint']};"
                f" here {len(self._dataset)} rows, {self._dataset.fingerprint}): cannot continue in it",
                hint="Use the original data, seq_len, vocab_size and seed, or checkpoint.resume=none.",
            )
        self.position = int(state["position"])
