"""`python -m trainer plan`: what a recipe needs on a cluster, from its numbers alone; no GPU, no weights.

The model is built on the meta device, so parameters are exact for any architecture. Activations are counted by
autograd's own saved tensors on fake tensors. Everything else is a formula, given where it is computed. E is the
number of parameters on a device before sharding (divided by tensor and pipeline parallelism), s the number of shards,
w the bytes of a master weight (4; 8 for fp64), c those of the compute precision.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer import config as configuration
from trainer.config import Config
from trainer.distributed.data_parallel import uses_fsdp
from trainer.distributed.layout import Layout, layout_for
from trainer.distributed.pipeline_parallel import split_layers, stage_owner, stages_per_rank
from trainer.errors import EXIT_OK, ConfigError
from trainer.models import saved
from trainer.models.flops import flops_per_token, peak_flops
from trainer.models.loss import CHUNK
from trainer.models.memory import LOW, decoder_layers

GIB = 2**30
MEMORY = {"A100": 80, "H100": 80, "H200": 139, "B200": 178, "L40S": 44, "L4": 22}
"""GiB that a program can use of the usual variant."""
RUNTIME = 2.5 * GIB
"""CUDA context, NCCL's buffers, cuBLAS workspaces: an allowance, not a formula."""
FRAGMENTATION = 0.04
"""Of all else: what the allocator reserves and cannot use; also an allowance."""
VOCABULARY = 50_304
"""Assumed, and said, for a tokenizer that is not on this machine."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of the whole model by where they lie; tied ones once."""

    layer: int
    """One decoder layer."""
    layer_vectors: int
    """Those of a layer that tensor parallelism leaves whole: norms."""
    embedding: int
    rest: int
    """Final norm and output head (none if tied)."""
    head: int
    """Elements of the output head's matrix, tied or not."""
    layers: int
    trainable: float
    """Share of all parameters; below 1 with LoRA."""
    low: float
    """Share of all parameters that are held in the compute precision: LoRA's frozen matrices."""

    @property
    def total(self) -> int:
        return self.layers * self.layer + self.embedding + self.rest


@dataclass(frozen=True)
class Plan:
    layout: Layout
    sizes: Sizes
    parts: dict[str, float]
    """Bytes on the fullest device, by what they are."""
    local: float
    """Parameters that this device keeps."""
    tokens: int
    """Per optimizer step."""
    flops: float | None
    """Per optimizer step, strict (models/flops.py); None for a family whose count is not known."""
    notes: tuple[str, ...]

    @property
    def memory(self) -> float:
        return sum(self.parts.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="name of a recipe, or a path")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node (default: 8)")
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(MEMORY)} (default: H100)")
    parser.add_argument("--memory", help="of one device, as 80gb (default: the usual one of --gpu)")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed for the time (default: 0.4)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises ConfigError, naming keys to change, for what cannot run or does not fit."""
    config = configuration.load(args.config, args.overrides)
    if min(args.nodes, args.gpus) < 1 or args.mfu <= 0:
        raise ConfigError("--nodes, --gpus and --mfu must be positive")
    if args.gpu.upper() not in MEMORY and not args.memory:
        raise ConfigError(f"--gpu={args.gpu}: unknown (valid: {', '.join(MEMORY)})", hint="Or give --memory=80gb.")
    available = parse_bytes(args.memory) if args.memory else MEMORY[args.gpu.upper()] * GIB
    plan = make(config, args.nodes, args.gpus)
    print(describe(plan, config, args, available))
    if plan.memory > available:
        raise ConfigError(
            f"{config.name} needs {plan.memory / GIB:.1f} GiB on the fullest device, {args.gpu} with"
            f" {available / GIB:.0f} GiB has not so much",
            hint=remedy(config, args.nodes, args.gpus, available),
        )
    return EXIT_OK


def parse_bytes(text: str) -> float:
    """`80gb`, `80GiB`, `80` → bytes; a gigabyte is 2**30 here, as on data sheets of memory."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])i?b?)?\s*", text.lower())
    if not match:
        raise ConfigError(f"--memory={text}: not a size", hint="Write it as 80gb.")
    return float(match[1]) * 1024 ** ("kmgt".index(match[2] or "g") + 1)


