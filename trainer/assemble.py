"""From a recipe to the objects of a run: data, model, optimizer, loop. Tasks put these together."""

from __future__ import annotations

import copy
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.configuration_utils import PretrainedConfig

from trainer.config import Config, DataConfig
from trainer.context import Context
from trainer.data import sources
from trainer.data.documents import Documents
from trainer.data.stream import EvalRows
from trainer.data.subset import Subset, split
from trainer.data.tokenizer import TextTokenizer
from trainer.data.tokenizer import prepare as train_tokenizer
from trainer.distributed.layout import layout_for
from trainer.distributed.mesh import Mesh
from trainer.distributed.parallel_model import ParallelModel
from trainer.distributed.process_group import Communicator, pick_device
from trainer.errors import DataError
from trainer.evaluate import Evaluation, evaluate
from trainer.metrics import Reporter
from trainer.models import build, download, flops, sparse, weights
from trainer.models.lora import apply_lora
from trainer.models.parallelize import parallelize

TOKENIZER_SAMPLE = 20_000
"""Documents that a tokenizer is trained on, at most."""


@dataclass
class Session:
    """What every task has before it looks at its data."""

    context: Context
    mesh: Mesh
    reporter: Reporter

    @property
    def config(self) -> Config:
        return self.context.config

    @property
    def comm(self) -> Communicator:
        return self.mesh.comm

    def close(self) -> None:
        self.reporter.close()
        self.comm.close()


def open_session(context: Context) -> Session:
    """Joins the ranks, seeds them, and says who takes part."""
    env, config = context.env, context.config
    device = pick_device(env, config.train.device)
    comm = Communicator(env, device, config.distributed.timeout)
    layout = layout_for(config, env.world_size, env.local_world_size)
    reporter = Reporter(
        config, context.folders.run, context.events, device, main=env.is_main, world_size=env.world_size
    )
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    seed_everything(config.seed, env.rank)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    context.events.emit(
        "start", world=env.world_size, host=platform.node(), versions=versions, config_hash=config.hash()
    )
    hosts = sorted(set(comm.gather(platform.node())))
    nodes = f"{len(hosts)} node{'s' if len(hosts) > 1 else ''} ({', '.join(hosts)})"
    reporter.say(f"world: {env.world_size} ranks on {nodes}, {layout.describe()}")
    return Session(context, Mesh(layout, comm), reporter)


def seed_everything(seed: int, rank: int) -> None:
    """Other random numbers on each rank, the same at each start."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@dataclass
class Data:
    """What a run trains and evaluates on; the same on every rank."""

    tokenizer: TextTokenizer | None
    """None only for data that is tokens already, or made up."""
    train: Documents
    held_out: Documents | None
    held_out_config: DataConfig
    """How rows are made of `held_out`."""

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id if self.tokenizer else 0


def open_data(session: Session, pretrained: Path | None) -> Data:
    """The documents that the recipe names. Raises DataError if the ranks do not have the same."""
    config, comm = session.config, session.comm
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    site = sources.Site(
        cache=session.context.folders.cache,
        leader=comm.env.is_node_main,
        say=_say_at_once,
        seed=config.seed,
        vocab_size=vocab_size,
    )
    store = sources.open_store(config.data, site)
    keep, held = split(len(store), 0 if config.eval.source else config.data.holdout, config.seed)
    tokenizer = _open_tokenizer(session, pretrained, store, keep)
    documents = sources.documents(store, config.data, tokenizer, config.seed)
    held_config = config.data
    held_out: Documents | None = None
    if config.eval.source:
        chosen = config.eval.model_dump(include={"source", "path", "name", "subset", "split", "column"})
        held_config = config.data.model_copy(update={**chosen, "remote": None, "limit": None, "shuffle": False})
        other = sources.open_store(held_config, site)
        held_out = sources.documents(other, held_config, tokenizer, config.seed)
    elif len(held):
        held_out = Subset(documents, held)
    train = Subset(documents, keep) if len(held) else documents
    _same_everywhere(comm, train, held_out)
    rest = f"{len(held_out):,} held out" if held_out is not None else "none held out"
    session.reporter.say(
        f"data: {config.data.source}, {len(train):,} documents, {rest}; {config.data.strategy}"
        f" into rows of {config.data.seq_len}"
    )
    return Data(tokenizer, train, held_out, held_config)


def _say_at_once(text: str) -> None:
    print(text, flush=True)


def _open_tokenizer(
    session: Session, pretrained: Path | None, store: sources.Store, keep: np.ndarray
) -> TextTokenizer | None:
    config, env = session.config, session.comm.env
    cache, timeout = session.context.folders.cache, config.data.prepare_timeout
    leader = env.is_node_main
    if config.tokenizer.path:
        patterns = download.TOKENIZER_PATTERNS
        folder = download.fetch(
            config.tokenizer.path, None, cache, leader=leader, timeout=timeout, say=_say_at_once, patterns=patterns
        )
    elif pretrained is not None:
        folder = pretrained
    elif store.kind == "tokens":
        return None
    else:
        # of the training documents only: nothing that is held out may shape the vocabulary
        sample = list(sources.texts(store, keep[:TOKENIZER_SAMPLE].tolist()))
        folder = train_tokenizer(
            sample, config.tokenizer.vocab_size, cache, leader=leader, timeout=timeout, say=_say_at_once
        )
    return TextTokenizer.from_folder(folder)


def _same_everywhere(comm: Communicator, train: Documents, held_out: Documents | None) -> None:
    mine = (train.fingerprint, held_out.fingerprint if held_out is not None else "")
    prints = comm.gather((platform.node(), mine))
    different = sorted({host for host, one in prints if one != prints[0][1]})
    if different:
        raise DataError(
            f"the data on {', '.join(different)} is not the same as on rank 0's node {prints[0][0]}",
            hint="All nodes need the same image (Python and tokenizers versions) and the same files.",
        )


def pretrained_folder(session: Session) -> Path | None:
    """`model.pretrained` on this node's disk, fetched if need be."""
    model = session.config.model
    if not model.pretrained:
        return None
    return download.fetch(
        model.pretrained,
        model.revision,
        session.context.folders.cache,
        leader=session.comm.env.is_node_main,
        timeout=session.config.data.prepare_timeout,
        say=_say_at_once,
    )


