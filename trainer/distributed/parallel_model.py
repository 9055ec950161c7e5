"""What the loop, evaluation and checkpoints see of a model, however it is spread over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from trainer.distributed.mesh import Mesh

Batch = dict[str, torch.Tensor]
"""`input_ids`, `labels` (already shifted, IGNORE = -100 where there is no target), `position_ids`: (B, L) int64."""


class ParallelModel(ABC):
    """A causal language model in one layout.

    Gradients are exact sums: after `forward_backward(batches, scale)` the `.grad` of each parameter is
    d(scale · Σ cross-entropy over the valid labels of ALL data-parallel ranks' batches) / d parameter, as a
    plain tensor or as a DTensor without Partial placements. No layout divides by a number of ranks.
    """

    mesh: Mesh
    parts: Sequence[nn.Module]
    """This rank's pieces (one; under the pipeline one per stage). Parameter names are those of the whole model."""

    @abstractmethod
    def forward_backward(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        """Accumulates gradients over this rank's micro-batches of one step (tensors may be on the CPU).

        → this rank's contribution, fp64, to the step's summed loss (unscaled): summed over ALL ranks of the
        world it counts every valid label once. So it is 0 on ranks that only repeat a peer's loss.
        """

    @abstractmethod
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The summed loss of one batch without gradients; the same rule for who counts, in eval mode if the caller
        set it with `train(False)`. Collective: tensor and pipeline peers call it with the same batch; where
        parameters are sharded all ranks call it equally often (labels all IGNORE once a rank is out of rows)."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters (tied ones once), named as in the whole model."""
        for part in self.parts:
            yield from part.named_parameters()

    def train(self, mode: bool = True) -> None:
        for part in self.parts:
            part.train(mode)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def settle(self, backward: Callable[[], object]) -> None:  # noqa: B027
        """Called before a checkpoint is loaded: runs `backward` (one discarded step) as often as the layout
        needs to reach the state of a model that has trained already. Default: not at all."""