def make(config: Config, nodes: int, gpus: int) -> Plan:
    """The plan for `nodes` × `gpus` devices; raises ConfigError if the recipe cannot run on so many."""
    layout = layout_for(config, nodes * gpus, gpus)
    configuration.check_world(config, layout)
    settings, notes = saved.settings_of(config, VOCABULARY)
    sizes = _sizes(config, settings)
    by_rank = [memory(config, layout, sizes, settings, rank) for rank in range(layout.pipeline)]
    fullest = max(by_rank, key=lambda parts: sum(parts.values()))
    local = max(_elements(config, layout, sizes, rank) for rank in range(layout.pipeline)) / layout.shard
    tokens = config.train.global_batch * config.data.seq_len
    per_token = flops_per_token(settings, config.data.seq_len, frozen=config.model.lora.rank > 0)
    return Plan(layout, sizes, fullest, local, tokens, None if per_token is None else per_token * tokens, notes)


_known: dict[str, Sizes] = {}


def _sizes(config: Config, settings: Any) -> Sizes:
    """Building a large model takes half a second even without its weights, and `remedy` asks some twenty times."""
    model = config.model
    parts = (settings.to_json_string(use_diff=False), model.lora.model_dump_json(), model.sparse.mask)
    key = "\n".join([*parts, config.train.precision])
    if key not in _known:
        _known[key] = measure(saved.meta_model(config, settings))
    return _known[key]


def measure(model: nn.Module) -> Sizes:
    """Counts the parameters of a model on the meta device."""
    layers = [layer for _, layer in decoder_layers(model)]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    table = model.get_input_embeddings().weight.numel()  # type: ignore[operator,union-attr]
    total = sum(p.numel() for p in model.parameters())
    return Sizes(
        layer=max(counts),
        layer_vectors=sum(p.numel() for p in layers[0].parameters() if p.ndim < 2),
        embedding=table,
        rest=total - sum(counts) - table,
        head=model.get_output_embeddings().weight.numel(),  # type: ignore[operator,union-attr]
        layers=len(layers),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad) / total,
        low=sum(p.numel() for p in model.parameters() if p.dtype in LOW.values()) / total,
    )


def memory(config: Config, layout: Layout, sizes: Sizes, settings: Any, rank: int) -> dict[str, float]:
    """Bytes by part on a device of pipeline rank `rank`, at the peak: where backward begins.

    parameters  w·E/s; c·E/s of LoRA's frozen matrices
    gradients   w·E/s; shard_grad_op with accumulation also keeps them whole: + 4·E
    optimizer   AdamW's two moments: 2·w·E/s, or 2·2·E/s with optim.state_dtype=bf16
    copies      `_copies`; activations and loss: `_activations`, `_loss`
    """
    train, shard = config.train, layout.shard
    master = 8 if train.precision == "fp64" else 4
    elements = _elements(config, layout, sizes, rank)
    trainable = elements * sizes.trainable
    moment = 2 if config.optim.state_dtype == "bf16" else master
    accumulated = train.global_batch // (train.micro_batch * layout.data)
    whole = trainable * 4 if config.parallel.strategy == "shard_grad_op" and shard > 1 and accumulated > 1 else 0.0
    copies, buffers = _copies(config, layout, sizes, elements)
    parts = {
        "parameters": elements * (master * (1 - sizes.low) + 2 * sizes.low) / shard,
        "gradients": trainable * master / shard + whole,
        "optimizer states": trainable * 2 * moment / shard,
        f"{'gathered ' if shard > 1 else ''}parameters in {train.precision}": copies,
        "gradient reduction": buffers,
        "activations": _activations(config, layout, settings, rank, accumulated),
        "logits and loss": _loss(config, layout, sizes, settings) if rank == _last(config, layout) else 0.0,
    }
    parts = {name: value for name, value in parts.items() if value}
    return parts | {"runtime, fragmentation": RUNTIME + FRAGMENTATION * sum(parts.values())}


def _pieces(config: Config, layout: Layout, layers: int, ratio: float) -> list[list[int]]:
    """For each pipeline rank the number of layers of each of its stages."""
    each = stages_per_rank(config) if layout.pipeline > 1 else 1
    plan = split_layers(layers, layout.pipeline * each, ratio)
    mine: list[list[int]] = [[] for _ in range(layout.pipeline)]
    for stage, part in enumerate(plan):
        mine[stage_owner(stage, layout.pipeline, config.parallel.schedule)].append(len(part))
    return mine


def _last(config: Config, layout: Layout) -> int:
    """The pipeline rank with the output head."""
    stages = layout.pipeline * (stages_per_rank(config) if layout.pipeline > 1 else 1)
    return stage_owner(stages - 1, layout.pipeline, config.parallel.schedule)


