"""Learning rate and weight decay of each optimizer step, as a pure function of its number."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from trainer.config import OptimConfig
from trainer.errors import ConfigError


def rates(step: int, total: int, config: OptimConfig) -> tuple[float, float]:
    """(learning rate, share of the weight decay) of optimizer step `step`, counted from 0, of `total`.

    Warm-up, for all: (step + 1) / warmup_steps of `lr`. Then, with x from 0 at the first step after it to 1 at the
    last step, and r = min_lr_ratio:

    cosine     lr · (r + (1 − r) · (1 + cos πx) / 2)        Loshchilov & Hutter 2017, arXiv:1608.03983
    linear     lr · (1 − (1 − r) · x)
    constant   lr
    wsd        lr, and on the last `decay_steps` (a fifth of `total`) linearly to lr · r at the last step
               (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395)
    two_phase  lr → lr_mid on x ≤ 1/2, lr_mid → lr · r after it; weight decay is 0 from x = 1/2
               (the two stages of BitNet b1.58's training, Ma et al. 2024, arXiv:2402.17764)

    Steps beyond the last stay at its rate.
    """
    peak, floor, warmup = config.lr, config.lr * config.min_lr_ratio, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup, 1.0
    x = min((step - warmup) / max(total - warmup - 1, 1), 1.0)
    if config.schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * x)), 1.0
    if config.schedule == "linear":
        return peak + (floor - peak) * x, 1.0
    if config.schedule == "wsd":
        decay = config.decay_steps or max(1, total // 5)
        passed = min(max(step - (total - decay) + 1, 0), decay)
        return peak + (floor - peak) * passed / decay, 1.0
    if config.schedule == "two_phase":
        middle = config.lr_mid
        assert middle is not None, "checked by Schedule"
        if x < 0.5:
            return peak + (middle - peak) * 2 * x, 1.0
        return middle + (floor - middle) * (2 * x - 1), 0.0
    return peak, 1.0


class Schedule:
    """Sets `lr` and `weight_decay` of the optimizer's groups; `step` goes on after each optimizer step.

    Its state is only the number of the step: a resumed run follows the recipe it is given. Load it after the
    optimizer, whose groups bring the rates that they were saved with.
    """

    def __init__(self, optimizer: Optimizer, total: int, config: OptimConfig) -> None:
        """Raises ConfigError if the recipe lacks what its schedule needs."""
        if config.schedule == "two_phase" and config.lr_mid is None:
            raise ConfigError(
                "optim.schedule=two_phase needs the rate at half time",
                hint=f"Set optim.lr_mid, for example to {config.lr * 0.6:g}.",
            )
        self._optimizer = optimizer
        self._total = total
        self._config = config
        self._decays = [float(group["weight_decay"]) for group in optimizer.param_groups]
        self._step = 0
        self._apply()

    def step(self) -> None:
        self._step += 1
        self._apply()

    @property
    def lr(self) -> float:
        """The rate of the next optimizer step."""
        return rates(self._step, self._total, self._config)[0]

    @property
    def weight_decay(self) -> float:
        """The decay of the matrices in the next optimizer step."""
        return max(self._decays) * rates(self._step, self._total, self._config)[1]

    def get_last_lr(self) -> list[float]:
        """`lr` for each group, as torch's schedulers say it."""
        return [self.lr] * len(self._decays)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        self._apply()

    def _apply(self) -> None:
        lr, share = rates(self._step, self._total, self._config)
        for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
            group["lr"] = lr
            group["weight_decay"] = decay * share
