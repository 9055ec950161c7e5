"""`python -m trainer prepare`: any source of texts → an MDS folder of texts or tokens, in parallel.

The documents are cut into parts of a fixed number, whatever the number of workers, so the output does not depend
on it. A part is written into a staging folder, flushed and renamed: `part-00007` is whole, or not there. The
index over all parts is written last. The same command after a kill does only the parts that are missing.

    part-00000/shard.00000.mds …   index.json       readable by streaming's StreamingDataset and by the source `mds`
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.context import Folders
from trainer.data import sources
from trainer.data.sources.base import Site, Store
from trainer.data.streaming_import import MDSWriter
from trainer.data.tokenizer import TextTokenizer
from trainer.errors import EXIT_OK, ConfigError, DataError
from trainer.locks import locked
from trainer.models.download import TOKENIZER_PATTERNS, fetch

EXTRA = "trainer"
"""Our key in index.json, which streaming ignores."""
INDEX, PLAN = "index.json", ".prepare.json"
LOCK_WAIT, FETCH_WAIT = 5.0, 600.0
"""Seconds to wait for another prepare of the same folder; for another process to fetch the same tokenizer."""
PROGRESS = 2.0
"""Seconds between two lines of progress."""
_BATCH = 256


@dataclass(frozen=True)
class Job:
    """What each worker needs; workers are forked, so the store is not copied."""

    store: Store
    tokenizer: TextTokenizer | None
    out: Path
    part_size: int
    shard_bytes: str
    compression: str | None

    @property
    def parts(self) -> int:
        return -(-len(self.store) // self.part_size)

    @property
    def columns(self) -> dict[str, str]:
        if self.tokenizer is None:
            return {"text": "str"}
        small = self.tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1
        return {"tokens": "ndarray:uint16" if small else "ndarray:int32"}

    def part(self, number: int) -> Path:
        return self.out / f"part-{number:05}"

    def plan(self) -> dict[str, Any]:
        """All that the output depends on."""
        return {
            "content": self.store.fingerprint,
            "documents": len(self.store),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.fingerprint,
            "columns": self.columns,
            "part_size": self.part_size,
            "shard_bytes": self.shard_bytes,
            "compression": self.compression,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", default="text_files", help=f"one of {', '.join(sources.names())}, or module:function"
    )
    parser.add_argument("--path", help="local file or folder of the source")
    parser.add_argument("--name", help="hub: name of the data set")
    parser.add_argument("--subset", help="hub: its configuration")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--revision", help="hub: branch, tag or commit")
    parser.add_argument("--column", help="column with the text (default: found by itself)")
    parser.add_argument("--limit", type=_positive, help="only the first documents")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--tokenizer", help="folder or hub name: write tokens made with it (default: write text)")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--part", type=_positive, default=50_000, help="documents per part (default: 50000)")
    parser.add_argument("--shard", default="64mb", help="largest shard, uncompressed (default: 64mb)")
    parser.add_argument("--compression", help="of shards: zstd, zstd:7, gz, … (default: none)")


def run(args: argparse.Namespace) -> int:
    """Raises TrainerError; a full disk and a killed worker are among them."""
    # before torch's and the tokenizers' threads: the workers are forked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keys = ("source", "path", "name", "subset", "split", "revision", "column", "limit")
    data = DataConfig(**{key: getattr(args, key) for key in keys})
    cache = Folders.read(os.environ, "prepare").cache
    store = sources.open_store(data, Site(cache=cache, say=_say))
    if store.kind != "text":
        raise ConfigError(f"--source {args.source} holds {store.kind}; only texts can be prepared")
    job = Job(store, _tokenizer(args.tokenizer, cache), args.out, args.part, args.shard, args.compression)
    _say(f"{len(store):,} documents in {job.parts} parts, {args.workers} workers")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with locked(args.out / ".prepare.lock", LOCK_WAIT, _say, f"another prepare of {args.out}"):
            _agree(job)
            _write_missing(job, args.workers)
            _finish(job)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"cannot write {args.out}: {error}") from error
        hint = "Free space, then run the same command again: it continues."
        raise DataError(f"the disk is full: {args.out}", hint=hint) from None
    return EXIT_OK


def _agree(job: Job) -> None:
    """Makes sure that what lies there already was begun with the same data and options."""
    file = job.out / PLAN
    plan = job.plan()
    if file.exists():
        before = json.loads(file.read_text())
        changed = [key for key in plan if before.get(key) != plan[key]]
        if changed:
            raise ConfigError(
                f"{job.out} was begun with other {', '.join(changed)}",
                hint="Choose another --out, delete that folder, or repeat the command it was begun with.",
            )
    elif any(not entry.name.startswith(".") for entry in job.out.iterdir()):
        raise ConfigError(f"{job.out} is not empty and not ours", hint="Choose another --out.")
    else:
        _write_whole(file, json.dumps(plan, indent=2))
    for staging in job.out.glob(".part-*"):
        shutil.rmtree(staging)  # of a killed run: we hold the lock


def _write_missing(job: Job, workers: int) -> None:
    global _job
    _job = job
    missing = [number for number in range(job.parts) if not job.part(number).is_dir()]
    if len(missing) < job.parts:
        _say(f"{job.parts - len(missing)} parts are there already")
    began = told = time.monotonic()
    with _pool(min(workers, max(1, len(missing)))) as pool:
        futures = [pool.submit(_write_part, number) for number in missing]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                if time.monotonic() - told > PROGRESS or count == len(missing):
                    told = time.monotonic()
                    rate = count * job.part_size / (told - began)
                    _say(f"{job.parts - len(missing) + count}/{job.parts} parts, about {rate:,.0f} documents/s")
        except BrokenProcessPool:
            raise DataError(
                "a worker was killed, perhaps for lack of memory",
                hint="Run the same command again with fewer --workers; it continues.",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> Executor:
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_die_with, initargs=(os.getpid(),)
    )


def _die_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever, and hold the folder's lock."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_job: Job
"""Set before the workers are forked."""


def _write_part(number: int) -> None:
    job = _job
    staging = job.out / f".part-{number:05}"
    shutil.rmtree(staging, ignore_errors=True)
    first = number * job.part_size
    counts = {"documents": 0, "empty": 0, "tokens": 0}
    writer = MDSWriter(
        out=str(staging),
        columns=job.columns,
        compression=job.compression,
        hashes=["sha256"],
        size_limit=job.shard_bytes,
    )
    for sample in _samples(job, range(first, min(first + job.part_size, len(job.store))), counts):
        writer.write(sample)
    # not finish(): it sleeps a second for uploads that are none, and knows nothing of our counts
    if writer.new_samples:
        writer.flush_shard()
    writer.executor.shutdown()
    (staging / INDEX).write_text(json.dumps({"version": 2, "shards": writer.shards, EXTRA: counts}, sort_keys=True))
    for file in [*staging.iterdir(), staging]:
        _flush(file)
    os.rename(staging, job.part(number))
    _flush(job.out)


def _samples(job: Job, indices: range, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Blank documents are left out and counted."""
    for start in range(0, len(indices), _BATCH):
        texts = [job.store.get(index) for index in indices[start : start + _BATCH]]
        kept = [text for text in texts if text.strip()]
        counts["empty"] += len(texts) - len(kept)
        counts["documents"] += len(kept)
        if job.tokenizer is None:
            yield from ({"text": text} for text in kept)
            continue
        dtype = job.columns["tokens"].partition(":")[2]
        for tokens in job.tokenizer.encode_documents(kept):
            counts["tokens"] += len(tokens)
            yield {"tokens": tokens.astype(dtype)}


