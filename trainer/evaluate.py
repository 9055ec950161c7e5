"""Held-out loss and perplexity, exact at any world size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from trainer.data.packing import IGNORE, PackedDataset, collate
from trainer.distributed.process_group import Communicator


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy per target token, in nats."""
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def summed_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the valid labels of a batch of (B, L); a scalar, at least fp32.

    No attention mask and no cache: only then do transformers' models keep packed documents apart.
    """
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits.flatten(0, 1)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PackedDataset,
    comm: Communicator,
    *,
    micro_batch: int,
    cross_document_attention: bool,
) -> Evaluation:
    """Every target token of epoch 0 counts once: rank r takes rows r, r + world, …; sums are all-reduced.

    The model goes back to the mode it was in.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    count = 0
    mine = range(comm.env.rank, len(dataset), comm.world_size)
    for start in range(0, len(mine), micro_batch):
        rows = [dataset.row(0, index) for index in mine[start : start + micro_batch]]
        batch = collate(rows, cross_document_attention)
        count += int((batch["labels"] != IGNORE).sum())
        batch = {name: tensor.to(comm.device) for name, tensor in batch.items()}
        total += summed_loss(model, batch).double()
    model.train(was_training)
    loss_sum, tokens = comm.sum([total.item(), count])
    return Evaluation(loss_sum / tokens if tokens else math.nan, int(tokens))
