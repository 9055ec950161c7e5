"""Held-out loss and perplexity, exact at any world size and in any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.data.packing import IGNORE
from trainer.data.stream import EvalRows
from trainer.distributed.parallel_model import ParallelModel


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy per target token, in nats."""
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(model: ParallelModel, rows: EvalRows) -> Evaluation:
    """Every target token of `rows` counts once; sums are all-reduced. The model goes back to train mode.

    All ranks run equally many forward passes, since those of a sharded model are collective (EvalRows sees to it).
    """
    mesh = model.mesh
    total, count = 0.0, 0
    model.train(False)
    try:
        for batch in rows:
            if mesh.counts_rows:
                count += int((batch["labels"] != IGNORE).sum())
            total += model.evaluate(batch).item()
    finally:
        model.train()
    loss_sum, tokens = mesh.comm.sum([total, count])
    return Evaluation(loss_sum / tokens if tokens else math.nan, int(tokens))
