"""The typed configuration: a recipe (YAML), then dotted overrides, then checks.

An unknown key is an error that names its path and the nearest valid key. Each section belongs to the
component that reads it; `describe()` lists every key with its default for `--help`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainer import tasks
from trainer.errors import ConfigError, nearest

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class ModelConfig(Section):
    architecture: Literal["llama"] = Field(
        "llama", description="transformers architecture, randomly initialised"
    )
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(384, gt=0, description="width of the gated MLP")
    num_hidden_layers: int = Field(4, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(2, gt=0, description="grouped-query attention: heads of keys and values")
    tie_word_embeddings: bool = True
    initializer_range: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        heads = self.num_attention_heads
        if self.hidden_size % heads or (self.hidden_size // heads) % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not an even multiple of num_attention_heads={heads}"
                f" (try {max(1, round(self.hidden_size / (2 * heads))) * 2 * heads})"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={heads} is not divisible by"
                f" num_key_value_heads={self.num_key_value_heads}"
            )
        return self


class TokenizerConfig(Section):
    vocab_size: int = Field(2048, ge=260, description="tokens of the byte-level BPE vocabulary")


class DataConfig(Section):
    source: Literal["pydoc_topics", "text_files"] = Field(
        "pydoc_topics", description="pydoc_topics: Python's own manual; text_files: one document per file"
    )
    path: str | None = Field(None, description="file or folder of *.txt, for text_files")
    seq_len: int = Field(128, ge=2, description="tokens per row")
    holdout: float = Field(
        0.05, ge=0, lt=1, description="share of the text, in whole documents, kept for evaluation"
    )
    shuffle: bool = Field(True, description="new order of documents and rows in each epoch")
    cross_document_attention: bool = Field(False, description="let packed documents attend to each other")
    prepare_timeout: float = Field(
        600, gt=0, description="seconds to wait for the node's rank 0 to prepare data"
    )

    @model_validator(mode="after")
    def _path_fits(self) -> DataConfig:
        if (self.source == "text_files") != (self.path is not None):
            raise ValueError("path belongs to source=text_files, and text_files needs path")
        return self


class TrainConfig(Section):
    steps: int = Field(160, ge=0, description="optimizer steps in all")
    global_batch: int = Field(32, gt=0, description="rows per optimizer step, over all ranks")
    micro_batch: int = Field(8, gt=0, description="rows per forward pass and rank; the rest is accumulated")
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="bf16: autocast with fp32 parameters"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_bad_steps: int = Field(
        3, ge=0, description="steps in a row with a non-finite gradient to skip, then fail"
    )


class OptimConfig(Section):
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only, never on norms and biases")
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0: no clipping")
    warmup_steps: int = Field(20, ge=0, description="optimizer steps of linear warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="end of the cosine, as a share of lr")


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    micro_batch: int = Field(16, gt=0)


class CheckpointConfig(Section):
    type: Literal["full"] = Field("full", description="full: one whole copy, written by rank 0")
    every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end and on a stop")
    keep_last: int = Field(2, ge=1, description="checkpoints to keep")
    resume: str = Field(
        "auto", description="auto: newest that verifies on any node; none; or a step_… folder"
    )
    on_failure: Literal["warn", "stop"] = Field(
        "warn", description="when writing fails, for example on a full disk"
    )


class LogConfig(Section):
    every: int = Field(10, gt=0, description="steps between console lines")
    tensorboard: bool = True
    heartbeat: float = Field(10, gt=0, description="seconds between heartbeat events of every rank")


class SampleConfig(Section):
    prompt: str = Field("The", description="start of the text generated at the end")
    max_new_tokens: int = Field(60, ge=0, description="0: no sample")
    temperature: float = Field(0.8, ge=0, description="0: greedy")


class DistributedConfig(Section):
    timeout: float = Field(600, gt=0, description="seconds until a collective gives up")


class Config(Section):
    """One training run, complete."""

    name: str = Field(
        "train", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="run folder without ORCH_RUN_DIR"
    )
    task: str = Field("pretrain", description="one of trainer/tasks")
    seed: int = Field(1234, ge=0)
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    distributed: DistributedConfig = DistributedConfig()

    @field_validator("task")
    @classmethod
    def _task_exists(cls, task: str) -> str:
        if task not in tasks.names():
            raise ValueError(f"unknown task {task!r} (valid: {', '.join(tasks.names())})")
        return task

    def check_world(self, world_size: int) -> Config:
        """Raises ConfigError unless the global batch can be spread over `world_size` ranks."""
        batch, micro = self.train.global_batch, self.train.micro_batch
        unit = micro * world_size
        if batch % unit:
            low = batch // unit * unit
            near = [str(value) for value in (low, low + unit) if value]
            raise ConfigError(
                f"train.global_batch={batch} is not divisible by train.micro_batch × ranks ="
                f" {micro} × {world_size} = {unit}; the nearest that fit: {', '.join(near)}",
                hint=f"Set train.global_batch={near[-1]}{self._smaller_micro_batch(world_size)}.",
            )
        return self

    def _smaller_micro_batch(self, world_size: int) -> str:
        share, rest = divmod(self.train.global_batch, world_size)
        fits = [size for size in range(1, self.train.micro_batch) if not rest and share % size == 0]
        return f", or train.micro_batch={fits[-1]}" if fits and share else ""

    def hash(self) -> str:
        """16 hex digits that change with any value of the configuration."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe's configuration with `key.path=value` overrides applied.

    Raises ConfigError with one line that names the key.
    """
    path = find_recipe(recipe)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, this is a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(values, str(path))


def validate(values: Mapping[str, Any], where: str) -> Config:
    """`values` as a Config; raises ConfigError that names `where` and the first wrong key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe's name or path."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        if not path.is_file():
            raise ConfigError(f"recipe file {recipe} does not exist")
        return path
    named = RECIPES / f"{recipe}.yaml"
    if recipe not in recipe_names():
        near = nearest(recipe, recipe_names())
        guess = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"unknown recipe {recipe!r}{guess} (valid: {', '.join(recipe_names())}, or a path)")
    return named


