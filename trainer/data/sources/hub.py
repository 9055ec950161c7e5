"""Data sets of the Hugging Face `datasets` library: from the hub, from `save_to_disk`, or from files.

Rows are read at random from memory-mapped Arrow files, nothing is copied into memory. What has to be
downloaded or converted first, the node's rank 0 prepares; the others wait for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config import DataConfig
from trainer.data.sources.base import Site, Store, digest
from trainer.data.sources.text import list_files, pick_text_column
from trainer.errors import ConfigError, DataError
from trainer.locks import locked, wait_for

TOKEN_COLUMNS = ("tokens", "input_ids")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
SAMPLED = 256
"""Rows that go into the fingerprint, evenly spaced, beside the number of rows and the column."""
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}


class Column(Store):
    """One column of a `datasets` table: texts, token lists or messages."""

    def __init__(self, table: datasets.Dataset, column: str) -> None:
        if column not in table.column_names:
            raise ConfigError(f"data.column={column} is not in the data set: {', '.join(table.column_names)}")
        self._column = column
        self._table = table.select_columns([column])
        feature = table.features[column]
        inner = getattr(feature, "feature", None)
        if getattr(feature, "dtype", "") in ("string", "large_string"):
            self.kind = "text"
        elif "int" in getattr(inner, "dtype", ""):
            self.kind = "tokens"
            self._table = self._table.with_format("numpy")
        elif isinstance(inner, dict) and {"role", "content"} <= set(inner):
            self.kind = "messages"
        else:
            raise ConfigError(f"data.column={column} is {feature}: neither text, nor tokens, nor messages")
        self.fingerprint = _fingerprint(self._table.with_format(None), column)

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        return f"row {index}, column {self._column!r}"

    def get(self, index: int) -> Any:
        value = self._table[index][self._column]
        if value is None:
            raise DataError(f"{self.where(index)} is empty (null)")
        return value


class Articles(Store):
    """WikiText's rows are lines; this joins them to articles, from one top-level heading to the next.

    A heading is a line ` = Title = ` between blank lines (or the ends): the same pattern also occurs within
    articles. What comes before the first heading belongs to the first article.
    """

    def __init__(self, table: datasets.Dataset, column: str) -> None:
        self._column = column
        self._table = table.select_columns([column]).with_format("arrow")
        lines = self._table[:][column]
        blank = pc.equal(pc.utf8_trim_whitespace(lines), "").to_numpy(zero_copy_only=False)
        heading = pc.match_substring_regex(lines, r"^ = [^=]([^=]|=[^ ])* = ?\n?$").to_numpy(zero_copy_only=False)
        heading &= np.append(True, blank[:-1]) & np.append(blank[1:], True)
        starts = np.flatnonzero(heading)
        starts = np.append(0, starts[1:]) if len(starts) else np.zeros(min(1, len(blank)), np.int64)
        self._bounds = np.append(starts, len(blank))
        self.fingerprint = digest([_fingerprint(table, column).encode(), self._bounds.tobytes()])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def where(self, index: int) -> str:
        return f"rows {self._bounds[index]} to {self._bounds[index + 1] - 1}"

    def get(self, index: int) -> str:
        rows: pa.Table = self._table[int(self._bounds[index]) : int(self._bounds[index + 1])]
        lines = rows[self._column].to_pylist()
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def hub(data: DataConfig, site: Site) -> Store:
    """`data.name` on the hub, or `data.path`: a `save_to_disk` folder, or Parquet, Arrow or JSON-lines files.

    Raises ConfigError, DataError, DeadlineError.
    """
    table = open_table(data, site)
    return Column(table, data.column or _pick_column(table))


def fineweb_edu(data: DataConfig, site: Site) -> Store:
    return hub(_preset(data, "HuggingFaceFW/fineweb-edu", "sample-10BT"), site)


def dolma(data: DataConfig, site: Site) -> Store:
    """A Parquet sample of Dolma v1.7: AllenAI's own repository is a script, which `datasets` no longer runs."""
    return hub(_preset(data, "emozilla/dolma-v1_7-30B"), site)


def redpajama(data: DataConfig, site: Site) -> Store:
    """The hub's own conversion to Parquet, since the repository is a script."""
    return hub(_preset(data, "togethercomputer/RedPajama-Data-1T-Sample", revision="refs/convert/parquet"), site)


def c4(data: DataConfig, site: Site) -> Store:
    return hub(_preset(data, "allenai/c4", "en"), site)


