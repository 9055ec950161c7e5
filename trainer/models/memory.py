"""Memory and speed of the decoder layers: activation checkpointing and torch.compile, one layer at a time.

Both replace `forward` on the layer itself, not the layer: parameter names stay, and hooks (FSDP2's, tensor
parallelism's) stay outside. Order: tensor parallelism, `apply_activation_checkpoint`, `compile_layers`, FSDP2 or DDP.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.errors import ConfigError

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""`train.precision` below fp32 → what matrix products are computed in; weights that train stay fp32."""

_SAVED = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "_c10d_functional::reduce_scatter_tensor",
)
"""What `selective` keeps. Not bmm: eager attention's scores are of the size that checkpointing is to save."""


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated layers of a transformers causal LM, or of a pipeline stage of one: (name in `model`, layer).

    That is the outermost container of numbered modules with the most parameters: `model.layers` of Llama,
    `transformer.h` of GPT-2. Raises ConfigError for a model that has none.
    """
    containers = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }
    if not containers:
        raise ConfigError(
            f"no decoder layers found in {type(model).__name__}",
            hint="Set model.architecture to a decoder-only model, such as llama.",
        )
    # max takes the first among equals, and named_modules goes from the outside inwards
    name = max(containers, key=lambda key: sum(parameter.numel() for parameter in containers[key].parameters()))
    return [(f"{name}.{key}", layer) for key, layer in containers[name].named_children()]


def base_model(model: nn.Module) -> nn.Module:
    """What makes hidden states of token ids in a transformers causal LM: `model` of Llama, `transformer` of GPT-2."""
    prefix: Any = model.base_model_prefix
    return getattr(model, prefix) if hasattr(model, prefix) else model.get_decoder()  # type: ignore[operator]


def apply_activation_checkpoint(model: nn.Module, mode: str) -> None:
    """Makes backward recompute the decoder layers, in place.

    `full`: all but each layer's input; `selective`: all but the results of matrix products and attention;
    `none`: nothing. Non-reentrant (torch.utils.checkpoint), so gradients are those without it.
    """
    if mode == "none":
        return
    context = {"context_fn": _selective_contexts} if mode == "selective" else {}
    for _, layer in decoder_layers(model):
        layer.forward = MethodType(_checkpointed(context), layer)  # type: ignore[method-assign]


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Makes each decoder layer run through torch.compile, in place; layers of one kind share the compiled code."""
    for _, layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend)  # type: ignore[method-assign]


def _checkpointed(context: dict[str, Any]) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(type(self).forward, self)
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **context, **kwargs)

    return forward


@functools.cache
def _saved_operators() -> frozenset[Any]:
    """Those of `_SAVED` that this torch build, and the packages loaded, have."""
    found = set()
    for qualified in _SAVED:
        space, _, name = qualified.partition("::")
        packet = getattr(getattr(torch.ops, space), name, None)
        if packet is not None:
            found.update(getattr(packet, overload) for overload in packet.overloads())
    return frozenset(found)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _saved_operators() else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)
