"""What one rank of a parity group does: all cells, one after the other, in one process group."""

from __future__ import annotations

import contextlib
import json
import math
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.parity import pipeline_cells  # noqa: F401  (adds its mutations)
from tests.parity.cells import Cell
from tests.parity.mutations import MUTATIONS
from tests.parity.reference import Reference, build_model, error, loss_scale
from trainer.config import check_world
from trainer.distributed.data_parallel import uses_fsdp
from trainer.distributed.env import RankEnv
from trainer.distributed.gradients import global_norm, multiply_
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh
from trainer.distributed.parallel_model import Batch, ParallelModel
from trainer.distributed.process_group import Communicator
from trainer.models import parallelize, weights
from trainer.models.loss import install_loss


def run(rank: int, world: int, port: int, cells: Sequence[Cell], folder: Path) -> None:
    """Writes `folder/<cell>.<rank>.json` for each cell; stops at the first that raises, since its peers may hang."""
    log = os.open(folder / f"rank.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    comm = Communicator(RankEnv(rank, rank, world, world, master_port=port), torch.device("cpu"), 60)
    meshes: dict[Layout, Mesh] = {}
    for cell in cells:
        if cell.layout not in meshes:
            meshes[cell.layout] = Mesh(cell.layout, comm)
        print(f"--- {cell.name}", flush=True)
        try:
            result = _run_cell(cell, meshes[cell.layout], folder)
        except BaseException:
            _write(folder / f"{cell.name}.{rank}.json", {"failure": traceback.format_exc()})
            raise
        _write(folder / f"{cell.name}.{rank}.json", result)
    comm.close()


def _write(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(path)


def _run_cell(cell: Cell, mesh: Mesh, folder: Path) -> dict[str, Any]:
    truth: Reference = torch.load(folder / f"{reference_name(cell)}.pt", weights_only=False)
    config = cell.config
    check_world(config, cell.layout)
    mutate = MUTATIONS[cell.mutation] if cell.mutation else contextlib.nullcontext
    with mutate():
        with torch.device("meta"):
            model = build_model(config, torch.float64 if config.train.precision == "fp64" else torch.float32)
        install_loss(model, "plain")
        parallel = parallelize.parallelize(model, config, mesh, _filler(truth.weights))
        return _measure(parallel, truth, cell, loss_scale(config))


def reference_name(cell: Cell) -> str:
    """Cells with the same name share a reference; low precision has its own for each way to cast."""
    config, model = cell.config, cell.config.model
    sizes = (model.hidden_size, model.num_hidden_layers, model.vocab_size)
    precision = config.train.precision
    tuned = "lora" if model.lora.rank else "full"
    if precision in ("bf16", "fp16"):
        precision += "-module" if casts_module(cell) else "-autocast"
    tied = "tied" if model.tie_word_embeddings else "untied"
    packed = "packed" if cell.packed else "whole"
    return "-".join(map(str, ("ref", model.architecture, *sizes, tied, tuned, cell.rows, packed, precision)))


def casts_module(cell: Cell) -> bool:
    return uses_fsdp(cell.config, cell.layout)


def _filler(values: dict[str, torch.Tensor]) -> Callable[[Sequence[nn.Module]], None]:
    def fill(parts: Sequence[nn.Module]) -> None:
        weights.materialise(parts, torch.device("cpu"))
        for part in parts:
            with torch.no_grad():
                for name, parameter in part.named_parameters():
                    piece = _piece(values[name], parameter)
                    assert torch.equal(piece, values[name][weights.local_slices(parameter)]), name
                    _local(parameter).copy_(piece)
                for name, buffer in part.named_buffers():
                    buffer.copy_(values[name])

    return fill


def _piece(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part: cut by `tp` first, then by FSDP2, as its strided shards are defined."""
    if isinstance(like, DTensor):
        coordinate = like.device_mesh.get_coordinate()
        assert coordinate is not None
        for axis in reversed(range(like.device_mesh.ndim)):
            placement = like.placements[axis]
            if not placement.is_replicate():
                pieces = torch.chunk(whole, like.device_mesh.size(axis), dim=placement.dim)
                empty = whole.narrow(placement.dim, 0, 0)
                whole = [*pieces, *[empty] * like.device_mesh.size(axis)][coordinate[axis]]
    return whole


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _measure(model: ParallelModel, truth: Reference, cell: Cell, factor: float) -> dict[str, Any]:
    """Two rounds, since the second must not see what the first has left."""
    comm = model.mesh.comm
    batches = _share(truth.batch, cell, model.mesh)
    result: dict[str, Any] = {"errors": {}, "loss": [], "norm": []}
    result["held"] = sum(_local(parameter).numel() for _, parameter in model.named_parameters())
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.train(False)
    result["eval_loss"] = comm.sum([sum(float(model.evaluate(batch)) for batch in batches)])[0]
    model.train(True)
    for _ in range(2):
        contribution = model.forward_backward(batches, factor / truth.tokens)
        assert contribution.dtype == torch.float64
        result["loss"].append(comm.sum([float(contribution)])[0])
        result["norm"].append(global_norm(model) / factor)
        for name, parameter in trained:
            gradient, expected = parameter.grad, truth.gradients.get(name)
            found = math.inf
            if gradient is not None and expected is not None:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                found = error(whole.double() / factor, expected)
            result["errors"][name] = max(found, result["errors"].get(name, 0.0))
        last = [parameter.grad for _, parameter in trained]
        model.zero_grad()
        assert all(parameter.grad is None for _, parameter in model.named_parameters())
    for (_, parameter), gradient in zip(trained, last, strict=True):
        parameter.grad = gradient
    multiply_(model, 0.5)
    result["halved"] = global_norm(model) / factor
    result["poisoned"] = _poisoned_norm(model)
    return result


def _share(batch: Batch, cell: Cell, mesh: Mesh) -> list[Batch]:
    """This rank's contiguous rows of the global batch, in micro-batches."""
    micro = cell.config.train.micro_batch
    mine = {name: value.chunk(mesh.layout.data)[mesh.data_rank] for name, value in batch.items()}
    pieces = {name: value.split(micro) for name, value in mine.items()}
    return [{name: pieces[name][index] for name in pieces} for index in range(cell.accumulate)]


def _poisoned_norm(model: ParallelModel) -> bool:
    """Whether the norm stays finite on this rank when one number on the last rank is not."""
    if model.mesh.comm.env.rank == model.mesh.comm.world_size - 1:
        for _, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None and _local(gradient).numel():
                _local(gradient).view(-1)[-1] = torch.inf
                break
    return bool(torch.isfinite(torch.tensor(global_norm(model))))
