"""talk.py RATE: numbered lines on stdout and stderr, RATE a second, until the file `go` appears; then the last one."""

import os
import sys
import time
from pathlib import Path

rate = float(sys.argv[1])
rank = os.environ.get("RANK", "0")
go = Path(os.environ["ORCH_RUN_DIR"]) / "go"
number = 0
began = time.monotonic()
print(f"ready rank {rank}", flush=True)
while not go.exists():
    due = int((time.monotonic() - began) * rate)
    while number < due:
        stream = sys.stderr if number % 7 == 0 else sys.stdout
        text = "x" * (number * 37 % 500)
        stream.write(f"{rank}:{number} {text} äöü\n")
        stream.flush()
        number += 1
    time.sleep(0.02)
print(f"last {number}", flush=True)
