"""torch.profiler for a few steps of every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROWS = 15
"""Operators in the table that rank 0 prints."""


class Profiler:
    """Traces the steps `steps[0]` to `steps[1]`, counted from 1 and including both, of this process.

    Writes `profile/rank-R.json.gz` in the run folder, a Chrome trace (perfetto and chrome://tracing open it). A run
    that resumes behind the first step traces what is left of them, or nothing.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, rank: int) -> None:
        self._steps = steps
        self._path = run_dir / "profile" / f"rank-{rank}.json.gz"
        self._print = rank == 0
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """At the beginning of step `step`."""
        if self._steps is None or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def after(self, step: int) -> None:
        """At the end of step `step`; writes the trace after the last."""
        if self._steps is not None and self._profile is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Writes what was traced, also if the run ends early."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        if self._print:
            key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            print(self._profile.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60))
            print(f"profile: {self._path}", flush=True)
        self._profile, self._steps = None, None
