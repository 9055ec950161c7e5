"""The training loss inside the model's forward pass: summed cross-entropy, optionally without ever whole logits.

torch 2.13's own `linear_cross_entropy` is not used for `chunked`: it sums the loss, and the weight's gradient over
chunks, in the dtype of its inputs: off by some 1e-3 in bf16, infinite in fp16 above 65504 (8192 tokens × ln 3000).
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.models.memory import base_model

IGNORE = -100
"""The label of a position without a target."""

CHUNK = 2048
"""Rows of logits in memory at once; large enough to keep matrix products efficient."""

_CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")
"""Keys of transformers configurations whose models do more to the hidden states than multiply by the head."""


def loss_method(config: Config, model: nn.Module, device: torch.device) -> str:
    """`plain` or `chunked` for `config.model.loss`; raises ConfigError where `chunked` is asked for and cannot be."""
    wanted = config.model.loss
    obstacle = _chunked_obstacle(config, model)
    if wanted == "chunked" and obstacle:
        raise ConfigError(f"model.loss=chunked: {obstacle}", hint="Set model.loss=plain.")
    if wanted == "auto":
        return "chunked" if device.type == "cuda" and obstacle is None else "plain"
    return wanted


def _chunked_obstacle(config: Config, model: Any) -> str | None:
    if config.parallel.tensor > 1:
        return "with parallel.tensor no rank has the whole output head (parallel.loss shards the logits instead)"
    if type(model.get_output_embeddings()) is not nn.Linear:
        return f"the output head of {type(model).__name__} is not a plain linear layer"
    for key in _CHANGED_LOGITS:
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            return f"{type(model).__name__} changes its logits ({key})"
    return None


def install_loss(model: nn.Module, method: str) -> None:
    """Makes a transformers causal LM return its summed loss, a scalar, when it is given `labels`, in place.

    `labels` (B, L) are already shifted: the target of each position, or IGNORE. The loss is fp32, or fp64 for
    such parameters. Without `labels` forward, `generate` and `save_pretrained` are as before. With
    `loss_parallel()` (tensor parallelism) `plain` takes logits sharded over the vocabulary.
    """
    if method == "chunked":
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.forward = MethodType(_head_forward, head)
    forward = _forward_chunked if method == "chunked" else _forward_plain

    def with_loss(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return type(self).forward(self, *args, **kwargs)
        return forward(self, *args, labels=labels, **kwargs)

    # generate() asks which arguments forward takes
    with_loss.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = MethodType(with_loss, model)  # type: ignore[method-assign]


def _forward_plain(self: Any, *args: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return summed_loss(type(self).forward(self, *args, **kwargs).logits, labels)


def _forward_chunked(self: Any, *args: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    hidden = base_model(self)(*args, **kwargs)[0]
    # through the head's __call__: if FSDP2 shards it by itself, its hooks gather it
    return self.get_output_embeddings()(hidden, labels=labels)


def _head_forward(self: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    if labels is None:
        return F.linear(hidden, self.weight, self.bias)
    return chunked_loss(hidden, self.weight, self.bias, labels)


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ cross-entropy of (B, L, V) logits over the labels (B, L) that are not IGNORE, at least fp32, a scalar.

    Logits that are a DTensor sharded over V need `loss_parallel()` around this and the backward pass.
    """
    rows = logits.flatten(0, 1)
    if rows.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    loss = F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss.to_local().clone() if isinstance(loss, DTensor) else loss  # FSDP2 warns of modules that return views


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk: int | None = None,
) -> torch.Tensor:
    """`summed_loss` of hidden (B, L, H) times weight (V, H) plus bias (V,), `chunk` rows of logits at a time.

    Gradients are computed in the forward pass (only those wanted), the weight's summed in fp32. Under autocast
    the matrix products are in its dtype.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _ChunkedLoss.apply(hidden.flatten(0, -2), weight, bias, labels.flatten(), dtype, chunk or CHUNK)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        dtype: torch.dtype,
        chunk: int,
    ) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                rows, valid = hidden[part].to(dtype), labels[part] != IGNORE
                target = labels[part].clamp(min=0)[:, None]
                logits = (rows @ matrix.T).to(wide)
                if bias is not None:
                    logits += bias
                log_norm = logits.logsumexp(dim=1, keepdim=True)
                loss += torch.where(valid, (log_norm - logits.gather(1, target))[:, 0], 0).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                # d loss / d logits = softmax − one-hot, nothing where there is no target
                slope = logits.sub_(log_norm).exp_()
                slope.scatter_add_(1, target, slope.new_full(target.shape, -1.0))
                slope *= valid[:, None]
                if d_bias is not None:
                    d_bias += slope.sum(0)
                slope = slope.to(dtype)
                if d_hidden is not None:
                    d_hidden[part] = slope @ matrix
                if d_weight is not None:
                    d_weight += slope.T @ rows
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * upstream,
            # in place: this is as large as the head; a second backward pass over the same graph raises
            None if d_weight is None else d_weight.mul_(upstream).to(weight_dtype),
            None if d_bias is None else (d_bias * upstream).to(bias_dtype),
            None,
            None,
            None,
        )