def keys() -> dict[str, tuple[str, Any, str]]:
    """Every dotted key → (type, default, description)."""
    return {key: rest for key, *rest in _walk(Config, "")}  # type: ignore[misc]


def describe() -> str:
    """All keys with their defaults, for `--help`."""
    lines = []
    for key, (kind, default, text) in keys().items():
        shown = json.dumps(default) if isinstance(default, tuple) else yaml.safe_dump(default).split("\n")[0]
        lines.append(f"  {key + '=' + shown:<44} {kind:<24} {text}".rstrip())
    return "\n".join(lines)


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _walk(kind, f"{prefix}{name}.")
            continue
        choices = get_args(kind) if "Literal" in str(kind) else ()
        text = "|".join(map(str, choices)) if choices else getattr(kind, "__name__", str(kind))
        text = {"Union": "str, optional", "UnionType": "str, optional", "tuple": "two floats"}.get(text, text)
        yield f"{prefix}{name}", text, info.default, info.description or ""


def _is_text(key: str) -> bool:
    section: Any = Config
    *parents, last = key.split(".")
    for parent in parents:
        info = section.model_fields.get(parent)
        section = info.annotation if info else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return False
    info = section.model_fields.get(last)
    return info is not None and info.annotation in (str, str | None)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    value: Any = text
    if not _is_text(key.strip()) or text == "null":  # a text is taken as it stands, whatever YAML makes of it
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
    *parents, last = key.strip().split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"unknown key {key!r}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def _explain(error: ValidationError) -> str:
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        near = nearest(key, list(keys()))
        section = key.rpartition(".")[0]
        valid = [name for name in keys() if name.rpartition(".")[0] == section]
        tail = f"; did you mean {near!r}?" if near else f" (valid here: {', '.join(valid)})"
        return f"unknown key {key!r}{tail}{more}"
    reason = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{key}: {_one_line(reason)}{shown}{more}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
