"""Texts on the local disk: plain files, JSON lines, and Python's own language reference."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data.sources.base import ListStore, Site, Store
from trainer.errors import ConfigError, DataError

TEXT_COLUMNS = ("text", "content", "document", "raw_content", "body")
"""Names that a column of texts usually has, the likeliest first."""
_SCAN = 1 << 24
_BLANK = 8
"""Only lines up to so many bytes are looked at for being blank."""


def pydoc_topics(_: DataConfig, __: Site) -> Store:
    """The chapters of Python's language reference that `help()` shows: real English prose, always there.

    Only prose is kept, one paragraph a line: no tables, grammars and program listings. Chapters repeat
    parts of each other; a paragraph counts only where it comes first, so that the held-out chapters hold
    nothing that was trained on.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        kept = []
        for block in topics[name].split("\n\n"):
            paragraph = " ".join(block.split())
            if _is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        documents.append("\n".join(kept))
    return ListStore([text for text in documents if text.strip()])


def _is_prose(paragraph: str) -> bool:
    """Whether it ends like a sentence and is nearly all letters and spaces."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return paragraph.endswith((".", ":", "!", "?")) and letters >= 0.85 * len(paragraph)


def text_files(data: DataConfig, _: Site) -> Store:
    """One document for each file: `data.path`, or all *.txt below it, sorted by path. Empty files are left out."""
    files = list_files(data, (".txt",))
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.path={data.path}: {error}") from None
    return ListStore([text for text in texts if text.strip()])


def jsonl(data: DataConfig, _: Site) -> Store:
    """One document for each line of `data.path`, or of all *.jsonl below it: an object with a column of text."""
    lines = JsonLines(list_files(data, (".jsonl",)))
    if not len(lines):
        raise DataError(f"data.path={data.path} has no lines")
    column = data.column or pick_text_column(
        {name: "string" if isinstance(value, str) else "other" for name, value in lines.row(0).items()}
    )
    return JsonTexts(lines, column)


class JsonLines:
    """The non-blank lines of files of JSON objects, read at random through the page cache.

    Opening scans the files once (about 1 GB/s), which also gives the fingerprint of their content.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._maps: list[mmap.mmap | None] = []
        state = hashlib.sha256()
        spans, owners, numbers = [], [], []
        for position, file in enumerate(files):
            with file.open("rb") as handle:
                empty = not file.stat().st_size
                self._maps.append(None if empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            mapped = self._maps[-1]
            if mapped is None:
                continue
            begins, ends = _lines(mapped, state)
            spans.append(np.stack([begins, ends], axis=1))
            numbers.append(np.arange(1, len(begins) + 1))
            owners.append(np.full(len(begins), position))
        self._spans = np.concatenate(spans) if spans else np.empty((0, 2), np.int64)
        self._numbers = np.concatenate(numbers) if spans else np.empty(0, np.int64)
        self._owners = np.concatenate(owners) if spans else np.empty(0, np.int64)
        filled = np.ones(len(self._spans), bool)
        for index in np.flatnonzero(self._spans[:, 1] - self._spans[:, 0] <= _BLANK):
            filled[index] = bool(self._raw(index).strip())
        self._spans, self._numbers, self._owners = self._spans[filled], self._numbers[filled], self._owners[filled]
        self.fingerprint = state.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, index: int) -> str:
        """`file:line` of row `index`, lines counted from 1."""
        return f"{self._files[self._owners[index]]}:{self._numbers[index]}"

    def row(self, index: int) -> dict[str, Any]:
        """Raises DataError with file and line where the line is no JSON object."""
        try:
            row = json.loads(self._raw(index))
        except ValueError as error:  # also invalid UTF-8
            raise DataError(f"{self.where(index)}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.where(index)}: not a JSON object but {type(row).__name__}")
        return row

    def _raw(self, index: int) -> bytes:
        begin, end = self._spans[index]
        mapped = self._maps[self._owners[index]]
        assert mapped is not None  # only files with lines own spans
        return mapped[begin:end]


class JsonTexts(Store):
    def __init__(self, lines: JsonLines, column: str) -> None:
        self._lines, self._column = lines, column
        self.fingerprint = lines.fingerprint

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return self._lines.where(index)

    def get(self, index: int) -> str:
        text = self._lines.row(index).get(self._column)
        if not isinstance(text, str):
            raise DataError(
                f"{self.where(index)}: {self._column!r} is {type(text).__name__}, not a text",
                hint="Set data.column to the key that holds the text.",
            )
        return text


def list_files(data: DataConfig, suffixes: tuple[str, ...]) -> list[Path]:
    """`data.path` itself, or the files below it that end so, sorted. Raises ConfigError, DataError."""
    if data.path is None:
        raise ConfigError(f"data.source={data.source} needs data.path: a file or a folder")
    path = Path(data.path)
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes) if path.is_dir() else [path]
    if not path.exists():
        raise DataError(f"data.path={data.path} does not exist")
    if not files:
        raise DataError(f"data.path={data.path}: no {' or '.join('*' + suffix for suffix in suffixes)} there")
    return files


def pick_text_column(columns: dict[str, str]) -> str:
    """The column with the text, of name → type (`string` counts). Raises ConfigError where that is a guess."""
    texts = [name for name, kind in columns.items() if kind in ("string", "large_string", "str")]
    for name in TEXT_COLUMNS:
        if name in texts:
            return name
    if len(texts) == 1:
        return texts[0]
    raise ConfigError(
        f"cannot tell which column holds the text: {', '.join(f'{k} ({v})' for k, v in columns.items())}",
        hint="Set data.column.",
    )


def _lines(mapped: mmap.mmap, state: Any) -> tuple[np.ndarray, np.ndarray]:
    """(begins, ends) of the lines of a file, its bytes added to the hash on the way."""
    found = []
    for start in range(0, len(mapped), _SCAN):
        block = mapped[start : start + _SCAN]
        state.update(block)
        found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10).astype(np.int64) + start)
    ends = np.concatenate(found)
    if not len(ends) or ends[-1] != len(mapped) - 1:
        ends = np.append(ends, len(mapped))
    return np.concatenate([[0], ends[:-1] + 1]), ends
