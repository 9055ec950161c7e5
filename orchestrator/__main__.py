"""`python -m orchestrator` is `orch`."""

from __future__ import annotations

from orchestrator.cli.main import main

main()
