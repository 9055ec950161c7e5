"""The trainer, asked to stop after STOP_AFTER steps: by the file, or by SIGTERM with STOP_BY=signal."""

import os
import runpy
import signal

from trainer.metrics import Reporter, StepMetrics

after = int(os.environ.get("STOP_AFTER", "0"))
original = Reporter.step


def step(self: Reporter, step: int, metrics: StepMetrics) -> None:
    original(self, step, metrics)
    if step == after and os.environ.get("STOP_BY") == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    elif step == after:
        open(os.path.join(os.environ["ORCH_RUN_DIR"], "stop"), "w").close()


Reporter.step = step  # type: ignore[method-assign]
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
