"""Every layout gives the loss, the gradients and the gradient norm of one plain process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.parity import core_cells, pipeline_cells
from tests.parity.cells import Cell
from tests.parity.reference import LOW, Reference

Results = Callable[[Cell], tuple[Reference, list[dict[str, Any]]]]

GRADIENT = {"fp64": 1e-10, "fp32": 1e-5}
SCALAR = {"fp64": 1e-11, "fp32": 1e-6}
LOW_SCALAR = {"bf16": 1e-2, "fp16": 2e-3}
"""Of loss and norm: some units of the last place (2⁻⁸, 2⁻¹¹), which average out over parameters and tokens."""


@pytest.mark.parametrize("cell", [*core_cells.CELLS, *pipeline_cells.CELLS], ids=lambda cell: cell.name)
def test_cell(cell: Cell, results: Results) -> None:
    truth, ranks = results(cell)
    failures = [rank["failure"] for rank in ranks if "failure" in rank]
    assert not failures, failures[0]
    found = differences(cell, truth, ranks)
    if cell.mutation:
        assert found, f"the comparison does not notice {cell.mutation}"
    else:
        assert not found, "\n".join(found)


def differences(cell: Cell, truth: Reference, ranks: list[dict[str, Any]]) -> list[str]:
    """Everything in which the ranks' measurements are not those of one process."""
    precision = cell.config.train.precision
    scalar = SCALAR.get(precision) or LOW_SCALAR[precision]
    found = []
    for number, rank in enumerate(ranks):
        scalars = {"evaluated loss": ([rank["eval_loss"]], truth.loss), "loss": (rank["loss"], truth.loss)}
        scalars |= {"norm": (rank["norm"], truth.norm), "norm of half": ([rank["halved"]], truth.norm / 2)}
        for what, (values, expected) in scalars.items():
            for value in values:
                if not math.isclose(value, expected, rel_tol=scalar):
                    found.append(f"rank {number}: {what} {value}, not {expected}")
        for name, error in rank["errors"].items():
            if not error <= _bound(precision, truth, name):
                found.append(f"rank {number}: gradient of {name} differs by {error:.1e}")
        if rank["poisoned"]:
            found.append(f"rank {number}: the norm does not show that another rank's gradient is infinite")
        total = truth.parameters
        share = total / (cell.layout.shard * cell.layout.tensor * cell.layout.pipeline)
        if not rank["held"] <= share * (1.0 if share == total else 1.6 if cell.layout.pipeline == 1 else 3.0):
            found.append(f"rank {number} holds {rank['held']} of {total} parameters")
    missing = set(truth.gradients) - {name for rank in ranks for name in rank["errors"]}
    return found + [f"no gradient of {name}" for name in sorted(missing)]


def _bound(precision: str, truth: Reference, name: str) -> float:
    """In low precision twice the error of one plain process in that precision, and a unit in the last place."""
    if precision in LOW:
        unit = {"bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
        return 2 * truth.plain_error[name] + unit
    return GRADIENT[precision]
