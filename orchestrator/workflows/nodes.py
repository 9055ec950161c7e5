"""Are the machines fit for a job? `orch nodes check`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.commands import probe
from orchestrator.connect.base import Connector
from orchestrator.connect.fanout import fanout
from orchestrator.errors import OrchError
from orchestrator.specs import Node, Storage


@dataclass(frozen=True)
class NodeReport:
    """One node's answers and what is wrong with it; `error` if it did not answer at all."""

    node: Node
    facts: probe.Facts | None = None
    problems: tuple[OrchError, ...] = ()
    error: OrchError | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        return self.error is None and not self.problems

    @property
    def exit_code(self) -> int:
        if self.error:
            return self.error.exit_code
        return max((problem.exit_code for problem in self.problems), default=0)

    def to_json(self) -> dict[str, Any]:
        facts = self.facts
        holder = facts.get("holder").split("|") if facts and facts.get("holder") else []
        return {
            "node": self.node.name,
            "address": self.node.address,
            "ok": self.ok,
            "engine": facts.get("engine") or None if facts else None,
            "gpus": facts.number("gpus") if facts else None,
            "cpus": facts.number("cpus") if facts else None,
            "memory_gb": round(facts.number("memory_kb") / 1e6, 1) if facts else None,
            "disk_gb": round(facts.number("disk_kb") / 1e6, 1) if facts else None,
            "clock_offset_s": round(facts.clock_offset_ns / 1e9, 3) if facts else None,
            "run": holder[1] if len(holder) > 1 and holder[0] not in ("exited", "dead") else None,
            "problems": [{"message": each.message, "hint": each.hint} for each in (self.error, *self.problems) if each],
        }


def check(
    nodes: Sequence[Node],
    connector: Connector,
    *,
    storage: Storage | None = None,
    gpus: int | None = None,
    port: int = 29400,
    image: str = "",
    mounts: Sequence[str] = (),
    timeout: float = 30.0,
) -> list[NodeReport]:
    """Asks every node at once what a deploy's preflight asks; changes nothing but the runs folder's existence.

    `gpus` None expects of each node what the inventory says of it. The first node is taken as the head.
    """
    storage = storage or Storage()
    head = nodes[0]

    def one(node: Node) -> NodeReport:
        begun = time.monotonic()
        is_head = node.name == head.name
        request = probe.Request(
            folders=(storage.runs, storage.checkpoint_root, storage.cache),
            mounts=tuple(mounts),
            image=image,
            listen_port=port if is_head else 0,
            reach=None if is_head else (head.private, port),
        )
        sent = time.time_ns()
        done = connector.connect(node).run(probe.preflight(request), timeout=timeout)
        facts = probe.facts(done.stdout, sent, time.time_ns())
        problems = probe.judge(
            facts,
            node=node.name,
            gpus=node.gpus or 0 if gpus is None else gpus,
            port=request.listen_port,
            reach=request.reach,
            lease=False,
        )
        return NodeReport(node, facts, tuple(problems), None, time.monotonic() - begun)

    answers = fanout(list(nodes), one, deadline=timeout + 10, what="check the nodes")
    return [
        answer if isinstance(answer, NodeReport) else NodeReport(node, error=answer)
        for node, answer in ((node, answers[node.name]) for node in nodes)
    ]
