"""orch: a containerised cluster job orchestrator for training language models."""

__version__ = "0.1.0"
