"""Putting a model into a layout: which parallelism is applied in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from trainer.config import Config
from trainer.distributed import pipeline_parallel
from trainer.distributed.data_parallel import DataParallelModel, shard_data_parallel
from trainer.distributed.mesh import Mesh
from trainer.distributed.parallel_model import ParallelModel
from trainer.distributed.tensor_parallel import apply_tensor_parallel, complete_gradients
from trainer.models.memory import apply_activation_checkpoint, compile_layers


def parallelize(
    model: nn.Module, config: Config, mesh: Mesh, materialise: Callable[[Sequence[nn.Module]], None]
) -> ParallelModel:
    """`model`, a transformers causal LM on the meta device or the CPU, in the layout of `mesh`.

    `materialise(parts)` is called once everything is sharded; it puts parameters and buffers on the device and
    fills them; it must keep tied parameters tied. Raises ConfigError if the architecture cannot be laid out so.
    """

    def fill(parts: Sequence[nn.Module]) -> None:
        materialise(parts)
        for part in parts:
            complete_gradients(part)

    if mesh.layout.pipeline > 1:
        return pipeline_parallel.build(model, config, mesh, fill)
    apply_tensor_parallel(model, config, mesh)
    apply_activation_checkpoint(model, config.train.activation_checkpoint)
    if config.train.compile:
        compile_layers(model, config.train.compile_backend)
    shard_data_parallel(model, config, mesh)
    fill([model])
    return DataParallelModel(model, config, mesh)
