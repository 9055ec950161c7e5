"""AdamW with decay on matrices only, and a cosine schedule with linear warm-up in optimizer steps."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from trainer.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter, 2019). Vectors (norms, biases) are in a group without weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = bool(parameters) and parameters[0].device.type == "cuda"
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """The share of the peak rate at optimizer step `step` (from 0).

    Rises linearly over `warmup_steps`, then falls along a half cosine to `min_lr_ratio` at the last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(total - config.warmup_steps - 1, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: AdamW, total: int, config: OptimConfig) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: lr_factor(step, total, config))
