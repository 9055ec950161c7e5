"""The runs' logs: read from all nodes at once, merged, prefixed, made safe for a terminal.

Pure: `text` (control characters), `view` (lines to output), `fold`, `since`, `tail`.
I/O: `follow` (one reader per node, reconnecting at its byte cursor), `sink` (where it goes).
The format of a log is in docs/contracts.md, the use of this package in docs/logs.md.
"""

from __future__ import annotations

from orchestrator.logs.fold import FoldView, compress_nodes, compress_ranks, fold
from orchestrator.logs.follow import Follower, Result, Source, follow
from orchestrator.logs.since import offset_since, parse_since
from orchestrator.logs.sink import Sink, SinkClosed, wants_color
from orchestrator.logs.tail import Tail
from orchestrator.logs.text import sanitize
from orchestrator.logs.view import View, parse_ranks

__all__ = [
    "FoldView",
    "Follower",
    "Result",
    "Sink",
    "SinkClosed",
    "Source",
    "Tail",
    "View",
    "compress_nodes",
    "compress_ranks",
    "fold",
    "follow",
    "offset_since",
    "parse_ranks",
    "parse_since",
    "sanitize",
    "wants_color",
]
