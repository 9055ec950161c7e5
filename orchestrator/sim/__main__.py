"""`python -m orchestrator.sim up --nodes 2`: the same as `orch sim up --nodes 2`."""

from __future__ import annotations

import sys
from importlib import import_module

if __name__ == "__main__":
    # Looked up by name: the simulation does not depend on the command line, this door to it does.
    import_module("orchestrator.cli.main").main(["sim", *sys.argv[1:]])
