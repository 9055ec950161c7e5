"""Evaluates batches of several sizes, before and after a training step. argv: output, overrides.

Writes each rank's contributions: {rows: [before, after]}, and whether parameters came through unchanged.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import config as configuration
from trainer.distributed import pipeline_parallel
from trainer.distributed.env import RankEnv
from trainer.distributed.layout import layout_for
from trainer.distributed.mesh import Mesh
from trainer.distributed.parallel_model import Batch
from trainer.distributed.process_group import Communicator
from trainer.models.loss import install_loss, summed_loss

SIZES = (5, 2, 5, 1)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        use_cache=False,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(settings).double()


def batch_of(rows: int, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, 40, (rows, length), generator=generator)
    labels[:, ::3] = -100
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).repeat(rows, 1)
    tokens = torch.randint(0, 40, (rows, length), generator=generator)
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def main(output: str, overrides: list[str]) -> None:
    config = configuration.load("demo", overrides)
    env = RankEnv.read(os.environ)
    comm = Communicator(env, torch.device("cpu"), 30)
    mesh = Mesh(layout_for(config, env.world_size, env.local_world_size), comm)
    plain = small_model()

    def fill(parts: Sequence[nn.Module]) -> None:
        for part in parts:
            part.to_empty(device="cpu")
            values = plain.state_dict() | dict(plain.named_buffers())
            with torch.no_grad():
                for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
                    tensor.copy_(values[name])

    with torch.device("meta"):
        model = small_model()
    install_loss(model, "plain")
    parallel = pipeline_parallel.build(model, config, mesh, fill)
    found: dict[str, list[float]] = {}
    for _ in range(2):
        parallel.train(False)
        for rows in SIZES:
            found.setdefault(str(rows), []).append(float(parallel.evaluate(batch_of(rows))))
        parallel.train(True)
        parallel.forward_backward([batch_of(2)] * 4, 0.5)
    with torch.no_grad():
        expected = {
            str(rows): float(summed_loss(plain(**batch, use_cache=False).logits, labels))
            for rows in SIZES
            for batch in [batch_of(rows)]
            for labels in [batch.pop("labels")]
        }
    same = all(torch.equal(value, plain.get_parameter(name)) for name, value in parallel.named_parameters())
    report = {"found": found, "expected": expected, "unchanged": same}
    Path(f"{output}.{env.rank}").write_text(json.dumps(report))
    comm.close()


main(sys.argv[1], sys.argv[2:])
