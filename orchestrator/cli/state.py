"""What the global options said, and the objects that follow from it, each made once and only when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.config import Config, Target
    from orchestrator.inventory import Inventory
    from orchestrator.runs import History


@dataclass
class State:
    """One command line's shared state."""

    config_path: str | None = None
    inventory_path: str | None = None
    debug: bool = False
    command: tuple[str, ...] | None = None
    """The words after the first `--` of the command line, None where there is no `--`."""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def config(self) -> Config:
        """orch.yaml, or the defaults where there is none. Raises ConfigError."""
        if "config" not in self._made:
            from orchestrator.config import load

            self._made["config"] = load(self.config_path)
        return self._made["config"]

    def target(self, name: str | None = None) -> Target:
        """The target `--on NAME`, or the default one. Raises UsageError, ConfigError."""
        return self.config().target(name)

    def inventory(self, target: Target | str | None = None) -> Inventory:
        """The inventory of `--inventory`, else of the target (its name, itself, or None: the default one)."""
        from orchestrator import inventory

        if self.inventory_path:
            path = self.inventory_path
        else:
            chosen = self.target(target) if target is None or isinstance(target, str) else target
            path = str(self.config().inventory_path(chosen))
        if ("inventory", path) not in self._made:
            self._made["inventory", path] = inventory.load(path)
        return self._made["inventory", path]

    def history(self) -> History:
        """The operator's history of runs."""
        if "history" not in self._made:
            from orchestrator.runs import History

            self._made["history"] = History.open()
        return self._made["history"]

    def operator(self) -> str:
        """`user@machine`, as the labels of a run name who started it."""
        import getpass
        import os
        import socket

        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = str(os.getuid())
        return f"{user}@{socket.gethostname()}"


_state = State()


def state() -> State:
    """The state of the command line that is running."""
    return _state


def reset(argv: Sequence[str] = ()) -> State:
    """A fresh state for a new command line `argv`."""
    global _state
    words = list(argv)
    after = tuple(words[words.index("--") + 1 :]) if "--" in words else None
    _state = State(command=after)
    return _state