@dataclass
class Model:
    parallel: ParallelModel
    hf_config: PretrainedConfig
    sparse: sparse.SparseController | None


def open_model(session: Session, tokenizer: TextTokenizer | None, pretrained: Path | None) -> Model:
    """The recipe's model in its layout, with its weights, on this rank's device."""
    config, device = session.config, session.comm.device
    sparse.check(config)
    size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else config.tokenizer.vocab_size)
    hf_config = build.model_config(
        config,
        vocab_size=size,
        bos_id=tokenizer.bos_id if tokenizer else None,
        eos_id=tokenizer.eos_id if tokenizer else None,
        pad_id=tokenizer.pad_id if tokenizer else None,
        pretrained=pretrained,
    )
    whole = build.on_meta(config, hf_config, device)
    if config.model.lora.rank:
        apply_lora(whole, config)
    sparse.apply_sparse(whole, config.model.sparse)
    plan = copy.deepcopy(whole)  # on the meta device: names and shapes, no memory

    def materialise(parts: Sequence[nn.Module]) -> None:
        if pretrained is None:
            weights.initialise(parts, plan, config.seed, device)
        else:
            weights.load_pretrained(parts, plan, pretrained, config.seed, device)

    parallel = parallelize(whole, config, session.mesh, materialise)
    controller = sparse.SparseController(parallel.parts, config.model.sparse)
    total = build.count_parameters(plan)
    trained = sum(parameter.numel() for parameter in plan.parameters() if parameter.requires_grad)
    session.reporter.set_flops(flops.flops_per_token(hf_config, config.data.seq_len, frozen=config.model.lora.rank > 0))
    part = f", {trained / 1e6:.2f} M trained" if trained != total else ""
    session.reporter.say(
        f"model: {hf_config.model_type}, {total / 1e6:.2f} M parameters{part}, {config.train.precision},"
        f" {plan.config._attn_implementation} attention, on {device.type}"
    )
    return Model(parallel, hf_config, controller if controller.layers else None)


def held_out_rows(session: Session, data: Data) -> EvalRows | None:
    if data.held_out is None:
        return None
    config, mesh = session.config, session.mesh
    return EvalRows(
        data.held_out,
        data.held_out_config,
        micro_batch=config.eval.micro_batch,
        data_rank=mesh.data_rank,
        data_size=mesh.layout.data,
        pad_id=data.pad_id,
        seed=config.seed,
        max_rows=config.eval.max_rows,
    )


def evaluate_and_report(session: Session, model: ParallelModel, rows: EvalRows | None, step: int) -> Evaluation | None:
    if rows is None:
        return None
    began = time.perf_counter()
    result = evaluate(model, rows)
    seconds = time.perf_counter() - began
    session.reporter.evaluation(step, result.loss, result.perplexity, result.tokens, seconds)
    return result
