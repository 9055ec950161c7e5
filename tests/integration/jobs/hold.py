"""hold.py [TOKEN]: says it is ready, then ticks until the file `go` appears in its run folder or it gets SIGTERM."""

import os
import signal
import sys
import time
from pathlib import Path

rank = os.environ.get("RANK", "0")


def leave(signum, frame):
    print(f"got signal {signum}", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, leave)
go = Path(os.environ["ORCH_RUN_DIR"]) / "go"
checkpoint = Path(os.environ["ORCH_CHECKPOINT_DIR"]) / "mark"
before = checkpoint.read_text().split() if checkpoint.exists() else []
checkpoint.write_text(" ".join([*before, os.environ["ORCH_ATTEMPT"]]))
print(f"ready rank {rank} attempt {os.environ['ORCH_ATTEMPT']} before {before}", flush=True)
tick = 0
while not go.exists():
    time.sleep(0.1)
    tick += 1
    if tick % 5 == 0:
        print(f"tick {tick}", flush=True)
print("gone on", flush=True)
