"""From what the operator types for RUN to the run, its nodes and its backend.

The history answers at once. Where it does not know the run (it was deleted, or another operator's
machine started the run) the nodes of the inventory are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.backends.base import Backend, Found
from orchestrator.config import Config, Target
from orchestrator.errors import UsageError
from orchestrator.inventory import Inventory
from orchestrator.runs import History
from orchestrator.specs import Node
from orchestrator.workflows import backends
from orchestrator.workflows.deploy import found_of


@dataclass(frozen=True)
class Located:
    found: Found
    nodes: tuple[Node, ...]
    backend: Backend
    spec: dict
    target: str = ""


InventoryOf = Callable[[Target], Inventory]
"""Reads the target's inventory; only called where the nodes must be asked."""


def target_nodes(config: Config, target: Target, inventory: InventoryOf) -> tuple[Node, ...]:
    """All machines of a target: the inventory's, or this one."""
    if target.backend == "local":
        from orchestrator.backends.local import local_node

        return (local_node(target.gpus),)
    return inventory(target).nodes


def locate(prefix: str | None, config: Config, history: History, target: Target, inventory: InventoryOf) -> Located:
    """The run that `prefix` (None: the latest) means. Raises UsageError if there is none or several."""
    try:
        record = history.find(prefix)
    except UsageError as missing:
        if missing.lines:  # several runs begin so: the nodes would know no better
            raise
        return _ask(prefix, config, target, inventory, missing)
    if not record.started:
        raise UsageError(
            f"{record.run.id} was never started ({record.run.state}): nothing of it is on the nodes",
            hint="deploy it again; `orch runs` lists the others",
        )
    backend = backends.make(record.run.backend, config, record.nodes)
    return Located(found_of(record), record.nodes, backend, dict(record.spec), record.target)


def _ask(prefix: str | None, config: Config, target: Target, inventory: InventoryOf, missing: UsageError) -> Located:
    nodes = target_nodes(config, target, inventory)
    backend = backends.make(target.backend, config, nodes)
    runs, errors = backend.discover(nodes, config.storage_spec().runs)
    wanted = [each for each in runs if prefix is None or each.run.id.startswith(prefix)]
    if prefix is None:
        wanted = wanted[:1]
    if len(wanted) > 1:
        listing = ", ".join(each.run.id for each in wanted[:5]) + (", …" if len(wanted) > 5 else "")
        raise UsageError(f"{prefix!r} begins {len(wanted)} runs: {listing}", hint="type more of it")
    if not wanted:
        silent = f" (no answer from {', '.join(errors)})" if errors else ""
        raise UsageError(f"{missing.message}, nor do the nodes know it{silent}", hint=missing.hint)
    found = wanted[0]
    return Located(found, nodes_of(found, nodes), backend, {}, target.name)


def nodes_of(found: Found, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The run's nodes in the run's order, as far as they answered."""
    by_name = {node.name: node for node in nodes}
    ordered = [by_name[name] for name in found.run.nodes if name in by_name and name in found.dirs]
    return tuple(ordered or [by_name[name] for name in found.dirs if name in by_name])
