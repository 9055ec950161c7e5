"""Checks of a recipe against the number of ranks, before any of them does anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.schema import Config
    from trainer.distributed.layout import Layout


def check_world(config: Config, layout: Layout) -> None:
    """Raises ConfigError, naming the key to change, unless the recipe can run in `layout`."""
    if config.task != "evaluate":
        _batch(config, layout.data)
    _pipeline(config, layout)
    _tensor(config)


def _batch(config: Config, data: int) -> None:
    batch, micro = config.train.global_batch, config.train.micro_batch
    unit = micro * data
    if batch % unit:
        low = batch // unit * unit
        near = [str(value) for value in (low, low + unit) if value]
        raise ConfigError(
            f"train.global_batch={batch} is not divisible by train.micro_batch × data-parallel ranks ="
            f" {micro} × {data} = {unit}; the nearest that fit: {', '.join(near)}",
            hint=f"Set train.global_batch={near[-1]}{_smaller_micro_batch(config, data)}.",
        )


def _smaller_micro_batch(config: Config, data: int) -> str:
    share, rest = divmod(config.train.global_batch, data)
    fits = [size for size in range(1, config.train.micro_batch) if not rest and share % size == 0]
    return f", or train.micro_batch={fits[-1]}" if fits and share else ""


def _pipeline(config: Config, layout: Layout) -> None:
    parallel, stages = config.parallel, layout.pipeline
    if stages == 1:
        return
    if parallel.strategy in ("full_shard", "hybrid"):
        raise ConfigError(
            f"parallel.strategy={parallel.strategy} gathers each layer anew for every micro-batch of a pipeline",
            hint="Set parallel.strategy=shard_grad_op (or ddp) with parallel.pipeline.",
        )
    if config.model.tie_word_embeddings and not config.model.pretrained:
        raise ConfigError(
            "tied embeddings would lie on the first and the last pipeline stage",
            hint="Set model.tie_word_embeddings=false, or parallel.pipeline=1.",
        )
    if config.model.lora.rank:
        raise ConfigError(
            "a model with LoRA adapters (model.lora.rank) cannot be cut into pipeline stages",
            hint="Set parallel.pipeline=1 and, to save memory, parallel.strategy=full_shard.",
        )
    _zero_bubble(config)
    pieces = stages * {"interleaved": parallel.stages_per_rank, "zero_bubble": 2}.get(parallel.schedule, 1)
    if config.model.num_hidden_layers < pieces and not config.model.pretrained:
        raise ConfigError(
            f"model.num_hidden_layers={config.model.num_hidden_layers} cannot be cut into {pieces} pipeline stages",
            hint=f"Set parallel.pipeline to at most {config.model.num_hidden_layers * stages // pieces}.",
        )
    count = config.train.global_batch // (layout.data * config.train.micro_batch)
    unit = stages if parallel.schedule == "interleaved" else 1
    least = pieces if parallel.schedule == "zero_bubble" else stages
    if count < least or count % unit:
        need = max(least, -(-count // unit) * unit)
        raise ConfigError(
            f"parallel.schedule={parallel.schedule} needs {'a multiple of ' if unit > 1 else 'at least '}"
            f"{max(least, unit)} micro-batches on each data-parallel rank, this recipe has {count}",
            hint=f"Set train.global_batch={need * layout.data * config.train.micro_batch}, or a smaller"
            " train.micro_batch.",
        )


def _zero_bubble(config: Config) -> None:
    """It goes backward twice, for inputs and for weights; what can do so only once is refused."""
    if config.parallel.schedule != "zero_bubble":
        return
    for key, value, instead in (
        ("train.compile", config.train.compile, "false"),
        ("train.activation_checkpoint", config.train.activation_checkpoint == "selective", "full"),
        ("model.loss", config.model.loss == "chunked", "plain"),
    ):
        if value:
            raise ConfigError(
                f"parallel.schedule=zero_bubble goes backward twice; what {key} asks for can do so only once",
                hint=f"Set {key}={instead}, or parallel.schedule=interleaved.",
            )


def _tensor(config: Config) -> None:
    parallel, model = config.parallel, config.model
    if parallel.tensor == 1:
        if parallel.sequence:
            raise ConfigError("parallel.sequence needs tensor parallelism", hint="Set parallel.tensor to 2 or more.")
        return
    if model.pretrained:
        return  # its sizes are known once it is read: models/build.py checks them then
    heads = model.num_key_value_heads or model.num_attention_heads
    if heads % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} does not divide model.num_key_value_heads={heads}",
            hint=f"Set parallel.tensor to a divisor of {heads}.",
        )
    if parallel.sequence and config.data.seq_len % parallel.tensor:
        raise ConfigError(
            f"parallel.sequence: data.seq_len={config.data.seq_len} is not divisible by"
            f" parallel.tensor={parallel.tensor}",
            hint=f"Set data.seq_len={-(-config.data.seq_len // parallel.tensor) * parallel.tensor}.",
        )
