"""Starts one rank in a process forked by conftest: environment, output, then the script."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

# given by conftest: ENV, ARGV, LOG, SCRIPT
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ORCH_RUN_DIR", "ORCH_CHECKPOINT_DIR", "HF_HOME"):
    os.environ.pop(name, None)
os.environ.update(ENV)  # type: ignore[name-defined]  # noqa: F821
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)  # type: ignore[name-defined]  # noqa: F821
os.dup2(log, 1)
os.dup2(log, 2)
sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
torch.set_num_threads(1)
sys.argv = ["trainer", *ARGV]  # type: ignore[name-defined]  # noqa: F821
script = Path(__file__).parent / f"{SCRIPT}.py"  # type: ignore[name-defined]  # noqa: F821
runpy.run_path(str(script), run_name="__main__")
