"""Sources of documents, by name.

A source is a function `(data: DataConfig, site: Site) -> Store | list[str]`: records with random access, which
are texts, tokens or chats. A recipe names a registered one, or anybody's as `module:function`:

    @register("my-corpus")
    def my_corpus(data, site):
        return [text for text in …]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import DataConfig
from trainer.data.documents import Document, Documents
from trainer.data.sources.base import First, ListStore, Site, Store, StoreDocuments, digest
from trainer.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from trainer.data.tokenizer import TextTokenizer

__all__ = ["Site", "Store", "documents", "names", "open_documents", "open_store", "register", "texts"]

Source = Callable[[DataConfig, Site], Store | Sequence[str]]

_PACKAGE = "trainer.data.sources"
_SOURCES: dict[str, Source | str] = {
    "pydoc_topics": f"{_PACKAGE}.text:pydoc_topics",
    "text_files": f"{_PACKAGE}.text:text_files",
    "jsonl": f"{_PACKAGE}.text:jsonl",
    "synthetic": f"{_PACKAGE}.synthetic:synthetic",
    "mds": f"{_PACKAGE}.mds:mds",
    "chat": f"{_PACKAGE}.chat:chat",
    "hub": f"{_PACKAGE}.hub:hub",
    "fineweb-edu": f"{_PACKAGE}.hub:fineweb_edu",
    "dolma": f"{_PACKAGE}.hub:dolma",
    "redpajama": f"{_PACKAGE}.hub:redpajama",
    "c4": f"{_PACKAGE}.hub:c4",
    "wikitext": f"{_PACKAGE}.hub:wikitext",
}
"""Ours are imported when used: some need seconds."""


def register(name: str) -> Callable[[Source], Source]:
    """Decorator: makes a source known as `data.source=name`."""

    def add(source: Source) -> Source:
        _SOURCES[name] = source
        return source

    return add


def names() -> list[str]:
    return sorted(_SOURCES)


def open_store(data: DataConfig, site: Site) -> Store:
    """The records of `data.source`, at most data.limit of them.

    Raises ConfigError for a source that does not exist or lacks a key, DataError where there are no records.
    """
    found = _find(data.source)(data, site)
    store = found if isinstance(found, Store) else ListStore(found)
    if data.limit is not None and data.limit < len(store):
        store = First(store, data.limit)
    if not len(store):
        raise DataError(f"data.source={data.source} has no documents")
    return store


def documents(store: Store, data: DataConfig, tokenizer: TextTokenizer | None, seed: int) -> Documents:
    """The documents of a store. Only made-up tokens can do without a tokenizer.

    Raises ConfigError where tokens were made with another tokenizer.
    """
    if store.kind != "tokens" and tokenizer is None:
        raise ConfigError(f"data.source={data.source} holds {store.kind} and needs a tokenizer")
    if store.kind == "messages":
        from trainer.data.sources.chat import ChatEncoder

        assert tokenizer is not None
        encode = ChatEncoder.of_folder(tokenizer.folder).encode
    elif store.kind == "text":
        assert tokenizer is not None
        encode = _Texts(tokenizer).encode
    else:
        known = None if tokenizer is None else tokenizer.fingerprint
        if known is not None and store.tokenizer is not None and known != store.tokenizer:
            raise ConfigError(
                f"the tokens of {data.path or data.remote or data.source} were made with tokenizer"
                f" {store.tokenizer}, this run's is {known}",
                hint="Set tokenizer.path to the one they were prepared with, or prepare them again.",
            )
        encode = _Tokens(None if tokenizer is None else tokenizer.vocab_size).encode
    fingerprint = digest([store.fingerprint.encode(), (tokenizer.fingerprint if tokenizer else "").encode()])
    return StoreDocuments(store, encode, seed=seed, shuffle=data.shuffle, fingerprint=fingerprint)


def open_documents(
    data: DataConfig,
    tokenizer: TextTokenizer | None,
    *,
    seed: int,
    cache: Path,
    leader: bool = True,
    say: Callable[[str], None] = print,
) -> Documents:
    """`open_store` and `documents` in one."""
    vocab_size = tokenizer.vocab_size if tokenizer else Site.vocab_size
    site = Site(cache=cache, leader=leader, say=say, seed=seed, vocab_size=vocab_size)
    return documents(open_store(data, site), data, tokenizer, seed)


def texts(store: Store, indices: Iterable[int] | None = None) -> Iterator[str]:
    """The texts of a store (all without `indices`), for example to train a tokenizer on; of a chat, what was said.

    Raises ConfigError where it holds tokens.
    """
    if store.kind == "tokens":
        raise ConfigError(
            "data.source holds tokens, no text that a tokenizer could be trained on", hint="Set tokenizer.path."
        )
    for index in range(len(store)) if indices is None else indices:
        record = store.get(index)
        yield record if store.kind == "text" else "\n".join(str(message["content"]) for message in record)


def _find(name: str) -> Source:
    source = _SOURCES.get(name, name)
    if not isinstance(source, str):
        return source
    module, _, function = source.partition(":")
    if not function:
        guess = nearest(name, names())
        raise ConfigError(
            f"unknown data.source={name!r}" + (f"; did you mean {guess!r}?" if guess else ""),
            hint=f"Registered: {', '.join(names())}; or module:function.",
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.source={name}: {error}") from None


class _Texts:
    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, store: Store, index: int) -> Document:
        (tokens,) = self._tokenizer.encode_documents([store.get(index)])
        return Document(tokens)


class _Tokens:
    """Tokens are taken as they are, BOS and EOS as whoever made them put them."""

    def __init__(self, vocab_size: int | None) -> None:
        self._vocab_size = vocab_size

    def encode(self, store: Store, index: int) -> Document:
        tokens = np.asarray(store.get(index)).astype(np.int32)  # a copy: streaming's arrays are read-only
        if tokens.ndim != 1:
            raise DataError(f"{store.where(index)}: tokens of shape {tokens.shape}, not a list")
        if self._vocab_size is not None and len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise DataError(
                f"{store.where(index)}: token {tokens.max()} does not fit the vocabulary of {self._vocab_size}",
                hint="Set tokenizer.path to the tokenizer that made these tokens.",
            )
        return Document(tokens)