def _finish(job: Job) -> None:
    """The index over all parts, in their order. (streaming's merge_index knows neither rename nor fsync.)"""
    shards, totals = [], {"documents": 0, "empty": 0, "tokens": 0}
    for number in range(job.parts):
        folder = job.part(number)
        index = json.loads((folder / INDEX).read_text())
        for shard in index["shards"]:
            for key in ("raw_data", "zip_data"):
                if shard[key]:
                    shard[key]["basename"] = f"{folder.name}/{shard[key]['basename']}"
            shards.append(shard)
        for key in totals:
            totals[key] += index[EXTRA][key]
    if not totals["documents"]:
        raise DataError("all documents are empty")
    extra = totals | {"tokenizer": job.plan()["tokenizer"]}
    _write_whole(job.out / INDEX, json.dumps({"version": 2, "shards": shards, EXTRA: extra}, sort_keys=True))
    size = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
    tokens = f", {totals['tokens']:,} tokens" if job.tokenizer is not None else ""
    empty = f" ({totals['empty']:,} empty ones left out)" if totals["empty"] else ""
    _say(f"{totals['documents']:,} documents{empty}{tokens}, {len(shards)} shards, {size:,} bytes in {job.out}")


def _write_whole(file: Path, text: str) -> None:
    staging = file.with_name(f".{file.name}.new")
    staging.write_text(text)
    _flush(staging)
    os.rename(staging, file)
    _flush(file.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tokenizer(name: str | None, cache: Path) -> TextTokenizer | None:
    if name is None:
        return None
    return TextTokenizer.from_folder(
        fetch(name, None, cache, leader=True, timeout=FETCH_WAIT, say=_say, patterns=TOKENIZER_PATTERNS)
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _say(text: str) -> None:
    print(text, flush=True)
