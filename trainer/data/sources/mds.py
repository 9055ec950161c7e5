"""MDS, the shard format of mosaicml-streaming, as a store with random access: texts or tokens.

Reads with streaming's own index and shard readers, downloaders and shuffle, without `StreamingDataset`: its
shared memory, file locks and barriers can hang or refuse the run after a kill (`streaming_import.py`), it hands
out samples to ranks by itself, and nothing of that is needed where packing assigns documents to lanes. So this
works alike in one process, in ranks with or without torch.distributed, and in forked loader processes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data.sources.base import Site, Store, digest
from trainer.data.sources.shard_cache import ShardCache, download
from trainer.data.sources.text import pick_text_column
from trainer.data.streaming_import import MDSReader, get_shuffle, reader_from_json
from trainer.errors import ConfigError, DataError

TOKEN_COLUMNS = ("tokens", "input_ids")
INDEX = "index.json"
EXTRA = "trainer"
"""Our key in index.json, which streaming ignores: what `prepare` knows about the tokens."""
BLOCK = 1 << 18
"""Documents over which py1e spreads a shard's, at least."""
_REGION = 1 << 17
_REGIONS = 64
_TRIES = 10


class MdsStore(Store):
    """Shards in `folder`, brought there by `cache` where there is one."""

    def __init__(
        self, shards: Sequence[MDSReader], column: str, extra: dict[str, Any], cache: ShardCache | None
    ) -> None:
        self._shards, self._column, self._cache = shards, column, cache
        encoding = shards[0].column_encodings[shards[0].column_names.index(column)]
        self.kind = "tokens" if encoding.startswith("ndarray") else "text"
        self.tokenizer = extra.get("tokenizer")
        self._sizes = np.array([shard.samples for shard in shards], np.int64)
        self._ends = self._sizes.cumsum()
        self._whole: set[int] = set()
        self.fingerprint = digest(
            json.dumps([shard.raw_data.basename, shard.samples, shard.raw_data.bytes, shard.raw_data.hashes]).encode()
            for shard in shards
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: int) -> Any:
        """Found by bisection in the index; nothing is iterated over. Raises DataError."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        reader = self._shards[shard]
        offset = int(index - (self._ends[shard] - self._sizes[shard]))
        for _ in range(_TRIES):
            try:
                self._check(shard)
                value = reader.get_item(offset)[self._column]
                break
            except FileNotFoundError:
                self._whole.discard(shard)
                if self._cache is None:
                    raise DataError(f"{self._file(shard)} is missing, though {INDEX} names it") from None
                self._cache.fetch(shard)  # not there yet, or evicted by another process
            except (IndexError, ValueError, KeyError) as error:
                raise DataError(f"{self._file(shard)}: sample {offset} cannot be read: {error}") from None
        else:
            raise DataError(
                f"{self._file(shard)} was evicted {_TRIES} times before it could be read",
                hint="Raise data.cache_limit.",
            )
        if self._cache is not None:
            self._cache.note_use(shard)
        return value

    def where(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._file(shard)}, sample {index - (self._ends[shard] - self._sizes[shard])}"

    def permutation(self, seed: int, epoch: int) -> np.ndarray:
        """streaming's py1e: shards in a new order, each document moved by at most some shards.

        So an epoch goes through the shards region by region and few are needed at a time. The regions
        (streaming's canonical nodes) depend on the number of documents only, never on the world size.
        """
        count = len(self)
        mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        regions = max(1, min(_REGIONS, count // _REGION))
        block = max(BLOCK, 2 * int(self._sizes.max()))
        return get_shuffle("py1e", self._sizes, regions, mixed, 0, block)

    def expect(self, indices: Sequence[int]) -> None:
        if self._cache is not None and len(indices):
            shards = np.searchsorted(self._ends, np.asarray(indices), side="right")
            self._cache.expect(list(dict.fromkeys(shards.tolist())))

    def _check(self, shard: int) -> None:
        """Once per process and shard: a torn file is found before it is read."""
        if shard in self._whole:
            return
        file, expected = self._file(shard), self._shards[shard].raw_data.bytes
        size = file.stat().st_size
        if size != expected:
            if self._cache is not None:
                raise FileNotFoundError(file)
            raise DataError(f"{file} has {size} bytes, {INDEX} says {expected}: it was not copied whole")
        self._whole.add(shard)

    def _file(self, shard: int) -> Path:
        return Path(self._shards[shard].dirname, self._shards[shard].raw_data.basename)


def mds(data: DataConfig, site: Site) -> Store:
    """`data.path`: a local MDS folder, read where it lies; or `data.remote`, cached in `data.path` or the node's cache.

    Where there is a subfolder named like data.split, that is read, else the folder itself. A local folder
    of compressed shards is treated as a remote one: they are decompressed into the cache, never beside
    the only copy. Raises ConfigError, DataError.
    """
    if data.path is None and data.remote is None:
        raise ConfigError("data.source=mds needs data.path (a folder) or data.remote (s3://… or a path)")
    root, raw = _read_index(data.remote or str(data.path), data.split, site)
    try:
        index = json.loads(raw)
        infos = [info for info in index["shards"] if info["samples"]]
        if index["version"] != 2 or any(info["format"] != "mds" for info in infos):
            raise DataError(f"{root}/{INDEX} is not MDS version 2")
        if not infos:
            raise DataError(f"{root} has no documents")
        compressed = any(info["compression"] for info in infos)
        cached = data.remote is not None or compressed
        folder = Path(root)
        if cached:
            base = Path(data.path) if data.remote and data.path else site.cache / "mds"
            folder = base / digest([root.encode(), raw])
        readers = [reader_from_json(str(folder), None, info) for info in infos]
        for reader in readers:
            reader.validate(allow_unsafe_types=False)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{root}/{INDEX} is not an index of MDS: {error}") from None
    cache = None
    if cached:
        cache = ShardCache(root, folder, readers, limit=data.cache_limit, timeout=data.prepare_timeout, say=site.say)
    elif data.cache_limit is not None and site.leader:
        site.say(f"data.cache_limit is ignored: {root} is read where it lies and may be the only copy")
    extra = index.get(EXTRA) or {}
    return MdsStore(readers, _column(readers[0], data.column), extra, cache)


def _column(reader: MDSReader, wanted: str | None) -> str:
    columns = dict(zip(reader.column_names, reader.column_encodings, strict=True))
    if wanted is None:
        for name in TOKEN_COLUMNS:
            if columns.get(name, "").startswith("ndarray"):
                return name
        return pick_text_column({name: "string" if kind == "str" else kind for name, kind in columns.items()})
    if columns.get(wanted) != "str" and not columns.get(wanted, "").startswith("ndarray"):
        found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise ConfigError(f"data.column={wanted} is no column of type str or ndarray; there are: {found}")
    return wanted


def _read_index(root: str, split: str, site: Site) -> tuple[str, bytes]:
    """(the folder with the shards, its index.json). Every process reads it itself: it is small, so none waits."""
    candidates = [f"{root.rstrip('/')}/{split}", root.rstrip("/")]
    failures = []
    for candidate in candidates:
        try:
            if "://" not in candidate:
                return candidate, Path(candidate, INDEX).read_bytes()
            with tempfile.TemporaryDirectory() as folder:
                download(f"{candidate}/{INDEX}", Path(folder, INDEX))
                return candidate, Path(folder, INDEX).read_bytes()
        except Exception as error:  # each cloud library has its own
            failures.append(f"{candidate}/{INDEX}: {error}")
            if not isinstance(error, FileNotFoundError) and "not found" not in str(error):
                break  # unreachable is not absent: never read the whole for want of the split
    raise DataError(
        f"no MDS data set there: {'; '.join(failures)}",
        hint="Check data.path, data.remote and data.split, and the credentials among the run's secrets.",
    )
