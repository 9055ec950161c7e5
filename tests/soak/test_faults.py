"""Twenty faults; `make soak` injects hundreds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("faults.py")


def test_every_fault_is_survived(tmp_path):
    count = os.environ.get("SOAK_COUNT", "20")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--count", count, "--folder", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{count} faults" in result.stdout
