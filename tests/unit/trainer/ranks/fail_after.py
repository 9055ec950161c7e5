"""The trainer; rank FAIL_RANK raises after FAIL_AFTER steps."""

import os
import runpy

from trainer.metrics import Reporter, StepMetrics

original = Reporter.step


def step(self: Reporter, step: int, metrics: StepMetrics) -> None:
    original(self, step, metrics)
    if step == int(os.environ["FAIL_AFTER"]) and os.environ["RANK"] == os.environ["FAIL_RANK"]:
        raise ZeroDivisionError("injected")


Reporter.step = step  # type: ignore[method-assign]
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
