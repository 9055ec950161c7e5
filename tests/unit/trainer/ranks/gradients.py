"""Takes one step of `Loop` and writes what the optimizer would have seen. argv: output, recipe, overrides."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from trainer import config as configuration
from trainer.checkpoint import Checkpointer
from trainer.context import Context, Folders
from trainer.distributed.data_parallel import DataParallel
from trainer.distributed.env import RankEnv
from trainer.distributed.process_group import Communicator
from trainer.events import Events
from trainer.loop import Loop
from trainer.metrics import Reporter
from trainer.models.load import build_model
from trainer.optim import build_optimizer, build_schedule
from trainer.stop import StopRequest
from trainer.tasks import pretrain
from trainer.training_state import TrainingState

output, *overrides = sys.argv[1:]
config = configuration.load("demo", overrides)
env = RankEnv.read(os.environ)
folders = Folders.read(os.environ, "gradients")
events = Events(folders.run, env.rank, 1)
comm = Communicator(env, torch.device("cpu"), 60)
reporter = Reporter(config, folders.run, events, comm.device, main=env.is_main, world_size=env.world_size)
context = Context(env, config, folders, events, StopRequest(folders.run))
folder, train_set, held_out = pretrain._prepare_data(context, comm, reporter)
module = build_model(config, 300, comm.device)
optimizer = build_optimizer(module, config.optim)
schedule = build_schedule(optimizer, config.train.steps, config.optim)
stream = pretrain._stream(config, train_set, comm)
state = TrainingState(module, optimizer, schedule, stream, folder, config.hash())
seen: dict[str, torch.Tensor] = {}


def record(closure: None = None) -> None:
    seen.update({name: parameter.grad.clone() for name, parameter in module.named_parameters()})


optimizer.step = record  # type: ignore[method-assign]
loop = Loop(
    config,
    state,
    DataParallel(module, comm),
    comm,
    checkpointer=Checkpointer(config.checkpoint, folders.checkpoints, comm, reporter),
    reporter=reporter,
    events=events,
    stop=context.stop,
    evaluate=lambda step: None,
)
metrics = loop.step()
assert metrics is not None
evaluation = pretrain.evaluate(
    module, held_out, comm, micro_batch=3, cross_document_attention=config.data.cross_document_attention
)
torch.save(
    {
        "gradients": seen,
        "loss": metrics.loss,
        "tokens": metrics.tokens,
        "held_out_loss": evaluation.loss,
        "held_out_tokens": evaluation.tokens,
        "rows": [torch.from_numpy(train_set.row(0, index)) for index in range(config.train.global_batch)],
        "held_out_rows": [torch.from_numpy(held_out.row(0, index)) for index in range(len(held_out))],
    },
    Path(f"{output}.{env.rank}"),
)
comm.close()