def _elements(config: Config, layout: Layout, sizes: Sizes, rank: int) -> float:
    """E: tensor parallelism divides all matrices; embedding and head lie on the first and the last stage."""
    layers = sum(_pieces(config, layout, sizes.layers, sizes.head / sizes.layer)[rank])
    outside = (sizes.embedding if rank == 0 else 0) + (sizes.rest if rank == _last(config, layout) else 0)
    whole = layers * sizes.layer_vectors
    return (layers * sizes.layer - whole + outside) / layout.tensor + whole


def _copies(config: Config, layout: Layout, sizes: Sizes, elements: float) -> tuple[float, float]:
    """(copies of parameters to compute with, buffers of FSDP2's reduction) in bytes.

    DDP, one process  autocast's copies of all matrices but the embedding, c·(E − embedding); none in full precision,
                      nor of what is held in the compute precision
    FSDP2             full_shard, hybrid: embedding, head and last layer stay gathered, one layer computes, one comes:
                      c·(embedding + head + 3 layers); else, and in pipelines, all: c·E
                      reduction: whole gradients, c + 4 bytes each, of a layer and of the next unit, which is a layer
                      or embedding with head
    """
    low = config.train.precision in LOW
    compute = 2 if low else 8 if config.train.precision == "fp64" else 4
    if not uses_fsdp(config, layout):
        return (compute * max(elements * (1 - sizes.low) - sizes.embedding / layout.tensor, 0) if low else 0.0), 0.0
    outside = (sizes.embedding + sizes.rest) / layout.tensor
    layer = sizes.layer / layout.tensor
    again = config.parallel.strategy in ("full_shard", "hybrid") and layout.pipeline == 1
    gathered = min(outside + 3 * layer, elements) if again else elements
    if layout.shard == 1 and not low:
        gathered = 0.0  # torch's `replicate` computes with the parameters themselves
    unit = max(layer, outside if layout.pipeline == 1 else outside / 2)
    return gathered * compute, (unit + layer) * sizes.trainable * (compute + 4)


def _activations(config: Config, layout: Layout, settings: Any, rank: int, accumulated: int) -> float:
    """What backward needs of the forward passes in flight, in bytes; per layer as `saved.layer_bytes` counts it.

    Checkpointing keeps less per layer, and once the rest, of the layer that is being recomputed. In flight on a
    pipeline of p ranks with v stages each: gpipe all m micro-batches; 1f1b p − rank; interleaved
    (2·(p − rank − 1) + (v − 1)·p + 1) stages (Narayanan et al. 2021, arXiv:2104.04473); zero_bubble 2·p stages (Qi et
    al. 2023, arXiv:2401.10241); never more than there are.
    """
    full, kept, fixed = saved.layer_bytes(config, layout, settings)
    ranks, schedule = layout.pipeline, config.parallel.schedule
    if ranks == 1:
        layers: float = settings.num_hidden_layers
    else:
        ratio = settings.vocab_size * settings.hidden_size / saved.layer_parameters(config, settings)
        stages = _pieces(config, layout, settings.num_hidden_layers, ratio)[rank]
        mean = sum(stages) / len(stages)
        flights = {
            "gpipe": accumulated,
            "1f1b": ranks - rank,
            "interleaved": 2 * (ranks - rank - 1) + (len(stages) - 1) * ranks + 1,
            "zero_bubble": 2 * ranks,
        }
        layers = mean * min(flights[schedule], accumulated * len(stages))
    recomputed = full - kept
    return layers * kept + recomputed + fixed


def _loss(config: Config, layout: Layout, sizes: Sizes, settings: Any) -> float:
    """Bytes around the logits, t tokens of a micro-batch, V vocabulary, h hidden size.

    plain    t·V·10 in bf16 (logits, fp32 copy, log-softmax or its gradient), t·V·2·w else; parallel.loss shards it
    chunked  CHUNK·V·8 for one piece, the head's gradient 4·V·h and once more in c, and c·t·h
    """
    low = config.train.precision in LOW
    compute = 2 if low else 8 if config.train.precision == "fp64" else 4
    tokens = config.train.micro_batch * config.data.seq_len
    vocabulary = settings.vocab_size
    chunked = config.model.loss != "plain" and layout.tensor == 1
    if chunked and config.parallel.schedule == "zero_bubble" and layout.pipeline > 1:
        chunked = False
    if chunked:
        weights = sizes.head * (4 + compute) if config.model.lora.rank == 0 else 0
        return min(CHUNK, tokens) * vocabulary * (4 + 2 * compute) + weights + tokens * settings.hidden_size * compute
    divided = layout.tensor if config.parallel.loss else 1
    return tokens * vocabulary * (10 if low else 2 * compute) / divided


