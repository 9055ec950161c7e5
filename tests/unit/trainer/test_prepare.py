"""`trainer prepare`: whole, resumable, the same for any number of workers, readable by streaming itself."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import DataConfig
from trainer.data import prepare, sources, tokenizer
from trainer.data.sources.base import ListStore
from trainer.data.tokenizer import TextTokenizer
from trainer.errors import ConfigError, DataError

TEXTS = [f"document {index} " + "many words " * (index * 7 % 23) for index in range(300)]
TEXTS[17] = "  \n"
KEPT = [text for text in TEXTS if text.strip()]

fork = multiprocessing.get_context("fork")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    tokenizer.save(tokenizer.train(TEXTS, 400), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCH_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


def command(lines: Path, out: Path, *more: object) -> list[object]:
    return ["--source", "jsonl", "--path", lines, "--out", out, "--part", 40, "--shard", "2kb", *more]


def content(folder: Path) -> dict[str, str]:
    """Relative path → hash of every visible file."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def read(folder: Path) -> list[Any]:
    store = sources.open_store(DataConfig(source="mds", path=str(folder)), sources.Site(cache=folder.parent / "cache"))
    return [store.get(index) for index in range(len(store))]


def test_text(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command(lines, tmp_path / "out", "--workers", 2)) == 0
    assert read(tmp_path / "out") == KEPT
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("299 documents (1 empty ones left out), ") and " shards, " in last


def test_tokens(lines: Path, tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*command(lines, tmp_path / "out", "--tokenizer", words, "--compression", "zstd", "--workers", 2))
    expected = TextTokenizer.from_folder(words).encode_documents(KEPT)
    stored = read(tmp_path / "out")
    assert [tokens.tolist() for tokens in stored] == [tokens.tolist() for tokens in expected]
    assert stored[0].dtype == np.uint16 and list((tmp_path / "out").rglob("*.zstd"))
    assert f", {sum(map(len, expected)):,} tokens, " in capsys.readouterr().out


def test_tokens_of_another_tokenizer_are_refused_when_read(lines: Path, tmp_path: Path, words: Path) -> None:
    run(*command(lines, tmp_path / "out", "--tokenizer", words, "--workers", 1))
    tokenizer.save(tokenizer.train(["other text"], 300), tmp_path / "other")
    data = DataConfig(source="mds", path=str(tmp_path / "out"))
    for folder, fits in ((words, True), (tmp_path / "other", False)):
        try:
            sources.open_documents(data, TextTokenizer.from_folder(folder), seed=0, cache=tmp_path)
            assert fits
        except ConfigError as error:
            assert not fits and "were made with tokenizer" in error.message


def test_the_output_does_not_depend_on_the_number_of_workers(lines: Path, tmp_path: Path, words: Path) -> None:
    for workers in (1, 3):
        run(*command(lines, tmp_path / f"out{workers}", "--tokenizer", words, "--workers", workers))
    assert content(tmp_path / "out1") == content(tmp_path / "out3") and len(content(tmp_path / "out1")) > 16


