"""The optimizer, its learning-rate schedule, and the loss scaler of fp16."""

from trainer.optimize.adamw import AdamW, AdamWBf16, build_optimizer
from trainer.optimize.scaler import LossScaler
from trainer.optimize.schedules import Schedule, rates

__all__ = ["AdamW", "AdamWBf16", "LossScaler", "Schedule", "build_optimizer", "rates"]
