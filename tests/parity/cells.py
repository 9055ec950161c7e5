"""A cell of the parity matrix: one layout of one model on one kind of batch, compared with one plain process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer import config as configuration
from trainer.config import Config
from trainer.distributed.layout import Layout, layout_for

RECIPE = Path(__file__).with_name("cell.yaml")


@dataclass(frozen=True)
class Cell:
    name: str
    """Unique; letters, digits and `-_.+`."""
    world: int
    """Ranks: 1, 2, 4 or 8; each on one node."""
    overrides: tuple[str, ...] = ()
    """Of cell.yaml. `train.global_batch` follows from `accumulate`."""
    accumulate: int = 3
    """Micro-batches of each data-parallel rank."""
    packed: bool = False
    """Several documents in a row; they must not attend to each other."""
    mutation: str | None = None
    """A fault of `mutations.py` under which the comparison must fail."""

    @cached_property
    def config(self) -> Config:
        return configuration.load(str(RECIPE), [*self.overrides, f"train.global_batch={self.rows}"])

    @cached_property
    def layout(self) -> Layout:
        return layout_for(self._recipe, self.world, self.world)

    @property
    def rows(self) -> int:
        return self._recipe.train.micro_batch * self.accumulate * self.layout.data

    @cached_property
    def _recipe(self) -> Config:
        return configuration.load(str(RECIPE), self.overrides)
