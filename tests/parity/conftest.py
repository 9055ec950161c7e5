"""Runs the cells of the matrix: one process group for each world size, which does all the cells that were asked for."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import rank
from tests.parity.cells import Cell
from tests.parity.reference import Reference, reference

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.parity.rank",
        *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3", "gpt2")),
    ]
)
PATIENCE = 90.0
"""Seconds that a group may take for one cell."""

Results = Callable[[Cell], tuple[Reference, list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """`results(cell)`: the reference, and what each rank measured."""
    items = request.session.items
    wanted = [item.callspec.params["cell"] for item in items if hasattr(item, "callspec")]  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("parity")
    done: set[int] = set()

    def measure(cell: Cell) -> tuple[Reference, list[dict[str, Any]]]:
        if cell.world not in done:
            done.add(cell.world)
            _run_world(cell.world, [each for each in wanted if each.world == cell.world], folder)
        files = [folder / f"{cell.name}.{number}.json" for number in range(cell.world)]
        truth = torch.load(folder / f"{rank.reference_name(cell)}.pt", weights_only=False)
        return truth, [json.loads(file.read_text()) for file in files]

    return measure


def _run_world(world: int, cells: Sequence[Cell], folder: Path) -> None:
    """Leaves a file of each rank for each cell. A cell that fails ends its group; another goes on."""
    for cell in cells:
        path = folder / f"{rank.reference_name(cell)}.pt"
        if not path.exists():
            torch.save(reference(cell.config, cell.rows, cell.packed, rank.casts_module(cell)), path)
    left = list(cells)
    while left:
        _run_group(world, left, folder)
        ended = [cell for cell in left if _ended(cell, folder)] or left[:1]
        for cell in ended:
            for number in range(world):
                file = folder / f"{cell.name}.{number}.json"
                if not file.exists():
                    log = (folder / f"rank.{number}.log").read_text()[-4000:]
                    file.write_text(json.dumps({"failure": f"no result from rank {number}; its log:\n{log}"}))
        left = [cell for cell in left if cell not in ended]


def _ended(cell: Cell, folder: Path) -> bool:
    """Whether all ranks have a result, or one has failed."""
    files = [folder / f"{cell.name}.{number}.json" for number in range(cell.world)]
    written = [json.loads(file.read_text()) for file in files if file.exists()]
    return len(written) == cell.world or any("failure" in result for result in written)


def _run_group(world: int, cells: Sequence[Cell], folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [_context.Process(target=rank.run, args=(r, world, port, cells, folder)) for r in range(world)]
    for process in group:
        process.start()
    try:
        seen, since = 0, time.monotonic()
        while any(process.is_alive() for process in group):
            if any(process.exitcode for process in group):
                break  # the others would wait for it
            if (now := len(list(folder.glob("*.json")))) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                break
            time.sleep(0.05)
    finally:
        for process in group:
            process.kill()
            process.join()
