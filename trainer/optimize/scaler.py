"""The loss scaler of fp16: one factor, the same on every rank."""

from __future__ import annotations

from typing import Any

from trainer.errors import NonFiniteError

INITIAL = 2.0**16
GROWTH_INTERVAL = 2000
"""Good steps in a row after which the scale doubles; both are the values of torch's GradScaler."""


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740).

    The loss is multiplied by `scale` and the gradients, in fp32, are divided by it before they are clipped. Torch's
    GradScaler looks for infinities on one mesh only. Here `finite` is told from the global gradient norm, which
    all ranks of all mesh dimensions share, so the scale never differs.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = INITIAL if enabled else 1.0
        self._good = 0

    def update(self, finite: bool) -> None:
        """After each step: halves the scale on an overflow, doubles it after GROWTH_INTERVAL good steps.

        Raises NonFiniteError when the scale would fall below 1.
        """
        if not self.enabled:
            return
        if not finite:
            if self.scale <= 1:
                raise NonFiniteError(
                    "fp16: the gradients are not finite even with a loss scale of 1",
                    hint="Set train.precision=bf16, or lower optim.lr and lengthen optim.warmup_steps.",
                )
            self.scale, self._good = self.scale / 2, 0
            return
        self._good += 1
        if self._good == GROWTH_INTERVAL:
            self.scale, self._good = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "scale": self.scale, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A state saved without scaling (another precision) leaves the initial scale."""
        if self.enabled and state["enabled"]:
            self.scale, self._good = float(state["scale"]), int(state["good"])
