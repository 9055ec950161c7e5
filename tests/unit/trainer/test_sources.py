"""The registry, local texts, made-up tokens, and data sets of the `datasets` library."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from trainer.config import DataConfig
from trainer.data import sources, tokenizer
from trainer.data.sources import hub
from trainer.data.sources.base import Site, Store
from trainer.data.tokenizer import TextTokenizer
from trainer.errors import ConfigError, DataError, DeadlineError

ROWS = [f"row {index} is a text" for index in range(40)]


def open_store(tmp_path: Path, source: str, *, leader: bool = True, **keys: Any) -> Store:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    return sources.open_store(DataConfig(source=source, **values), Site(cache=tmp_path / "cache", leader=leader))


def everything(store: Store) -> list[Any]:
    return [store.get(index) for index in range(len(store))]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    tokenizer.save(tokenizer.train(["some words to learn tokens from"] * 3, 300), folder)
    return TextTokenizer.from_folder(folder)


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fineweb-edu'"):
        open_store(tmp_path, "fineweb_edu")
    with pytest.raises(ConfigError, match="no_such_module"):
        open_store(tmp_path, "no_such_module:f")


@sources.register("ours")
def user_source(data: DataConfig, site: Site) -> Sequence[str]:
    return [f"{data.name} {number}" for number in range(5)]


def test_a_users_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert everything(open_store(tmp_path, "ours", name="n")) == [f"n {number}" for number in range(5)]
    (tmp_path / "my_sources.py").write_text("def load(data, site):\n    return ['one', 'two']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert everything(open_store(tmp_path, "my_sources:load")) == ["one", "two"]
    with pytest.raises(ConfigError, match="nothing"):
        open_store(tmp_path, "my_sources:nothing")


def test_pydoc_topics_is_prose_without_repetition(tmp_path: Path) -> None:
    documents = everything(open_store(tmp_path, "pydoc_topics"))
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n")]
    assert len(documents) > 50 and sum(map(len, documents)) > 200_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(paragraph[-1] in ".:!?" and "  " not in paragraph for paragraph in paragraphs)
    assert any("Assert statements are a convenient way" in paragraph for paragraph in paragraphs)


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, content in {"b/2.txt": "zwei ü", "a.txt": "one", "c.txt": "  \n", "d.md": "no"}.items():
        (tmp_path / name).write_text(content)
    assert everything(open_store(tmp_path, "text_files", path=tmp_path)) == ["one", "zwei ü"]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="decode"):
        open_store(tmp_path, "text_files", path=tmp_path)
    with pytest.raises(ConfigError, match=r"needs data\.path"):
        open_store(tmp_path, "text_files")


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text('{"text": "a\\nb"}\n\n  \n{"text": "é"}')  # no line break at the end
    (tmp_path / "2.jsonl").write_text("")
    (tmp_path / "3.jsonl").write_bytes(b'{"text": "c"}\r\n{"text": 5}\n{"text": \n[1]\n')
    store = open_store(tmp_path, "jsonl", path=tmp_path)
    assert [store.get(index) for index in range(3)] == ["a\nb", "é", "c"] and len(store) == 6
    for index, line, problem in ((3, 2, "'text' is int"), (4, 3, "not JSON"), (5, 4, "not a JSON object")):
        with pytest.raises(DataError, match=rf"3\.jsonl:{line}: {problem}"):
            store.get(index)
    assert store.where(1) == f"{tmp_path / '1.jsonl'}:4"
    before = store.fingerprint
    (tmp_path / "3.jsonl").write_bytes(b'{"text": "d"}\n')
    assert open_store(tmp_path, "jsonl", path=tmp_path).fingerprint != before


def test_jsonl_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.data.sources import text as local

    monkeypatch.setattr(local, "_SCAN", 7)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS))
    assert everything(open_store(tmp_path, "jsonl", path=tmp_path / "x.jsonl")) == ROWS


def test_limit_keeps_the_first_and_permutes_them(tmp_path: Path) -> None:
    store = open_store(tmp_path, "ours", name="x", limit=3)
    assert everything(store) == ["x 0", "x 1", "x 2"]
    assert sorted(store.permutation(1, 0)) == [0, 1, 2]


def test_synthetic_needs_no_tokenizer_and_is_pure(tmp_path: Path) -> None:
    data = DataConfig(source="synthetic", limit=2000, seq_len=100)
    site = Site(cache=tmp_path, seed=3, vocab_size=64000)
    store = sources.open_store(data, site)
    lengths = np.array([len(store.get(index)) for index in range(2000)])
    assert abs(lengths.mean() - 100) < 10 and lengths.std() > 50 and lengths.min() >= 3
    tokens = np.concatenate([store.get(index)[1:-1] for index in range(200)])
    assert tokens.min() >= 3 and 60_000 < tokens.max() < 64_000
    again = sources.open_store(data, site)
    assert np.array_equal(store.get(17), again.get(17)) and store.fingerprint == again.fingerprint
    other = sources.open_store(data, Site(cache=tmp_path, seed=4, vocab_size=64000))
    assert store.get(17).tolist() != other.get(17).tolist() and store.fingerprint != other.fingerprint


def test_documents(tmp_path: Path, words: TextTokenizer) -> None:
    def opened(seed: int, **keys: Any) -> Any:
        data = DataConfig(source="ours", name="some words", **keys)
        return sources.open_documents(data, words, seed=seed, cache=tmp_path)

    documents = opened(1)
    for index in range(5):
        tokens = documents.read(index).tokens
        assert tokens.dtype == np.int32 and tokens[0] == words.bos_id and tokens[-1] == words.eos_id
        assert words.decode(tokens[1:-1]) == f"some words {index}"
    orders = [tuple(documents.order(epoch)) for epoch in range(8)]
    assert all(sorted(order) == list(range(5)) for order in orders) and len(set(orders)) > 4
    assert orders == [tuple(opened(1).order(epoch)) for epoch in range(8)]
    assert orders != [tuple(opened(2).order(epoch)) for epoch in range(8)]
    assert opened(1, shuffle=False).order(3).tolist() == list(range(5))
    assert documents.fingerprint == opened(2).fingerprint != opened(1, limit=4).fingerprint
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        sources.open_documents(DataConfig(source="ours"), None, seed=1, cache=tmp_path)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path, words: TextTokenizer) -> None:
    datasets.Dataset.from_dict({"input_ids": [[0, 5, 1], [0, words.vocab_size, 1]]}).save_to_disk(str(tmp_path / "d"))
    data = DataConfig(source="hub", path=str(tmp_path / "d"))
    documents = sources.open_documents(data, words, seed=0, cache=tmp_path)
    assert documents.read(0).tokens.tolist() == [0, 5, 1]
    with pytest.raises(DataError, match=r"row 1.* token (\d+) does not fit the vocabulary of \1"):
        documents.read(1)


def test_texts_for_a_tokenizer(tmp_path: Path) -> None:
    store = open_store(tmp_path, "ours", name="x")
    assert list(sources.texts(store, [3, 1])) == ["x 3", "x 1"] and len(list(sources.texts(store))) == 5
    with pytest.raises(ConfigError, match="holds tokens"):
        list(sources.texts(open_store(tmp_path, "synthetic", limit=3)))


# data sets of the `datasets` library; the hub itself cannot be reached from here, its file layouts can


def table(rows: Sequence[str] = ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": [str(number) for number in range(len(rows))], "text": list(rows)})


def lay_out(folder: Path, shape: str) -> Path:
    folder.mkdir()
    half = len(ROWS) // 2
    if shape == "save_to_disk":
        table().save_to_disk(str(folder), num_shards=3)
    elif shape == "dataset_dict":
        datasets.DatasetDict({"train": table(), "test": table(["other"])}).save_to_disk(str(folder))
    elif shape == "parquet":
        table(ROWS[:half]).to_parquet(str(folder / "train-00000-of-00002.parquet"))
        table(ROWS[half:]).to_parquet(str(folder / "train-00001-of-00002.parquet"))
    elif shape == "jsonl":
        table().to_json(str(folder / "train.jsonl"))
    elif shape == "arrow":
        table().save_to_disk(str(folder / "saved"), num_shards=2)
        for file in (folder / "saved").glob("*.arrow"):
            file.rename(folder / file.name)  # its dataset_info.json stays beside
    else:  # a folder for each split
        for split, rows in {"train": ROWS, "validation": ["other"]}.items():
            (folder / split).mkdir()
            table(rows).to_parquet(str(folder / split / "0.parquet"))
    return folder


@pytest.mark.parametrize("shape", ["save_to_disk", "dataset_dict", "parquet", "jsonl", "arrow", "split folders"])
def test_local_data_sets(tmp_path: Path, shape: str) -> None:
    folder = lay_out(tmp_path / "data", shape)
    before = sorted(file for file in folder.rglob("*"))
    store = open_store(tmp_path, "hub", path=folder)
    assert store.kind == "text" and everything(store) == ROWS
    assert store.fingerprint == open_store(tmp_path, "hub", path=lay_out(tmp_path / "copy", shape)).fingerprint
    assert sorted(file for file in folder.rglob("*")) == before
    # nothing but Parquet and JSON is copied, and nothing into memory
    copied = (tmp_path / "cache").exists()
    assert copied == (shape in ("parquet", "jsonl", "split folders"))
    assert store._table.data.nbytes and all(file["filename"] for file in store._table.cache_files)


def test_problems_of_data_sets_are_one_line(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "data", "dataset_dict")
    with pytest.raises(ConfigError, match=r"data\.split=validation is not in .*there are: train, test"):
        open_store(tmp_path, "hub", path=folder, split="validation")
    with pytest.raises(DataError, match=r"missing\.parquet does not exist"):
        open_store(tmp_path, "hub", path=tmp_path / "missing.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"cannot open data set .*torn\.parquet: .+"):
        open_store(tmp_path, "hub", path=tmp_path / "torn.parquet")
    datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match=r"which column holds the text: a \(string\), b \(string\)"):
        open_store(tmp_path, "hub", path=tmp_path / "two")
    assert everything(open_store(tmp_path, "hub", path=tmp_path / "two", column="b")) == ["y"]
    with pytest.raises(ConfigError, match=r"data\.column=c"):
        open_store(tmp_path, "hub", path=tmp_path / "two", column="c")
    with pytest.raises(ConfigError, match=r"needs data\.name"):
        open_store(tmp_path, "hub")


@pytest.mark.parametrize("name", ["fineweb-edu", "dolma", "redpajama", "c4", "wikitext"])
def test_presets(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(builder: str, **arguments: Any) -> datasets.Dataset:
        asked.append((builder, arguments))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_store(tmp_path, name, split="validation").get(0).strip().startswith("row 0")
    builder, arguments = asked[0]
    assert "/" in builder and arguments["split"] == "validation"
    open_store(tmp_path, name, name="somebody/copy", subset="small", revision="v1", column="id")
    builder, arguments = asked[1]
    assert (builder, arguments["name"], arguments["revision"]) == ("somebody/copy", "small", "v1")
    assert open_store(tmp_path, name, path=lay_out(tmp_path / "data", "save_to_disk")).get(0).startswith("row 0")
    assert len(asked) == 2


def test_a_script_data_set_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        open_store(tmp_path, "hub", name="a/script")
    assert "refs/convert/parquet" in caught.value.hint


def test_the_others_wait_for_the_nodes_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay_out(tmp_path / "data", "parquet")
    said: list[str] = []
    site = Site(cache=tmp_path / "cache", leader=False, say=said.append)
    data = DataConfig(source="hub", path=str(folder), prepare_timeout=0.1)
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for the node's rank 0 to prepare data set"):
        sources.open_store(data, site)
    assert said and not list((tmp_path / "cache").rglob("*.arrow"))

    loads: list[str] = []
    load = datasets.load_dataset

    def slow(*arguments: Any, **keys: Any) -> datasets.Dataset:
        loads.append(threading.current_thread().name)
        time.sleep(0.1)
        return load(*arguments, **keys)

    monkeypatch.setattr(datasets, "load_dataset", slow)
    leader = threading.Thread(target=open_store, args=(tmp_path, "hub"), kwargs={"path": folder}, name="leader")
    leader.start()
    waited = sources.open_store(DataConfig(source="hub", path=str(folder)), site)
    leader.join()
    assert everything(waited) == ROWS and loads[0] == "leader" and len(loads) == 2


def test_null_rows_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="row 1, column 'text' is empty"):
        open_store(tmp_path, "hub", path=tmp_path / "d").get(1)


def _read_in_child(store: Store) -> None:
    os._exit(0 if everything(store) == ROWS else 1)


def test_data_sets_survive_a_fork(tmp_path: Path) -> None:
    store = open_store(tmp_path, "hub", path=lay_out(tmp_path / "data", "save_to_disk"))
    assert store.get(3) == ROWS[3]
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(store,))
    child.start()
    child.join(20)
    assert child.exitcode == 0


WIKITEXT = """
 = First Article =

 The first = sign is here .
 = Not a heading =
 since no blank lines stand around it .

 = = Section = =

 = = = Deeper = = =

 Text .

 = Second : a Film ( 1999 ) =

 More text .
"""


@pytest.mark.parametrize("ends", ["\n", ""])
def test_wikitext_lines_become_articles(tmp_path: Path, ends: str) -> None:
    """The hub's rows: '' for blank lines, ` = Title = \\n` for headings (trailing blank before the line break)."""
    lines = ["" if not line else f"{line} {ends}" for line in WIKITEXT.split("\n")[:-1]]
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(str(tmp_path / "w"))
    store = open_store(tmp_path, "wikitext", path=tmp_path / "w")
    whole = "".join((line or "") + ("\n" if not line.endswith("\n") else "") for line in lines)
    first, second = everything(store)
    assert first + second == whole
    assert second.startswith(" = Second : a Film ( 1999 ) = ") and " = First Article = " in first
    assert isinstance(store, hub.Articles)
