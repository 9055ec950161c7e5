"""One file per task, each with `run(context) -> Outcome`; a recipe names its task."""

from __future__ import annotations

from pathlib import Path


def names() -> list[str]:
    """The tasks there are: one per module of this package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
