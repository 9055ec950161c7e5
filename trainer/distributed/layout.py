"""How many ranks do what: pure numbers, known before any process group exists.

Ranks are laid out with tensor parallelism innermost (its ranks talk most and should share a node), then
shards, then replicas, then pipeline stages outermost: rank = ((pp · replicate + r) · shard + s) · tensor + t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.schema import Config
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    pipeline: int = 1
    replicate: int = 1
    """Copies of the model that see other data and all-reduce gradients."""
    shard: int = 1
    """FSDP: ranks that split one copy and see other data."""
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.replicate * self.shard * self.tensor

    @property
    def data(self) -> int:
        """Data-parallel size: ranks that see different rows."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which share of each global batch `rank` sees; equal for its tensor and pipeline peers."""
        return rank // self.tensor % self.data

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def pipeline_rank(self, rank: int) -> int:
        return rank // (self.tensor * self.data)

    def describe(self) -> str:
        """`pp2 × dp4 (2 replicas of 2 shards) × tp2`, without what is 1."""
        parts = [f"pp{self.pipeline}"] if self.pipeline > 1 else []
        if self.shard > 1 and self.replicate > 1:
            parts.append(f"dp{self.data} ({self.replicate} replicas of {self.shard} shards)")
        elif self.shard > 1:
            parts.append(f"fsdp{self.shard}")
        elif self.replicate > 1:
            parts.append(f"dp{self.replicate}")
        if self.tensor > 1:
            parts.append(f"tp{self.tensor}")
        return " × ".join(parts) or "one process"


def layout_for(config: Config, world: int, local_world: int) -> Layout:
    """The layout of `world` ranks, `local_world` on each node; raises ConfigError that names the key to change."""
    parallel = config.parallel
    model_ranks = parallel.tensor * parallel.pipeline
    if world % model_ranks:
        fits = [n for n in range(1, world + 1) if world % (n * parallel.pipeline) == 0]
        raise ConfigError(
            f"parallel.tensor × parallel.pipeline = {parallel.tensor} × {parallel.pipeline} does not divide"
            f" the {world} ranks",
            hint=f"With parallel.pipeline={parallel.pipeline}, parallel.tensor can be"
            f" {', '.join(map(str, fits))}." if fits else f"Set parallel.pipeline to a divisor of {world}.",
        )
    data = world // model_ranks
    if parallel.strategy == "ddp":
        replicate = data
    elif parallel.strategy == "hybrid":
        replicate = parallel.replicate or data // math.gcd(data, max(1, local_world // parallel.tensor))
        if data % replicate:
            fits = [str(n) for n in range(1, data + 1) if data % n == 0]
            raise ConfigError(
                f"parallel.replicate={replicate} does not divide the {data} data-parallel ranks",
                hint=f"Set parallel.replicate to one of {', '.join(fits)}.",
            )
    else:
        replicate = 1
    return Layout(parallel.pipeline, replicate, data // replicate, parallel.tensor)