def test_from_other_sources(tmp_path: Path, lines: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    run("--source", "hub", "--path", tmp_path / "saved", "--out", tmp_path / "a", "--workers", 1)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x.txt").write_text("one file")
    run("--path", tmp_path / "files", "--out", tmp_path / "b", "--workers", 1)
    assert read(tmp_path / "a") == KEPT and read(tmp_path / "b") == ["one file"]
    with pytest.raises(ConfigError, match="only texts can be prepared"):
        run("--source", "synthetic", "--limit", 3, "--out", tmp_path / "c")


class Stuck(ListStore):
    """Delivers `whole` parts of 40, and half of each further one."""

    def __init__(self, whole: int) -> None:
        super().__init__(TEXTS)
        self._whole = whole

    def get(self, index: int) -> str:
        if index // 40 >= self._whole and index % 40 >= 20:
            time.sleep(60)
        return super().get(index)


def _prepare_partly(out: Path, whole: int) -> None:
    sources.register("slow")(lambda *_: Stuck(whole))
    os._exit(run("--source", "slow", "--out", out, "--part", 40, "--shard", "2kb", "--workers", 2))


@pytest.mark.parametrize("whole", [1, 4])
def test_kill_9_and_again(
    tmp_path: Path,
    lines: Path,
    whole: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare, "_BATCH", 5)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    sources.register("slow")(lambda *_: ListStore(TEXTS))
    options = ["--source", "slow", "--part", 40, "--shard", "2kb", "--workers", 2]
    run(*options, "--out", undisturbed)
    killed = fork.Process(target=_prepare_partly, args=(out, whole))
    killed.start()
    deadline = time.monotonic() + 40
    while not (len(list(out.glob("part-*"))) == whole and len(list(out.glob(".part-*/shard*"))) > 1):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)  # the parent only: its workers must notice by themselves
    killed.join()
    kept = {folder: folder.stat().st_ctime_ns for folder in out.glob("part-*")}
    assert len(kept) == whole and not (out / "index.json").exists()
    assert run(*options, "--out", out) == 0
    assert content(out) == content(undisturbed)
    assert not list(out.glob(".part-*")) and "parts are there already" in capsys.readouterr().out
    assert all(folder.stat().st_ctime_ns == before for folder, before in kept.items())


def test_another_preparation_in_the_same_folder_is_refused(lines: Path, tmp_path: Path) -> None:
    run(*command(lines, tmp_path / "out", "--workers", 1))
    with pytest.raises(ConfigError, match="begun with other content"):
        lines.write_text('{"text": "new"}\n' * 300)
        run(*command(lines, tmp_path / "out", "--workers", 1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty and not ours"):
        run(*command(lines, tmp_path / "full"))


def test_a_full_disk_is_one_line_and_continues(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = prepare._flush

    def full(path: Path) -> None:
        if ".part-00003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(prepare, "_flush", full)
    with pytest.raises(DataError, match="the disk is full") as caught:
        run(*command(lines, tmp_path / "out", "--workers", 2))
    assert "continues" in caught.value.hint and not (tmp_path / "out" / "index.json").exists()
    monkeypatch.setattr(prepare, "_flush", flush)
    run(*command(lines, tmp_path / "out", "--workers", 2))
    assert read(tmp_path / "out") == KEPT


def test_a_bad_row_and_a_killed_worker_are_named(lines: Path, tmp_path: Path) -> None:
    with lines.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:301: 'text' is int"):
        run(*command(lines, tmp_path / "out", "--workers", 2))

    class Fatal(ListStore):
        def get(self, index: int) -> str:
            os.kill(os.getpid(), signal.SIGKILL)
            return ""

    sources.register("fatal")(lambda *_: Fatal(TEXTS))
    with pytest.raises(DataError, match="a worker was killed"):
        run("--source", "fatal", "--out", tmp_path / "out2", "--workers", 2)


PLAIN = """
import json, sys, types
for name in ("vision", "text", "multimodal"):  # they want torchvision, or time
    sys.modules["streaming." + name] = types.ModuleType("streaming." + name)
from streaming import StreamingDataset
for folder, column in zip(sys.argv[1::2], sys.argv[2::2]):
    data = StreamingDataset(local=folder, batch_size=1, shuffle=False)
    values = [data[index][column] for index in range(len(data))]
    print(json.dumps([value if isinstance(value, str) else value.tolist() for value in values]))
"""


def test_plain_streaming_reads_it(lines: Path, tmp_path: Path, words: Path) -> None:
    run(*command(lines, tmp_path / "text", "--workers", 1))
    run(*command(lines, tmp_path / "tokens", "--workers", 1, "--tokenizer", words, "--compression", "zstd"))
    arguments = [str(tmp_path / "text"), "text", str(tmp_path / "tokens"), "tokens"]
    process = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    text, tokens = map(json.loads, process.stdout.splitlines())
    assert text == KEPT
    assert tokens == [ids.tolist() for ids in TextTokenizer.from_folder(words).encode_documents(KEPT)]
