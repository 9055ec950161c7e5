"""reduce.py RANK HOW: all ranks all-reduce in a loop until the file `go` appears on RANK, which then fails."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

bad, how = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()
go = Path(os.environ["ORCH_RUN_DIR"]) / "go"
print(f"ready rank {rank} of {dist.get_world_size()}", flush=True)
while True:
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    if rank == bad and go.exists():
        if how == "raise":
            raise ValueError("the batch 17 is torn")
        os.kill(os.getpid(), signal.SIGKILL)
