"""Options and arguments that several commands share, so that they read and complete the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli import complete

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

RunId = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="Run id or a unique prefix of one; the latest run when left out.",
        autocompletion=complete.runs,
        show_default=False,
    ),
]

On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="TARGET",
        help="Target of orch.yaml; targets.default when left out.",
        autocompletion=complete.targets,
    ),
]

Nodes = Annotated[
    str | None,
    typer.Option(
        "--nodes",
        metavar="N|NAMES",
        help="How many nodes (the first N of the inventory), or which: names, groups, globs, n[1-4], rack=a.",
        autocompletion=complete.nodes,
    ),
]

NodeName = Annotated[
    str | None,
    typer.Option("--node", metavar="NAME", help="Only this node.", autocompletion=complete.nodes),
]

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME", help="Recipe of our trainer, or recipes/NAME.yaml.", autocompletion=complete.recipes
    ),
]
