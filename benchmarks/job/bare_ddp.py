"""The barest PyTorch DDP loop over a Llama: what our trainer's tokens/s and start are compared with.

Random tokens made beforehand, plain transformers model, DDP, fused AdamW; no data, no clipping, no log, no checkpoint.
Rank 0 writes one JSON line: seconds from START_TIME to the end of the first step, and each step's seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    given = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    config = LlamaConfig(**given["model"], use_cache=False)
    model = DistributedDataParallel(LlamaForCausalLM(config), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(given["model"]["vocab_size"], (8, given["rows"], given["seq_len"] + 1))
    seconds = []
    first = 0.0
    for step in range(given["steps"]):
        began = time.perf_counter()
        batch = tokens[step % len(tokens)]
        logits = model(input_ids=batch[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        first = first or time.time() - float(os.environ["START_TIME"])
    if rank == 0:
        print(json.dumps({"first": first, "seconds": seconds}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
