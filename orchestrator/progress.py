"""How the push of an image looks: bars on a terminal, one line per finished layer elsewhere. On stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

_DONE = ("Pushed", "Layer already exists", "Mounted from")


class PushProgress(AbstractContextManager["PushProgress"]):
    """Takes the engine's push messages; call it with each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._sizes: dict[str, int] = {}
        self._tasks: dict[str, Any] = {}
        self._bars: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, message: dict[str, Any]) -> None:
        layer, status = str(message.get("id", "")), str(message.get("status", ""))
        detail = message.get("progressDetail") or {}
        if not layer:
            return
        if "current" in detail:
            self._sizes[layer] = int(detail["current"])
            self._bar(layer, int(detail["current"]), int(detail.get("total") or detail["current"]))
        elif status.startswith(_DONE):
            size = self._sizes.get(layer, 0)
            if self._bars is None and status.startswith("Pushed"):
                self._say(f"layer {layer} pushed, {_size(size)}")
            self._bar(layer, size, size)

    def _bar(self, layer: str, current: int, total: int) -> None:
        if self._bars is None or not total:
            return
        if layer not in self._tasks:
            self._tasks[layer] = self._bars.add_task(f"pushing {layer}", total=total)
        self._bars.update(self._tasks[layer], completed=min(current, total), total=total)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
