"""Where documents come from. A source is a function from the configuration to a list of documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.config import DataConfig
from trainer.errors import DataError


def load_documents(config: DataConfig) -> list[str]:
    """All documents of the source, in an order that is the same on every machine.

    Raises DataError where there is no text.
    """
    documents = [text for text in SOURCES[config.source](config) if text.strip()]
    if not documents:
        raise DataError(f"data.source={config.source} has no text")
    return documents


def split(documents: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out): whole documents, at least `share` of the characters held out, never all."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(documents))
    wanted = share * sum(map(len, documents))
    held: set[int] = set()
    for index in order[:-1]:
        if sum(len(documents[i]) for i in held) >= wanted:
            break
        held.add(int(index))
    train = [text for index, text in enumerate(documents) if index not in held]
    return train, [text for index, text in enumerate(documents) if index in held]


def _pydoc_topics(_: DataConfig) -> list[str]:
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
    return documents


def _is_prose(paragraph: str) -> bool:
    """Whether it ends like a sentence and is nearly all letters and spaces."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return paragraph.endswith((".", ":", "!", "?")) and letters >= 0.85 * len(paragraph)


def _text_files(config: DataConfig) -> list[str]:
    path = Path(str(config.path))
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.path={config.path}: {error}") from None


SOURCES: dict[str, Callable[[DataConfig], list[str]]] = {
    "pydoc_topics": _pydoc_topics,
    "text_files": _text_files,
}
