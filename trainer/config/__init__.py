"""The typed configuration: a recipe (YAML), then dotted overrides, then checks."""

from trainer.config.checks import check_world
from trainer.config.loading import RECIPES, describe, find_recipe, keys, load, recipe_names, validate
from trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SampleConfig,
    SparseConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "RECIPES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "SampleConfig",
    "SparseConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check_world",
    "describe",
    "find_recipe",
    "keys",
    "load",
    "recipe_names",
    "validate",
]
