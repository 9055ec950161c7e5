"""Checkpoints: verified by hash, never torn, written while training goes on."""

from trainer.checkpoints.checkpointer import Checkpointer
from trainer.checkpoints.state import TrainingState

__all__ = ["Checkpointer", "TrainingState"]
