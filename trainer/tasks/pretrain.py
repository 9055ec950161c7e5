"""Training a causal language model on documents: data, model, loop, held-out perplexity, a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainer.assemble import (
    Data,
    Model,
    Session,
    evaluate_and_report,
    held_out_rows,
    open_data,
    open_model,
    open_session,
    pretrained_folder,
)
from trainer.checkpoints import Checkpointer, TrainingState
from trainer.config import Config
from trainer.context import Context, Outcome
from trainer.data.stream import BatchStream
from trainer.data.tokenizer import TextTokenizer
from trainer.distributed.data_parallel import compute_precision
from trainer.loop import Loop
from trainer.models.lora import adapter_of
from trainer.optimize import LossScaler, Schedule, build_optimizer
from trainer.profiling import Profiler
from trainer.watchdog import Watchdog


def run(context: Context) -> Outcome:
    """The whole task, on every rank."""
    session = open_session(context)
    outcome = train(session)
    session.close()
    return outcome


def train(session: Session, finish: Callable[[TrainingState, Checkpointer], object] | None = None) -> Outcome:
    """Trains from the newest checkpoint, or the beginning, to `train.steps`; evaluates and shows a sample.

    `finish`: what else is done with the model once all steps are taken.
    """
    context, config = session.context, session.config
    folder = pretrained_folder(session)
    data = open_data(session, folder)
    model = open_model(session, data.tokenizer, folder)
    rows = held_out_rows(session, data)
    state = training_state(session, data, model, folder)
    checkpointer = Checkpointer(
        config.checkpoint, context.folders.checkpoints, session.mesh, session.reporter, run=config.name
    )
    run_dir, rank = context.folders.run, context.env.rank
    watchdog = Watchdog(run_dir, rank, context.events, factor=config.log.hang_factor, floor=config.log.hang_floor)
    profiler = Profiler(config.log.profile, run_dir, rank)
    loop = Loop(
        config=config,
        state=state,
        mesh=session.mesh,
        checkpointer=checkpointer,
        reporter=session.reporter,
        events=context.events,
        stop=context.stop,
        evaluate=lambda step: evaluate_and_report(session, model.parallel, rows, step),
        watchdog=watchdog,
        profiler=profiler,
        sparse=model.sparse,
    )
    checkpointer.resume(state, before_load=loop.settle)
    context.events.step = state.step
    if model.sparse is not None:
        model.sparse.step(max(state.step - 1, 0))  # as in the last step taken, should there be none to take
    if state.step >= config.train.steps:
        session.reporter.say(f"training is already complete at step {state.step} of {config.train.steps}")
    try:
        if loop.run() == "preempted":
            return Outcome("preempted", state.step)
    finally:
        watchdog.close()
        profiler.close()
        state.stream.close()
    final = evaluate_and_report(session, model.parallel, rows, state.step)
    if data.tokenizer is not None:
        print_sample(session, model, data.tokenizer)
    if finish is not None:
        finish(state, checkpointer)
    return Outcome("succeeded", state.step, final.loss if final else None)


def training_state(session: Session, data: Data, model: Model, pretrained: Path | None) -> TrainingState:
    config, mesh = session.config, session.mesh
    optimizer = build_optimizer(model.parallel, config.optim)
    stream = BatchStream(
        data.train,
        config.data,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=mesh.data_rank,
        data_size=mesh.layout.data,
        pad_id=data.pad_id,
        seed=config.seed,
        timeout=config.distributed.timeout,
    )
    return TrainingState(
        model=model.parallel,
        optimizer=optimizer,
        schedule=Schedule(optimizer, config.train.steps, config.optim),
        scaler=LossScaler(config.train.precision == "fp16"),
        stream=stream,
        hf_config=model.hf_config,
        tokenizer_folder=data.tokenizer.folder if data.tokenizer else None,
        config_hash=config.hash(),
        adapter=adapter_of(config, model.hf_config, pretrained),
        pretrained=pretrained,
        chat=config.data.source == "chat",
    )


@torch.no_grad()
def print_sample(session: Session, model: Model, tokenizer: TextTokenizer) -> None:
    """Prints the prompt with the model's continuation; the same text at each run of the same weights.

    All ranks generate together with the same random numbers, since a sharded model's forward pass is collective.
    A pipeline's stages cannot: no sample there.
    """
    config = session.config
    sample, device = config.sample, session.comm.device
    if not sample.max_new_tokens or session.mesh.layout.pipeline > 1:
        return
    (module,) = model.parallel.parts
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    ids = torch.tensor([[*start, *tokenizer.encode(sample.prompt)]], device=device)
    model.parallel.train(False)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, compute_precision(config, session.mesh):
        torch.manual_seed(config.seed)
        for _ in range(min(sample.max_new_tokens, max(config.data.seq_len - ids.shape[1], 1))):
            ids = torch.cat([ids, _next_token(module, ids, config)], dim=1)
            if ids[0, -1] == tokenizer.eos_id:
                break
    model.parallel.train()
    if session.comm.env.is_main:
        print(f"sample: {tokenizer.decode(ids[0].tolist())!r}", flush=True)


def _next_token(module: torch.nn.Module, ids: torch.Tensor, config: Config) -> torch.Tensor:
    """(1, 1): drawn at `sample.temperature` from the model's distribution after `ids` (1, n)."""
    last = ids.shape[1] - 1
    # sequence parallelism cuts rows evenly; what is behind the last token cannot be seen from it
    ids = F.pad(ids, (0, -ids.shape[1] % config.parallel.tensor))
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logits = module(input_ids=ids, position_ids=positions, use_cache=False).logits
    logits = (logits.full_tensor() if isinstance(logits, DTensor) else logits)[:, last].float()
    if config.sample.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial(torch.softmax(logits / config.sample.temperature, dim=-1), 1)
