"""The trainer, whose losses on rank NAN_RANK (default 0) are NaN after NAN_AFTER steps of NAN_CALLS micro-batches."""

import os
import runpy

from trainer.models import loss

original = loss.summed_loss
calls = 0


def summed_loss(logits, labels):
    global calls
    calls += 1
    value = original(logits, labels)
    guilty = os.environ.get("RANK", "0") == os.environ.get("NAN_RANK", "0")
    late = calls > int(os.environ["NAN_CALLS"]) * int(os.environ["NAN_AFTER"])
    return value * float("nan") if guilty and late else value


loss.summed_loss = summed_loss
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
