"""The barest PyTorch DDP loop over a Llama: what our trainer's tokens/s and start are compared with.

Random tokens made beforehand, plain transformers model, DDP, fused AdamW; no data, no clipping, no log, no checkpoint.
As a program: rank 0 writes one JSON line, the seconds from START_TIME to the end of the first step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


class Bare:
    """In the default process group."""

    def __init__(self, model: dict[str, Any], rows: int, seq_len: int) -> None:
        module = LlamaForCausalLM(LlamaConfig(**model, use_cache=False))
        self._model = DistributedDataParallel(module, gradient_as_bucket_view=True)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self._tokens = torch.randint(model["vocab_size"], (8, rows, seq_len + 1), generator=generator)
        # with neither cache nor mask transformers would build one of (rows, L, L), and the kernel could not be causal
        self._all = torch.ones(rows, seq_len, dtype=torch.bool)
        self._steps = 0

    def step(self) -> None:
        batch = self._tokens[self._steps % len(self._tokens)]
        logits = self._model(input_ids=batch[:, :-1], attention_mask=self._all).logits
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1


def main() -> None:
    dist.init_process_group("gloo")
    Bare(**json.loads(sys.argv[1])).step()
    if dist.get_rank() == 0:
        print(json.dumps({"first": time.time() - float(os.environ["START_TIME"])}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
