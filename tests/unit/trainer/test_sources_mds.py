"""MDS shards written by streaming's own writer, read by the source `mds`."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import DataConfig
from trainer.data import sources
from trainer.data.sources import shard_cache
from trainer.data.sources.base import Site, Store
from trainer.data.sources.mds import MdsStore
from trainer.data.streaming_import import MDSWriter, reader_from_json
from trainer.errors import ConfigError, DataError

TEXTS = [f"document {index} " + "word " * (index * 7 % 23) for index in range(200)]
TOKENS = [np.arange(index, index + 1 + index * 5 % 31, dtype=np.int32) for index in range(200)]

fork = multiprocessing.get_context("fork")


def write(folder: Path, column: str, encoding: str, values: list[Any], compression: str | None = None) -> Path:
    """An MDS folder of about ten shards, as anybody would write it."""
    with MDSWriter(
        out=str(folder),
        columns={column: encoding, "number": "int"},
        compression=compression,
        hashes=["sha1"],
        size_limit=1500,
    ) as writer:
        for number, value in enumerate(values):
            writer.write({column: value, "number": number})
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write(tmp_path / "texts", "text", "str", TEXTS)


def open_mds(tmp_path: Path, said: list[str] | None = None, **keys: Any) -> Store:
    data = DataConfig(source="mds", **{key: str(value) for key, value in keys.items()})
    say = said.append if said is not None else print
    return sources.open_store(data, Site(cache=tmp_path / "cache", say=say))


def everything(store: Store) -> list[Any]:
    return [store.get(index) for index in range(len(store))]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("shard.*.mds"))


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("remote", [False, True])
def test_all_texts(tmp_path: Path, compression: str | None, remote: bool) -> None:
    folder = write(tmp_path / "data", "text", "str", TEXTS, compression)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    store = open_mds(tmp_path, **{"remote" if remote else "path": folder})
    assert store.kind == "text" and everything(store) == TEXTS
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    cached = len(shards(tmp_path / "cache")) if (tmp_path / "cache").exists() else 0
    assert cached == (
        0 if not remote and compression is None else len(json.loads(before[folder / "index.json"])["shards"])
    )


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:int32", "ndarray:uint16"])
def test_all_tokens(tmp_path: Path, encoding: str) -> None:
    dtype = encoding.partition(":")[2] or "int32"
    write(tmp_path / "d" / "train", "tokens", encoding, [tokens.astype(dtype) for tokens in TOKENS])
    data = DataConfig(source="mds", path=str(tmp_path / "d"), shuffle=False)
    documents = sources.open_documents(data, None, seed=1, cache=tmp_path / "cache")
    read = [documents.read(index).tokens for index in documents.order(0)]
    assert all(tokens.dtype == np.int32 for tokens in read)
    assert [tokens.tolist() for tokens in read] == [tokens.tolist() for tokens in TOKENS]


def test_a_split_that_exists_is_read_alone(tmp_path: Path, texts: Path) -> None:
    write(texts / "validation", "text", "str", ["held out"])
    assert everything(open_mds(tmp_path, path=texts, split="validation")) == ["held out"]
    assert len(open_mds(tmp_path, path=texts, split="train")) == len(TEXTS)


def test_only_the_shard_that_is_needed_is_fetched(tmp_path: Path, texts: Path) -> None:
    store = open_mds(tmp_path, remote=texts)
    assert store.get(150) == TEXTS[150]
    assert len(shards(tmp_path / "cache")) == 1
    assert TEXTS[150].encode() in shards(tmp_path / "cache")[0].read_bytes()


def test_expected_shards_come_in_the_background(tmp_path: Path, texts: Path) -> None:
    store = open_mds(tmp_path, remote=texts)
    store.expect([199, 0, 100])
    deadline = time.monotonic() + 5
    while len(shards(tmp_path / "cache")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    contents = b"".join(file.read_bytes() for file in shards(tmp_path / "cache"))
    assert len(shards(tmp_path / "cache")) == 3
    assert all(TEXTS[index].encode() in contents for index in (199, 0, 100))


def test_a_changed_remote_is_fetched_again(tmp_path: Path, texts: Path) -> None:
    first = open_mds(tmp_path, remote=texts)
    everything(first)
    shutil.rmtree(texts)
    others = [text.upper() for text in TEXTS]  # shards of the same names and sizes
    write(texts, "text", "str", others)
    second = open_mds(tmp_path, remote=texts)
    assert everything(second) == others
    assert first.fingerprint != second.fingerprint


def test_a_corrupt_download_is_refused(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "BACKOFF", 0.0)
    file = shards(texts)[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = open_mds(tmp_path, remote=texts)
    with pytest.raises(DataError, match=r"shard.00000.mds: its sha1 .*\(3 attempts\)"):
        store.get(0)
    assert shards(tmp_path / "cache") == [] and store.get(199) == TEXTS[199]


def test_what_a_kill_left_in_the_cache_is_replaced(tmp_path: Path, texts: Path) -> None:
    everything(open_mds(tmp_path, remote=texts))
    torn, gone, *_ = shards(tmp_path / "cache")
    torn.write_bytes(torn.read_bytes()[:100])
    gone.unlink()
    leftover = gone.with_name(f".{gone.name}.part-1-2")
    leftover.write_bytes(b"half")
    assert everything(open_mds(tmp_path, remote=texts)) == TEXTS
    assert not leftover.exists()


def test_a_torn_local_folder_is_named(tmp_path: Path, texts: Path) -> None:
    torn, gone, *_ = shards(texts)
    torn.write_bytes(torn.read_bytes()[:-1])
    gone.unlink()
    store = open_mds(tmp_path, path=texts)
    with pytest.raises(DataError, match=r"shard.00000.mds has \d+ bytes"):
        store.get(0)
    with pytest.raises(DataError, match=r"shard.00001.mds is missing"):
        for index in range(20, 60):
            store.get(index)


def used(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _read_at_random(store: Store, seed: int, count: int) -> None:
    pick = random.Random(seed)
    for _ in range(count):
        index = pick.randrange(len(TEXTS))
        if store.get(index) != TEXTS[index]:
            os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_limit_holds_while_processes_evict_each_others_shards(tmp_path: Path, compression: str | None) -> None:
    folder = write(tmp_path / "data", "text", "str", TEXTS, compression)
    store = open_mds(tmp_path, remote=folder, cache_limit="6kb")
    readers = [fork.Process(target=_read_at_random, args=(store, seed, 150)) for seed in range(3)]
    for reader in readers:
        reader.start()
    peak = 0
    while any(reader.is_alive() for reader in readers):
        peak = max(peak, used(tmp_path / "cache"))
        time.sleep(0.002)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert 3000 < peak <= 6 * 1024
    assert everything(open_mds(tmp_path, path=folder)) == TEXTS  # the only copy is untouched


def test_kill_9_of_readers_never_stops_the_next(tmp_path: Path, texts: Path) -> None:
    store = open_mds(tmp_path, remote=texts, cache_limit="4kb")
    for seed in range(8):
        reader = fork.Process(target=_read_at_random, args=(store, seed, 100_000))
        reader.start()
        time.sleep(0.01 + 0.007 * seed)
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGKILL)
        reader.join()
    began = time.monotonic()
    assert everything(open_mds(tmp_path, remote=texts, cache_limit="4kb")) == TEXTS
    assert time.monotonic() - began < 5
    assert used(tmp_path / "cache") <= 4 * 1024


def test_a_limit_without_a_remote_deletes_nothing(tmp_path: Path, texts: Path) -> None:
    said: list[str] = []
    store = open_mds(tmp_path, said, path=texts, cache_limit="4kb")
    assert everything(store) == TEXTS and len(shards(texts)) > 5
    assert "may be the only copy" in said[0]


def test_a_limit_that_cannot_hold_two_shards_is_refused(tmp_path: Path, texts: Path) -> None:
    with pytest.raises(ConfigError, match="less than two shards") as caught:
        open_mds(tmp_path, remote=texts, cache_limit="1kb")
    fits = caught.value.hint.split()[3]  # "Set data.cache_limit to 3kb or more."
    assert everything(open_mds(tmp_path, remote=texts, cache_limit=fits)) == TEXTS


def test_order_is_a_pure_shard_local_shuffle() -> None:
    infos = [{"samples": 10_000, "basename": f"{number}.mds", "bytes": 1, "hashes": {}} for number in range(100)]
    readers = [
        reader_from_json(
            "nowhere",
            None,
            {
                "version": 2,
                "format": "mds",
                "column_names": ["tokens"],
                "column_encodings": ["ndarray"],
                "column_sizes": [None],
                "compression": None,
                "hashes": [],
                "samples": info["samples"],
                "size_limit": None,
                "raw_data": {key: info[key] for key in ("basename", "bytes", "hashes")},
                "zip_data": None,
            },
        )
        for info in infos
    ]
    store = MdsStore(readers, "tokens", {}, None)
    first, again, second, other = (store.permutation(*key) for key in ((7, 0), (7, 0), (7, 1), (8, 0)))
    assert np.array_equal(np.sort(first), np.arange(1_000_000))
    assert np.array_equal(first, again) and (first != second).mean() > 0.99 and (first != other).mean() > 0.99
    windows = [len(np.unique(first[start : start + 5000] // 10_000)) for start in range(0, 1_000_000, 50_000)]
    assert max(windows) < 50 and min(windows) > 5  # mixed, but a fraction of the shards at a time
    assert len(np.unique(first[:5000] // 10_000)) > 5


def _rank(rank: int, rendezvous: Path, folder: Path, tmp_path: Path, result: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    store = open_mds(tmp_path, remote=folder, cache_limit="6kb")
    loader = torch.utils.data.DataLoader(
        range(rank, len(TEXTS), 2), batch_size=10, num_workers=2, collate_fn=lambda batch: [store.get(i) for i in batch]
    )
    read = [text for batch in loader for text in batch]
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, read)
    result.put((rank, gathered))
    dist.destroy_process_group()


def test_in_ranks_with_loader_workers(tmp_path: Path, texts: Path) -> None:
    result = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(r, tmp_path / "meet", texts, tmp_path, result)) for r in range(2)]
    for process in ranks:
        process.start()
    gathered = [result.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(30)
    for _, (even, odd) in gathered:
        assert even == TEXTS[0::2] and odd == TEXTS[1::2]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves tmp_path as buckets; yields the Authorization headers that it saw."""
    seen: list[str] = []

    class Bucket(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            file = tmp_path / self.path.split("?")[0].lstrip("/")
            body = file.read_bytes() if file.is_file() else b"<Error><Code>NoSuchKey</Code></Error>"
            self.send_response(200 if file.is_file() else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield seen
    server.shutdown()
    server.server_close()


def test_from_s3_with_credentials_of_the_environment(tmp_path: Path, s3: list[str], texts: Path) -> None:
    write(texts / "train", "text", "str", TEXTS[:50], "zstd")
    assert everything(open_mds(tmp_path, remote="s3://texts")) == TEXTS[:50]
    assert everything(open_mds(tmp_path, remote="s3://texts/", split="none")) == TEXTS
    assert all("key-of-the-run" in header for header in s3)
    with pytest.raises(DataError, match=r"s3://missing/train/index\.json"):
        open_mds(tmp_path, remote="s3://missing")
