"""Training a causal language model from nothing: data, model, loop, held-out perplexity, a sample."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from trainer.checkpoint import Checkpointer
from trainer.config import Config
from trainer.context import Context, Outcome
from trainer.data import text, tokenizer
from trainer.data.loader import BatchStream
from trainer.data.packing import PackedDataset, encode
from trainer.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from trainer.distributed.data_parallel import DataParallel
from trainer.distributed.process_group import Communicator, pick_device
from trainer.errors import DataError
from trainer.evaluate import Evaluation, evaluate
from trainer.loop import Loop
from trainer.metrics import Reporter, flops_per_token
from trainer.models.load import build_model, count_parameters
from trainer.optim import build_optimizer, build_schedule
from trainer.training_state import TrainingState, seed_everything


def run(context: Context) -> Outcome:
    """The whole task, on every rank."""
    env, config = context.env, context.config
    device = pick_device(env, config.train.device)
    comm = Communicator(env, device, config.distributed.timeout)
    reporter = Reporter(
        config, context.folders.run, context.events, device, main=env.is_main, world_size=env.world_size
    )
    _announce(context, comm, reporter)
    outcome = _train(context, comm, reporter)
    reporter.close()
    comm.close()
    return outcome


def _train(context: Context, comm: Communicator, reporter: Reporter) -> Outcome:
    config, events = context.config, context.events
    folder, train_set, held_out = _prepare_data(context, comm, reporter)
    seed_everything(config.seed, comm.env.rank)
    module = build_model(config, tokenizer.load(folder).get_vocab_size(), comm.device)
    parameters = count_parameters(module)
    reporter.set_flops(flops_per_token(module.config, parameters, config.data.seq_len))
    reporter.say(
        f"model: {parameters / 1e6:.2f} M parameters, {config.train.precision}, on {comm.device.type}"
    )
    model = DataParallel(module, comm)
    optimizer = build_optimizer(module, config.optim)
    state = TrainingState(
        model=module,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.train.steps, config.optim),
        stream=_stream(config, train_set, comm),
        tokenizer_folder=folder,
        config_hash=config.hash(),
    )

    def held_out_loss(step: int) -> Evaluation | None:
        if not len(held_out):
            return None
        began = time.perf_counter()
        result = evaluate(
            module,
            held_out,
            comm,
            micro_batch=config.eval.micro_batch,
            cross_document_attention=config.data.cross_document_attention,
        )
        reporter.evaluation(step, result.loss, result.perplexity, result.tokens, time.perf_counter() - began)
        return result

    checkpointer = Checkpointer(config.checkpoint, context.folders.checkpoints, comm, reporter)
    loop = Loop(
        config,
        state,
        model,
        comm,
        checkpointer=checkpointer,
        reporter=reporter,
        events=events,
        stop=context.stop,
        evaluate=held_out_loss,
    )
    checkpointer.resume(state, before_load=loop.settle)
    events.step = state.step
    if state.step >= config.train.steps:
        reporter.say(f"training is already complete at step {state.step} of {config.train.steps}")
    if loop.run() == "preempted":
        return Outcome("preempted", state.step)
    final = held_out_loss(state.step)
    if comm.env.is_main:
        _print_sample(module, folder, config, comm.device)
    return Outcome("succeeded", state.step, final.loss if final else None)


def _announce(context: Context, comm: Communicator, reporter: Reporter) -> None:
    env = context.env
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    context.events.emit(
        "start",
        world=env.world_size,
        host=platform.node(),
        versions=versions,
        config_hash=context.config.hash(),
    )
    hosts = sorted(set(comm.gather(platform.node())))
    reporter.say(f"world: {env.world_size} ranks on {len(hosts)} nodes ({', '.join(hosts)})")


def _prepare_data(
    context: Context, comm: Communicator, reporter: Reporter
) -> tuple[Path, PackedDataset, PackedDataset]:
    """(tokenizer folder, training rows, held-out rows), the same on every rank.

    Raises DataError if the ranks do not have the same data.
    """
    config = context.config
    data = config.data
    train_text, held_text = text.split(text.load_documents(data), data.holdout, config.seed)
    folder = tokenizer.prepare(
        train_text,
        config.tokenizer.vocab_size,
        context.folders.cache,
        leader=comm.env.is_node_main,
        timeout=data.prepare_timeout,
        say=lambda line: print(line, flush=True),
    )
    encoder = tokenizer.load(folder)
    train_set = PackedDataset(encode(encoder, train_text), data.seq_len, config.seed, data.shuffle)
    held_out = PackedDataset(encode(encoder, held_text), data.seq_len, config.seed, shuffle=False)
    prints = comm.gather((platform.node(), train_set.fingerprint, held_out.fingerprint))
    different = sorted({host for host, *prints_ in prints if prints_ != list(prints[0][1:])})
    if different:
        raise DataError(
            f"the data on {', '.join(different)} is not the same as on rank 0's node {prints[0][0]}",
            hint="All nodes need the same image (Python and tokenizers versions) and the same files.",
        )
    reporter.say(
        f"data: {data.source}, {train_set.tokens:,} tokens in {len(train_set):,} rows of {data.seq_len},"
        f" {len(held_out):,} rows held out"
    )
    return folder, train_set, held_out


def _stream(config: Config, dataset: PackedDataset, comm: Communicator) -> BatchStream:
    return BatchStream(
        dataset,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=comm.env.rank,
        world_size=comm.world_size,
        cross_document_attention=config.data.cross_document_attention,
    )


@torch.no_grad()
def _print_sample(model: torch.nn.Module, folder: Path, config: Config, device: torch.device) -> None:
    """Prints the prompt with the model's continuation; the same text at each run of the same weights."""
    sample = config.sample
    if not sample.max_new_tokens:
        return
    encoder = tokenizer.load(folder)
    ids = torch.tensor(
        [[BOS_ID, *encoder.encode(sample.prompt, add_special_tokens=False).ids]], device=device
    )
    room = max(config.data.seq_len - ids.shape[1], 1)
    model.eval()
    torch.manual_seed(config.seed)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(sample.max_new_tokens, room),
        do_sample=sample.temperature > 0,
        temperature=sample.temperature or None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        use_cache=True,
    )
    print(f"sample: {encoder.decode(output[0].tolist(), skip_special_tokens=True)!r}", flush=True)
