"""Pipeline parallelism with torch.distributed.pipelining: each rank holds some of the decoder layers.

A stage is the transformers model itself without the layers of the others, so that parameter names stay those
of the whole model. All micro-batches of a step go through one run of the schedule: the accumulation is the
pipeline's micro-batches, and gradients are summed over data-parallel ranks once, at its end.

Schedules: GPipe (arXiv:1811.06965), 1F1B (arXiv:1806.03377), interleaved 1F1B (arXiv:2104.04473) and the
zero-bubble ZB-V (arXiv:2401.10241), whose rank r holds stages r and 2·ranks − 1 − r.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from trainer.config import Config
from trainer.distributed.data_parallel import compute_precision, shard_data_parallel, uses_fsdp
from trainer.distributed.mesh import Mesh
from trainer.distributed.parallel_model import Batch, ParallelModel
from trainer.distributed.tensor_parallel import apply_tensor_parallel, loss_context
from trainer.errors import ConfigError
from trainer.models.loss import install_loss
from trainer.models.memory import apply_activation_checkpoint, compile_layers

FAMILIES = ("llama", "qwen2", "qwen3")
"""transformers model types that can be cut: `model.embed_tokens`, `.layers`, `.norm`, and an own `lm_head`."""

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleZBVZeroBubble,
}

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def stages_per_rank(config: Config) -> int:
    return {"interleaved": config.parallel.stages_per_rank, "zero_bubble": 2}.get(config.parallel.schedule, 1)


def stage_owner(stage: int, ranks: int, schedule: str) -> int:
    """The pipeline rank that holds `stage`: round and round, or down and up again (zero_bubble)."""
    row, column = divmod(stage, ranks)
    return ranks - 1 - column if schedule == "zero_bubble" and row % 2 else column


def split_layers(layers: int, stages: int, head: float) -> list[range]:
    """The decoder layers of each stage: consecutive, at least one, the slowest stage as fast as can be.

    A layer costs 1 and the output head, on the last stage, `head` (their ratio of parameters in matrix
    products). The embedding takes memory but no time, and early stages keep more micro-batches in flight:
    among equals the later stages get more layers.
    """
    counts = [1] * stages
    costs = [1.0] * stages
    costs[0] += 1e-6
    costs[-1] += head
    for _ in range(layers - stages):
        cheapest = max(index for index, cost in enumerate(costs) if cost == min(costs))
        counts[cheapest] += 1
        costs[cheapest] += 1
    ends = [sum(counts[: index + 1]) for index in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def build(
    model: nn.Module, config: Config, mesh: Mesh, materialise: Callable[[Sequence[nn.Module]], None]
) -> PipelinedModel:
    """Cuts `model`, which is on the meta device, into this rank's stages and applies the other parallelisms to them.

    `materialise(parts)` allocates the parts on `mesh.comm.device` and fills them, initialised or loaded.
    Raises ConfigError, naming the key, for a model or a recipe that cannot be cut.
    """
    ranks, each = mesh.layout.pipeline, stages_per_rank(config)
    count = ranks * each
    check_model(model, config, count)
    layers: nn.ModuleList = model.model.layers  # type: ignore[assignment,union-attr]
    head = model.lm_head.weight.numel() / sum(p.numel() for p in layers[0].parameters())  # type: ignore[union-attr]
    plan = split_layers(len(layers), count, head)
    mine = [
        stage for stage in range(count) if stage_owner(stage, ranks, config.parallel.schedule) == mesh.pipeline_rank
    ]
    parts = [_cut(model, config, plan[stage], first=stage == 0, last=stage == count - 1) for stage in mine]
    for part in parts:
        apply_tensor_parallel(part, config, mesh)
        apply_activation_checkpoint(part, config.train.activation_checkpoint)
        if config.train.compile:
            compile_layers(part, config.train.compile_backend)
        shard_data_parallel(part, config, mesh)
    materialise(parts)
    return PipelinedModel(parts, mine, count, config, mesh)


def check_model(model: nn.Module, config: Config, stages: int) -> None:
    """Raises ConfigError unless `model` can be cut into `stages` (recipe-only checks are in config/checks.py)."""
    settings: Any = model.config
    if settings.model_type not in FAMILIES:
        raise ConfigError(
            f"there is no pipeline plan for the {settings.model_type!r} architecture",
            hint=f"Set parallel.pipeline=1 (plans exist for {', '.join(FAMILIES)}).",
        )
    if settings.tie_word_embeddings:
        raise ConfigError(
            f"tied embeddings of {config.model.pretrained or settings.model_type} would lie on the first and"
            " the last pipeline stage",
            hint="Set parallel.pipeline=1, or model.tie_word_embeddings=false for random weights.",
        )
    layers = settings.num_hidden_layers
    if layers < stages:
        each = stages_per_rank(config)
        raise ConfigError(
            f"the model's {layers} layers cannot be cut into {stages} pipeline stages",
            hint=f"Set parallel.pipeline to at most {layers // each}.",
        )


def _cut(model: nn.Module, config: Config, kept: range, *, first: bool, last: bool) -> nn.Module:
    """A copy of `model` with only the layers `kept`, under their own names."""
    part = copy.deepcopy(model)
    body: Any = part.model
    for index in range(len(body.layers)):
        if index not in kept:
            delattr(body.layers, str(index))  # the list then keeps the other layers' numbers
    if not first:
        body.embed_tokens = None
    if not last:
        body.norm = nn.Identity()
        part.lm_head = None  # type: ignore[assignment]
    elif config.parallel.schedule == "zero_bubble":
        install_loss(part, "plain")  # check_model says why
    return part


class PipelinedModel(ParallelModel):
    """This rank's stages and the schedule that runs them."""

    def __init__(
        self, parts: Sequence[nn.Module], stages: Sequence[int], count: int, config: Config, mesh: Mesh
    ) -> None:
        """`parts[i]` is stage `stages[i]` of `count`; gets the forward pass of a stage in place of its own."""
        self.mesh = mesh
        self.parts = parts
        self._stages = stages
        self._count = count
        self._config = config
        self._group = mesh["pp"].get_group()
        self._dtype = _DTYPES[config.train.precision]
        autocast = self._dtype.itemsize == 2 and not uses_fsdp(config, mesh.layout)
        self._stream = torch.float32 if autocast else self._dtype
        self._schedule: Any = None
        self._schedule_for: tuple[int, ...] = ()
        self._scale = 1.0
        self._loss = torch.zeros((), dtype=torch.float64, device=mesh.comm.device)
        for part, stage in zip(parts, stages, strict=True):
            part.forward = self._forward_of(part, stage)  # type: ignore[method-assign]

    @property
    def _has_last(self) -> bool:
        return self._count - 1 in self._stages

    def forward_backward(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        device = self.mesh.comm.device
        rows = {
            name: torch.stack([batch[name] for batch in batches]).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "labels")
        }
        schedule = self._schedule_of(*rows["labels"].shape)
        rows = {name: value.flatten(0, 1) for name, value in rows.items()}
        inputs = (rows["input_ids"],) if 0 in self._stages else ()
        self._scale = scale
        self._loss.zero_()
        with loss_context(self._config, self.mesh):
            schedule.step(
                *inputs,
                target=rows["labels"] if self._has_last else None,
                return_outputs=False,
                position_ids=rows["position_ids"],
                labels=rows["labels"],
            )
        return self._counted(self._loss.clone())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Stage after stage; ranks that are done return at once, so that consecutive batches overlap."""
        device = self.mesh.comm.device
        rows = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        ranks, schedule = self.mesh.layout.pipeline, self._config.parallel.schedule
        value, at = rows["input_ids"], 0
        for stage, part in zip(self._stages, self.parts, strict=True):
            if stage and (source := stage_owner(stage - 1, ranks, schedule)) != self.mesh.pipeline_rank:
                value = torch.empty(self._activation(*rows["labels"].shape), dtype=self._dtype, device=device)
                dist.recv(value, group=self._group, group_src=source)
            with loss_context(self._config, self.mesh):
                value = part(value, position_ids=rows["position_ids"], labels=rows["labels"])
            at = stage + 1
            if at < self._count and (target := stage_owner(at, ranks, schedule)) != self.mesh.pipeline_rank:
                dist.send(value, group=self._group, group_dst=target)
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # what forward gathered would otherwise stay, and hide the sharded parameters
        return self._counted(value.double() if self._has_last else torch.zeros_like(self._loss))

    def _counted(self, loss: torch.Tensor) -> torch.Tensor:
        counts = self._has_last and self.mesh.tensor_rank == 0
        return loss if counts else torch.zeros_like(loss)

    def _activation(self, rows: int, length: int) -> tuple[int, int, int]:
        """The shape of what passes between stages."""
        return rows, length, self.parts[0].config.hidden_size  # type: ignore[union-attr]

    def _forward_of(self, part: Any, stage: int) -> Callable[..., torch.Tensor]:
        """(B, L) token ids or (B, L, hidden) → (B, L, hidden), or the summed loss of the last stage."""
        whole: Callable[..., Any] = part.forward
        first, last = stage == 0, stage == self._count - 1

        def forward(value: torch.Tensor, *, position_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            # under autocast a whole model adds up its residual stream in fp32: go on so behind the boundary
            value = value if first else value.to(self._stream)
            given = {"input_ids" if first else "inputs_embeds": value, "position_ids": position_ids}
            with compute_precision(self._config, self.mesh):
                if last:
                    out = whole(**given, use_cache=False, labels=labels)
                else:
                    out = part.model(**given, use_cache=False).last_hidden_state.to(self._dtype)
            # the split backward pass detaches a stage's output in place, which a view cannot be
            return out.clone() if out._is_view() else out

        return forward

    def _scaled(self, loss: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        """The schedule's loss function: notes the loss of a micro-batch and scales it for the backward pass."""
        self._loss += loss.detach().double()
        return loss * self._scale

    def _schedule_of(self, count: int, rows: int, length: int) -> Any:
        """The schedule for `count` micro-batches of (rows, length); made anew only when these change."""
        if self._schedule_for == (count, rows, length):
            return self._schedule
        device = self.mesh.comm.device
        # Given shapes, the stages need no trial run to find them out.
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        hidden = torch.empty(self._activation(rows, length), dtype=self._dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                part,
                stage,
                self._count,
                device,
                input_args=hidden if stage else tokens,
                output_args=hidden if stage < self._count - 1 else loss,
                group=self._group,
            )
            for part, stage in zip(self.parts, self._stages, strict=True)
        ]
        kind = self._config.parallel.schedule
        self._schedule = _SCHEDULES[kind](
            stages[0] if kind in ("gpipe", "1f1b") else stages,
            n_microbatches=count,
            loss_fn=self._scaled,
            scale_grads=False,  # the loss is a sum: nothing is to be divided by the number of micro-batches
        )
        self._schedule_for = (count, rows, length)
        return self._schedule