def remedy(config: Config, nodes: int, gpus: int, available: float) -> str:
    """Which single changes make the recipe fit, or else which ones together."""
    strategy = "full_shard" if config.parallel.pipeline == 1 else "shard_grad_op"
    wanted: list[tuple[str, object]] = [("parallel.strategy", strategy), ("train.activation_checkpoint", "full")]
    wanted += [("train.precision", "bf16"), ("train.micro_batch", 1), ("optim.state_dtype", "bf16")]
    wanted += [("model.loss", "chunked")] + [("parallel.tensor", n) for n in (2, 4, 8) if n <= gpus]

    def need(changes: dict[str, object]) -> float:
        values = config.model_dump(mode="json")
        for key, value in changes.items():
            section, name = key.split(".")
            values[section][name] = value
        try:
            return make(configuration.validate(values, "plan"), nodes, gpus).memory
        except ConfigError:
            return math.inf

    alone = {f"{key}={value}": need({key: value}) for key, value in wanted}
    enough = [f"{change} ({size / GIB:.1f} GiB)" for change, size in alone.items() if size <= available]
    if enough:
        return f"Set {', or '.join(enough)}."
    chosen: dict[str, object] = {}
    best = need({})
    for key, value in wanted:
        size = need({**chosen, key: value})
        if size < best:
            chosen[key], best = value, size
        if best <= available:
            break
    together = " ".join(f"{key}={value}" for key, value in chosen.items())
    if best <= available:
        return f"Set {together} together ({best / GIB:.1f} GiB)."
    tried = f" Even {together} needs {best / GIB:.1f} GiB." if chosen else ""
    return f"Take more devices (--nodes, with parallel.strategy=full_shard) or larger ones.{tried}"


def describe(plan: Plan, config: Config, args: argparse.Namespace, available: float) -> str:
    """The plan as aligned text."""
    sizes, layout, train = plan.sizes, plan.layout, config.train
    share = f", {sizes.trainable:.2%} trained" if sizes.trainable < 1 else ""
    rows: list[tuple[str, str]] = [
        ("cluster", f"{args.nodes} × {args.gpus} {args.gpu}, {available / GIB:.0f} GiB each"),
        ("layout", f"{layout.describe()}, parallel.strategy={config.parallel.strategy}"),
        ("parameters", f"{sizes.total:,} ({sizes.total / 1e9:.2f} B{share})"),
        ("  embedding", f"{sizes.embedding:,}, norm and output head {sizes.rest:,}"),
        ("  per device", f"{plan.local:,.0f}"),
        ("batch", f"{train.global_batch} rows of {config.data.seq_len}: {plan.tokens:,} tokens per step"),
        ("  per device", f"{train.global_batch // layout.data // train.micro_batch} × {train.micro_batch} rows"),
        ("tokens in all", f"{plan.tokens * train.steps:,} in {train.steps:,} steps"),
        *_time(plan, config, args),
        ("memory", f"{plan.memory / GIB:.1f} GiB on the fullest device, {plan.memory / available:.0%} of it"),
        *[(f"  {name}", f"{size / GIB:8.2f} GiB") for name, size in plan.parts.items()],
        *[("note", note) for note in plan.notes],
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([f"plan of {config.name}", *[f"  {name:<{width}}{text}" for name, text in rows]])


def _time(plan: Plan, config: Config, args: argparse.Namespace) -> Sequence[tuple[str, str]]:
    if plan.flops is None:
        return [("FLOPs", "not known for this architecture")]
    whole = plan.flops * config.train.steps
    rows = [("FLOPs per step", f"{plan.flops:.3e} (strict)"), ("FLOPs in all", f"{whole:.3e}")]
    peak = peak_flops(args.gpu)
    if peak is not None:
        per_step = plan.flops / (peak * args.mfu * plan.layout.world)
        days = per_step * config.train.steps / 86400
        text = f"{days:.2f} days at {args.mfu:.0%} MFU, {per_step:.2f} s per step"
        rows.append(("time", f"{text}, {plan.tokens / per_step / plan.layout.world:,.0f} tokens/s per device"))
    return rows
