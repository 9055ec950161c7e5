"""Tensor and sequence parallelism for Llama-like transformers models, with torch's own parallel styles.

Each layer is cut by heads and by columns of the MLP (Megatron-LM, arXiv:1909.08053); with `parallel.sequence`
what lies between (norms, residual stream) is cut along the sequence (arXiv:2205.05198). Embedding and output
head are cut by vocabulary, and with `parallel.loss` the logits stay so. All parameters become DTensors on `tp`,
also those that every rank holds whole, so that optimizer and checkpoints see one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from trainer.config import Config
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError

FAMILIES = ("llama", "qwen2", "qwen3")
"""transformers model types whose modules have the names and the arithmetic that this plan is made for."""


class _Whole(SequenceParallel):
    """Every rank computes the module on the whole input; its parameters are replicated DTensors."""

    def __init__(self) -> None:
        super().__init__(use_local_output=True)
        self.sequence_sharding = (Replicate(),)


def loss_context(config: Config, mesh: Mesh) -> AbstractContextManager[None]:
    """What forward AND backward must run in: cross-entropy on logits that are sharded over `tp`."""
    sharded = mesh.layout.tensor > 1 and config.parallel.loss
    return _loss_parallel() if sharded else nullcontext()


@contextmanager
def _loss_parallel() -> Iterator[None]:
    context = loss_parallel()
    context.__enter__()
    try:
        yield
    finally:  # torch's own leaves its handlers in place when the body raises
        context.__exit__(None, None, None)


def apply_tensor_parallel(module: nn.Module, config: Config, mesh: Mesh) -> None:
    """Cuts a transformers causal LM, or a pipeline stage of one, over the mesh's `tp` dimension, in place.

    `module` may be on the meta device; nothing is communicated, so weights must be put in afterwards. On a stage
    absent parts are None or modules without parameters. Whole hidden states enter and leave the module, also
    with `parallel.sequence`. Does nothing for `parallel.tensor=1`.

    Raises ConfigError for families without a plan and for sizes that do not divide.
    """
    if mesh.layout.tensor == 1:
        return
    check_tensor_parallel(module.config, config)
    tp = mesh["tp"]
    tied = _tied(module)
    base = module.get_submodule(module.base_model_prefix)
    sequence = config.parallel.sequence
    layers = [layer for layer in base.layers if _present(layer)]
    for layer in layers:
        parallelize_module(layer, tp, _layer_plan(layer, sequence), src_data_rank=None)
    if _present(base.embed_tokens):
        parallelize_module(base.embed_tokens, tp, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
    norm = base.norm if _present(base.norm) else None
    if norm is not None:
        parallelize_module(norm, tp, _norm(sequence), src_data_rank=None)
    if _present(module.lm_head):
        logits = Shard(-1) if config.parallel.loss else Replicate()
        head = ColwiseParallel(output_layouts=logits, use_local_output=not config.parallel.loss)
        parallelize_module(module.lm_head, tp, head, src_data_rank=None)
    if sequence:
        _shard_sequence_between([*layers, *([norm] if norm is not None else [])], tp)
    if tied:
        module.lm_head.weight = base.embed_tokens.weight


def check_tensor_parallel(model: object, config: Config) -> None:
    """Raises ConfigError unless a model with this transformers configuration can be cut over `parallel.tensor`."""
    size = config.parallel.tensor
    family = getattr(model, "model_type", "?")
    if family not in FAMILIES:
        raise ConfigError(
            f"parallel.tensor={size}: there is no tensor-parallel plan for {family!r}, only for {', '.join(FAMILIES)}",
            hint="Set parallel.tensor=1 and, to save memory, parallel.strategy=full_shard.",
        )
    if config.model.sparse.mask != "none" or config.model.lora.rank:
        part = "model.sparse.mask" if config.model.sparse.mask != "none" else "model.lora.rank"
        raise ConfigError(
            f"parallel.tensor={size} cuts plain linear layers only, not those of {part}",
            hint=f"Set parallel.tensor=1, or leave {part} at its default.",
        )
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size"):
        value = getattr(model, name)
        if value % size:
            fits = [str(n) for n in range(1, size) if value % n == 0]
            can_grow = name == "vocab_size" and not config.model.pretrained
            more = f", or model.vocab_size={-(-value // size) * size}" if can_grow else ""
            raise ConfigError(
                f"parallel.tensor={size} does not divide the model's {name}={value}",
                hint=f"Set parallel.tensor to one of {', '.join(fits)}{more}.",
            )
    if config.parallel.sequence and config.data.seq_len % size:
        raise ConfigError(
            f"parallel.sequence: data.seq_len={config.data.seq_len} is not divisible by parallel.tensor={size}",
            hint=f"Set data.seq_len={-(-config.data.seq_len // size) * size}.",
        )


def _norm(sequence: bool) -> ParallelStyle:
    return SequenceParallel(use_local_output=True) if sequence else _Whole()


def _layer_plan(layer: nn.Module, sequence: bool) -> dict[str, ParallelStyle]:
    outside = Shard(1) if sequence else Replicate()

    def gather(**name: Shard | Replicate) -> PrepareModuleInput:
        # As a DTensor: its consumers' gradients are then added before they are reduced, once.
        return PrepareModuleInput(
            input_kwarg_layouts=name, desired_input_kwarg_layouts=dict.fromkeys(name, Replicate())
        )

    plan: dict[str, ParallelStyle] = {
        "input_layernorm": _norm(sequence),
        "self_attn": gather(hidden_states=outside),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=outside),
        "post_attention_layernorm": _norm(sequence),
        "mlp": PrepareModuleInput(input_layouts=(outside,), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=outside),
    }
    for name in ("q_norm", "k_norm"):  # Qwen3; they see (batch, sequence, this rank's heads, head_dim)
        if hasattr(layer.self_attn, name):
            plan[f"self_attn.{name}"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan


def _shard_sequence_between(parts: list[nn.Module], tp: DeviceMesh) -> None:
    """Whole hidden states before the first and behind the last of `parts`, sharded ones between them.

    Not already at the embedding: the base model takes the sequence length for masks from its output.
    """
    if not parts:
        return
    enter = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
    )
    leave = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    parallelize_module(parts[0], tp, enter)
    parallelize_module(parts[-1], tp, leave)


def complete_gradients(module: nn.Module) -> None:
    """Makes gradients lie over `tp` as their parameters do.

    Those of replicated parameters whose ranks saw different tokens or heads are sums yet to be made; that of an
    embedding with an output head of its own is whole. To be called once the parameters have their weights (leaving
    the meta device makes new ones). FSDP2 does this by itself for those that it manages.
    """
    for parameter in module.parameters():
        own = isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == ("tp",)
        if own and parameter.requires_grad:
            parameter.register_hook(functools.partial(_complete, parameter.placements))


def _complete(placements: Sequence[Placement], gradient: torch.Tensor) -> torch.Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.redistribute(placements=placements)


def _present(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def _tied(module: nn.Module) -> bool:
    base = module.get_submodule(module.base_model_prefix)
    both = _present(base.embed_tokens) and _present(module.lm_head)
    return both and base.embed_tokens.weight is module.lm_head.weight
