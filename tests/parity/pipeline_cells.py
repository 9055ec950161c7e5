"""Cells of the matrix for pipeline parallelism, alone and with the others, and faults that they must notice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from tests.parity.cells import Cell
from tests.parity.mutations import MUTATIONS
from trainer.distributed import pipeline_parallel
from trainer.distributed.pipeline_parallel import PipelinedModel

FEWEST = {"gpipe": 2, "1f1b": 2, "interleaved": 2, "zero_bubble": 4}
"""Micro-batches that the schedule needs on two pipeline ranks."""

DDP = ("parallel.strategy=ddp",)
GRAD_OP = ("parallel.strategy=shard_grad_op",)
TP = ("parallel.tensor=2",)
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
WHOLE_LOSS = ("parallel.tensor=2", "parallel.loss=false")


def _cell(
    schedule: str, world: int, *overrides: str, name: str = "", ranks: int = 2, times: int = 1, **fields: Any
) -> Cell:
    """`times` the fewest micro-batches, on `ranks` pipeline ranks of `world`."""
    count = FEWEST[schedule] * ranks // 2 * times
    layers = 8 if ranks == 4 and schedule == "zero_bubble" else 4
    fixed = (f"model.num_hidden_layers={layers}", f"parallel.pipeline={ranks}", f"parallel.schedule={schedule}")
    tag = "-".join(filter(None, [f"pp{ranks}", schedule, name, f"acc{count}"]))
    return Cell(tag, world, (*fixed, *overrides), accumulate=count, **fields)


def _cells() -> list[Cell]:
    cells = [_cell(schedule, 2, times=times) for schedule in FEWEST for times in (1, 3)]
    cells += [_cell(schedule, 4, ranks=4, times=times) for schedule in ("1f1b", "zero_bubble") for times in (1, 3)]
    cells += [_cell(schedule, 2, name="packed", packed=True) for schedule in FEWEST]
    for schedule in FEWEST:
        cells.append(_cell(schedule, 4, *DDP, name="ddp2"))
        cells.append(_cell(schedule, 4, *GRAD_OP, name="grad_op2"))
        cells.append(_cell(schedule, 4, *TP, name="tp2", times=3 if schedule == "1f1b" else 1))
    for schedule in ("1f1b", "zero_bubble"):
        cells.append(_cell(schedule, 4, *WHOLE_LOSS, name="tp2-whole_loss"))
        cells.append(_cell(schedule, 4, *SEQUENCE, name="tp2+sp", packed=True))
    cells.append(_cell("1f1b", 8, *GRAD_OP, *SEQUENCE, name="grad_op2xtp2+sp"))
    cells.append(_cell("zero_bubble", 8, *DDP, *TP, name="ddp2xtp2"))
    for family in ("qwen2", "qwen3"):
        cells.append(_cell("1f1b", 2, f"model.architecture={family}", name=family))
    cells.append(_cell("zero_bubble", 4, *SEQUENCE, "model.architecture=qwen3", name="qwen3-tp2+sp"))
    for precision in ("fp32", "bf16", "fp16"):
        cells.append(_cell("1f1b", 2, f"train.precision={precision}", name=precision))
        cells.append(_cell("zero_bubble", 4, *GRAD_OP, f"train.precision={precision}", name=f"grad_op2-{precision}"))
    for schedule, mode in (("1f1b", "full"), ("interleaved", "selective"), ("zero_bubble", "full")):
        cells.append(_cell(schedule, 2, f"train.activation_checkpoint={mode}", name=f"checkpoint_{mode}"))
    cells.append(_cell("1f1b", 2, "train.compile=true", "train.compile_backend=aot_eager", name="compiled"))
    return cells


def _broken_cells() -> list[Cell]:
    return [
        _cell("1f1b", 2, name="broken-gradients_scaled", mutation="pipeline_gradients_scaled"),
        _cell("1f1b", 2, name="broken-no_positions", packed=True, mutation="pipeline_no_positions"),
        _cell("1f1b", 2, name="broken-stage_order", mutation="pipeline_stage_order"),
        _cell("1f1b", 4, *TP, name="broken-tp2-counted_twice", mutation="pipeline_counted_twice"),
        _cell("1f1b", 4, *DDP, name="broken-ddp2-not_summed", mutation="pipeline_not_summed"),
    ]


def _gradients_scaled() -> AbstractContextManager[Any]:
    """torch's default: gradients are divided by the number of micro-batches."""

    def scaled(*args: Any, scale_grads: bool, **kwargs: Any) -> Any:
        return pipeline_parallel.Schedule1F1B(*args, scale_grads=not scale_grads, **kwargs)

    return patch.dict(pipeline_parallel._SCHEDULES, {"1f1b": scaled})


def _no_positions() -> AbstractContextManager[Any]:
    """Stages behind the first are not told where documents begin."""
    original = PipelinedModel._forward_of

    def forget(self: PipelinedModel, part: torch.nn.Module, stage: int) -> Callable[..., torch.Tensor]:
        forward = original(self, part, stage)
        return partial(_without_positions, forward) if stage else forward

    return patch.object(PipelinedModel, "_forward_of", forget)


def _without_positions(forward: Callable[..., torch.Tensor], value: torch.Tensor, **given: Any) -> torch.Tensor:
    return forward(value, **given | {"position_ids": None})


def _stage_order() -> AbstractContextManager[Any]:
    """The first stage has the last layers."""
    original = pipeline_parallel.split_layers
    return patch.object(pipeline_parallel, "split_layers", lambda *sizes: original(*sizes)[::-1])


MUTATIONS |= {
    "pipeline_gradients_scaled": _gradients_scaled,
    "pipeline_no_positions": _no_positions,
    "pipeline_stage_order": _stage_order,
    "pipeline_counted_twice": lambda: patch.object(PipelinedModel, "_counted", lambda self, loss: loss),
    "pipeline_not_summed": lambda: patch.object(pipeline_parallel, "shard_data_parallel", lambda *_: None),
}

CELLS: list[Cell] = [*_cells(), *_broken_cells()]
