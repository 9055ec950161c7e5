"""Shell completion: names of runs, nodes, targets and recipes.

Called at every press of Tab, so it reads files directly (no validation, no network), and never raises or
prints: a broken orch.yaml completes to nothing.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

_LIMIT = 50


def items(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    """Completion items with their help, as click wants them from a group."""
    from types import SimpleNamespace

    return [SimpleNamespace(value=name, help=text, type="plain") for name, text in pairs]


def answer(command: Any) -> NoReturn:
    """Answers the shell's completion request of this process and exits; silent whatever goes wrong."""
    try:
        command.main(prog_name="orch", standalone_mode=False)
    except SystemExit:
        raise
    except BaseException:  # a traceback in the middle of a prompt helps nobody
        sys.exit(1)
    sys.exit(0)


def _quiet(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    @wraps(names)
    def complete(incomplete: str) -> list[str]:
        with contextlib.suppress(Exception):
            head, comma, last = incomplete.rpartition(",")
            return [f"{head}{comma}{name}" for name in names() if name.startswith(last)][:_LIMIT]
        return []

    del complete.__wrapped__  # typer reads the signature to know what to pass
    complete.__annotations__ = {"incomplete": str}
    return complete


def _document() -> tuple[dict[str, Any], Path]:
    import yaml

    from orchestrator.cli.state import state
    from orchestrator.files import find_config

    path = find_config(state().config_path)
    if path is None:
        return {}, Path.cwd()
    return yaml.safe_load(path.read_text()) or {}, path.parent


@_quiet
def runs() -> Iterable[str]:
    """Run ids, newest first."""
    from orchestrator.runs import default_path

    with contextlib.closing(sqlite3.connect(f"file:{default_path()}?mode=ro", uri=True, timeout=0.2)) as history:
        return [row[0] for row in history.execute("SELECT id FROM runs ORDER BY started DESC LIMIT ?", (_LIMIT,))]


@_quiet
def targets() -> Iterable[str]:
    """Targets of orch.yaml."""
    document, _ = _document()
    return sorted({name for name in document.get("targets") or {} if name != "default"} | {"local"})


@_quiet
def recipes() -> Iterable[str]:
    """Recipes: ours, then the context's."""
    from orchestrator.files import recipe_files

    document, root = _document()
    context = (document.get("image") or {}).get("context") or "."
    return recipe_files(root / Path(context).expanduser())


@_quiet
def nodes() -> Iterable[str]:
    """Nodes and groups of the inventory in use."""
    from orchestrator.cli.state import state
    from orchestrator.inventory import names_in

    path = state().inventory_path
    if not path:
        document, root = _document()
        table = document.get("targets") or {}
        rows = [row for row in table.values() if isinstance(row, dict) and row.get("inventory")]
        chosen = table.get(table.get("default"), rows[0] if len(rows) == 1 else {})
        path = str(root / Path(chosen["inventory"]).expanduser())
    return names_in(Path(path))
