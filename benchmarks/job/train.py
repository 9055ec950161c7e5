"""The job that both sides of edit_to_step.py run: DistributedDataParallel over Gloo, three steps, every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

LEARNING_RATE = 0.0100000  # the line that is edited


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, 4):
        inputs = torch.randn(32, 64, generator=generator)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss.item():.4f} lr {LEARNING_RATE}", flush=True)
    dist.destroy_process_group()


main()
