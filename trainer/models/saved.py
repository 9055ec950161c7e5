"""How many bytes autograd keeps of one decoder layer, counted on fake tensors: no memory, no device, any size."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.config import Config
from trainer.data.tokenizer import TextTokenizer
from trainer.distributed.data_parallel import uses_fsdp
from trainer.distributed.layout import Layout
from trainer.errors import ConfigError
from trainer.models import sparse
from trainer.models.build import model_config, on_meta
from trainer.models.lora import apply_lora
from trainer.models.memory import LOW, base_model, decoder_layers

FUSED = "plan"


def settings_of(config: Config, vocabulary: int) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """(transformers' configuration of the recipe's model, what was assumed for it).

    `vocabulary` is assumed for a tokenizer that is not on this machine. Raises ConfigError for a pretrained model
    whose configuration is not.
    """
    notes: list[str] = []
    rows = config.model.vocab_size or config.tokenizer.vocab_size
    pretrained = Path(config.model.pretrained) if config.model.pretrained else None
    if pretrained is None and config.tokenizer.path and not config.model.vocab_size:
        if Path(config.tokenizer.path).is_dir():
            rows = TextTokenizer.from_folder(Path(config.tokenizer.path)).vocab_size
        else:
            rows = vocabulary
            notes.append(f"tokenizer {config.tokenizer.path} is not here: {rows:,} ids assumed (model.vocab_size=N)")
    vocab_size = 0 if pretrained else rows
    try:
        found = model_config(
            config, vocab_size=vocab_size, bos_id=None, eos_id=None, pad_id=None, pretrained=pretrained
        )
    except ConfigError as error:
        if pretrained is None or pretrained.is_dir():
            raise
        raise ConfigError(
            f"model.pretrained={pretrained}: its configuration is not on this machine",
            hint="The plan downloads nothing: give model.pretrained=FOLDER with its config.json.",
        ) from error
    return found, tuple(notes)


def meta_model(config: Config, settings: PretrainedConfig) -> nn.Module:
    """The recipe's model with its adapters or masks, parameters on the meta device."""
    plain = {"attention": "eager" if config.model.attention == "eager" else "sdpa", "loss": "plain"}
    config = config.model_copy(update={"model": config.model.model_copy(update=plain)})
    model = on_meta(config, settings, torch.device("cpu"))
    if config.model.lora.rank:
        apply_lora(model, config)
    sparse.apply_sparse(model, config.model.sparse).step(config.train.steps)
    return model


def layer_parameters(config: Config, settings: PretrainedConfig) -> int:
    layers = decoder_layers(meta_model(config, _with_layers(settings, 1)))
    return sum(parameter.numel() for parameter in layers[0][1].parameters())


def layer_bytes(config: Config, layout: Layout, settings: PretrainedConfig) -> tuple[float, float, float]:
    """Bytes of one micro-batch on one device: (a layer, a layer as checkpointing keeps it, all around the layers).

    Counted for models with one and with two layers; their difference is a layer. Tensor parallelism: as a layer
    with so many fewer heads and columns; with parallel.sequence what lies between is divided too, and the
    inputs of the two column-parallel products are whole: S/tp + 2·t·h·c·(1 − 1/tp), S as without parallelism.

    Checkpointing: `full` keeps a layer's input; `selective` also what its matrix products and attention gave.
    torch.compile saves less than is counted here: it recomputes what is cheap.
    """
    tokens = config.train.micro_batch * config.data.seq_len
    compute = LOW.get(config.train.precision)
    size = compute.itemsize if compute else 8 if config.train.precision == "fp64" else 4
    # under FSDP2 the residual stream is in the compute precision, under autocast in that of the parameters
    autocast = compute is not None and not uses_fsdp(config, layout)
    residual = 4 if autocast else size
    tensor = layout.tensor
    sequence = tensor > 1 and config.parallel.sequence
    narrow = settings if sequence else _divided(settings, tensor)
    one, two = (_counted(config, _with_layers(narrow, n), autocast) for n in (1, 2))
    full, fixed = float(two - one), float(max(2 * one - two, 0))
    whole = tokens * settings.hidden_size
    if sequence:
        full = full / tensor + 2 * whole * size * (1 - 1 / tensor)
    kept = full
    if config.train.activation_checkpoint != "none":
        kept = whole * residual / (tensor if sequence else 1)
    if config.train.activation_checkpoint == "selective":
        kept += tokens * size * _product_columns(config, settings, tensor, sequence)
    return full, min(kept, full), fixed


def _product_columns(config: Config, settings: PretrainedConfig, tensor: int, sequence: bool) -> float:
    """Columns that a layer's matrix products and attention give, per token on one device."""
    layer = decoder_layers(meta_model(config, _with_layers(settings, 1)))[0][1]
    linear = [module for module in layer.modules() if hasattr(module, "weight") and module.weight.ndim == 2]
    hidden = settings.hidden_size
    columns = [getattr(module, "out_features", None) or module.weight.shape[1] for module in linear]
    head = getattr(settings, "head_dim", None) or hidden // settings.num_attention_heads
    inner = sum(c for c in columns if c != hidden) + settings.num_attention_heads * head
    outer = sum(c for c in columns if c == hidden)  # row-parallel results are whole, or cut along the sequence
    return inner / tensor + outer / (tensor if sequence else 1)


def _with_layers(settings: PretrainedConfig, count: int) -> PretrainedConfig:
    found = copy.deepcopy(settings)
    found.num_hidden_layers = count
    if getattr(found, "layer_types", None):
        found.layer_types = found.layer_types[:count]
    return found


def _divided(settings: PretrainedConfig, tensor: int) -> PretrainedConfig:
    if tensor == 1:
        return settings
    found = copy.deepcopy(settings)
    found.head_dim = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(found, name, getattr(found, name) // tensor)
    return found


def _counted(config: Config, settings: PretrainedConfig, autocast: bool) -> int:
    """Bytes of all distinct tensors, parameters apart, that the base model's forward pass keeps for backward."""
    model = base_model(meta_model(config, settings))
    low = LOW.get(config.train.precision)
    if low is not None and not autocast:
        model.to(low)
    if model.config._attn_implementation != "eager":  # type: ignore[union-attr]
        _register()
        model.config._attn_implementation = FUSED  # type: ignore[union-attr]
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(), torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=autocast):
        _make_fake(model)
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        ids = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, use_cache=False)[0]
        copies = {p.numel() for p in model.parameters()} if autocast else set()
        return sum(
            tensor.untyped_storage().nbytes()
            for key, tensor in seen.items()
            if key not in own and not (tensor.is_leaf and tensor.numel() in copies)
        )


def _make_fake(model: nn.Module) -> None:
    """Within FakeTensorMode: new tensors of the same shapes (`to_empty` wants the old ones to be fake already)."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, result, and the log of each row's norm."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    output = _FusedAttention.apply(query.to(value.dtype), key.to(value.dtype), value)
    return output.transpose(1, 2).contiguous(), None


@functools.cache
def _register() -> None:
    ALL_ATTENTION_FUNCTIONS.register(FUSED, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FUSED, lambda *args, **kwargs: None)