def wikitext(data: DataConfig, site: Site) -> Store:
    """Documents are articles, not lines (see `Articles`)."""
    data = _preset(data, "Salesforce/wikitext", "wikitext-2-raw-v1")
    return Articles(open_table(data, site), str(data.column))


def _preset(data: DataConfig, name: str, subset: str | None = None, revision: str | None = None) -> DataConfig:
    """Defaults for what the recipe leaves open; those of the repository only if it names no other."""
    values: dict[str, Any] = {"column": data.column or "text"}
    if data.name is None and data.path is None:
        values |= {"name": name, "subset": data.subset or subset, "revision": data.revision or revision}
    return data.model_copy(update=values)


def open_table(data: DataConfig, site: Site) -> datasets.Dataset:
    """The split of the data set, memory-mapped."""
    datasets.disable_progress_bars()
    try:
        if data.path is not None:
            return _open_path(data, Path(data.path), site)
        if data.name is None:
            raise ConfigError(f"data.source={data.source} needs data.name (on the hub) or data.path")
        return _prepared(data, site, data.name, name=data.subset, revision=data.revision, split=data.split)
    except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        first = str(error).strip().partition("\n")[0]
        hint = "Check data.name, data.subset, data.split and data.path; private ones need the secret HF_TOKEN."
        if "scripts are no longer supported" in first:
            hint = "Try data.revision=refs/convert/parquet, the hub's own conversion."
        raise DataError(f"cannot open data set {data.path or data.name}: {first}", hint=hint) from error


def _open_path(data: DataConfig, path: Path, site: Site) -> datasets.Dataset:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        found = datasets.load_from_disk(str(path), keep_in_memory=False)
        return _split(found, data.split, path) if isinstance(found, datasets.DatasetDict) else found
    folder = path / data.split if (path / data.split).is_dir() else path
    files = list_files(data.model_copy(update={"path": str(folder)}), tuple(_READERS))
    # *.json beside other files describes them
    files = [file for file in files if file.suffix != ".json"] or files
    kinds = {_READERS.get(file.suffix, file.suffix) for file in files}
    if len(kinds) != 1:
        raise ConfigError(f"data.path={path} mixes files of several kinds: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind == "arrow":  # mapped where they lie; load_dataset would copy them
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    return _prepared(data, site, kind, data_files=[str(file) for file in files], split="train")


def _split(found: datasets.DatasetDict, split: str, path: Path) -> datasets.Dataset:
    if split not in found:
        raise ConfigError(f"data.split={split} is not in {path}; there are: {', '.join(found)}")
    return found[split]


def _prepared(data: DataConfig, site: Site, builder: str, **arguments: Any) -> datasets.Dataset:
    """`load_dataset`, by the node's rank 0 first. The others then find everything in the cache."""
    cache = site.cache / "datasets"
    files = [
        [file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in arguments.get("data_files", ())
    ]
    wanted = json.dumps([builder, arguments, files], sort_keys=True).encode()
    name = data.name or str(data.path)
    done = cache / f".{digest([wanted])}.done"

    def load() -> datasets.Dataset:
        return datasets.load_dataset(builder, cache_dir=str(cache), keep_in_memory=False, **arguments)

    if not site.leader:
        wait_for(done.exists, data.prepare_timeout, site.say, f"the node's rank 0 to prepare data set {name}")
        return load()
    with locked(done.with_suffix(".lock"), data.prepare_timeout, site.say, f"another run to prepare {name}"):
        if not done.exists():
            site.say(f"preparing data set {name} in {cache}")
        table = load()
        done.touch()
    return table


def _pick_column(table: datasets.Dataset) -> str:
    for known in (MESSAGE_COLUMNS, TOKEN_COLUMNS):
        for name in known:
            if name in table.column_names and getattr(table.features[name], "feature", None) is not None:
                return name
    return pick_text_column({name: getattr(kind, "dtype", "list") for name, kind in table.features.items()})


def _fingerprint(table: datasets.Dataset, column: str) -> str:
    """Of content, not of paths and times, so that copies on the disks of several nodes agree."""
    indices = np.unique(np.linspace(0, max(len(table) - 1, 0), min(SAMPLED, len(table))).astype(np.int64))
    rows = table.with_format(None)[indices.tolist()][column] if len(indices) else []
    return digest([column.encode(), str(len(table)).encode(), *(repr(row).encode() for row in rows)])
