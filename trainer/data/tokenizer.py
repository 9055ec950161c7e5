"""Tokenizers: any of transformers' folders, or a byte-level BPE trained once per node and shared through the cache.

A trained one's folder holds what `AutoTokenizer.from_pretrained` reads, so a checkpoint takes it as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.errors import ConfigError
from trainer.locks import locked, wait_for

FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*",
)  # fmt: skip
"""Names of a tokenizer's files, of whatever kind: there may be a model's weights beside them."""

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2


@dataclass(frozen=True)
class TextTokenizer:
    """Text ↔ token ids."""

    folder: Path
    bos_id: int | None
    """Put before each document; None where there is none, or it is the EOS (GPT-2)."""
    eos_id: int
    """Put after each document."""
    pad_id: int
    """The EOS where there is none."""
    vocab_size: int
    """One more than the largest id."""
    fingerprint: str
    """16 hex digits that change with the vocabulary, the rules and the special tokens."""
    _encode: Callable[[list[str]], list[list[int]]]
    _decode: Callable[[list[int]], str]

    @classmethod
    def from_folder(cls, path: str | Path) -> TextTokenizer:
        """Reads `tokenizer.json` with the tokenizers package alone; other kinds through `AutoTokenizer`.

        Raises ConfigError where neither can read it, or there is no end-of-sequence token.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises nothing more precise
                raise _unreadable(folder, error) from None
            special = {kind: backend.token_to_id(name) for kind, name in _special_tokens(folder).items()}
            if None not in special.values():
                return cls._of_backend(folder, backend, special, file.read_bytes())
        return cls._of_transformers(folder)

    @classmethod
    def _of_transformers(cls, folder: Path) -> TextTokenizer:
        from transformers import AutoTokenizer

        try:
            slow: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # a missing package, file or class: many types
            raise _unreadable(folder, error) from None
        special = {kind: getattr(slow, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        if slow.is_fast:
            backend = slow.backend_tokenizer
            return cls._of_backend(folder, backend, special, backend.to_str().encode())

        def encode(texts: list[str]) -> list[list[int]]:
            return [slow.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]

        vocabulary = slow.get_vocab()
        return cls(
            **_ids(folder, special),
            folder=folder,
            vocab_size=max(vocabulary.values()) + 1,
            fingerprint=_digest(json.dumps([type(slow).__name__, vocabulary], sort_keys=True).encode(), special),
            _encode=encode,
            _decode=lambda ids: slow.decode(ids, skip_special_tokens=True),
        )

    @classmethod
    def _of_backend(
        cls, folder: Path, backend: Tokenizer, special: dict[str, int | None], content: bytes
    ) -> TextTokenizer:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a literal "<s>" in the text is text

        def encode(texts: list[str]) -> list[list[int]]:
            return [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]

        return cls(
            **_ids(folder, special),
            folder=folder,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            fingerprint=_digest(content, special),
            _encode=encode,
            _decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
        )

    def encode(self, text: str) -> list[int]:
        """Without BOS and EOS."""
        return self._encode([_clean(text)])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each document, int32, with BOS before and EOS after; special tokens in the text are text."""
        begin = [] if self.bos_id is None else [self.bos_id]
        encoded = self._encode([_clean(text) for text in texts])
        return [np.array([*begin, *ids, self.eos_id], np.int32) for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text, without special tokens."""
        return self._decode([int(token) for token in ids])


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos`, `eos`, `pad` → token, as far as the folder names them."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _unreadable(folder, error) from None
        for kind in ("bos", "eos", "pad"):
            token = settings.get(f"{kind}_token")
            if token is not None:
                named[kind] = token["content"] if isinstance(token, dict) else token
    return named


def _ids(folder: Path, special: dict[str, int | None]) -> dict[str, Any]:
    bos, eos, pad = (special.get(kind) for kind in ("bos", "eos", "pad"))
    if eos is None:
        raise ConfigError(
            f"the tokenizer in {folder} has no end-of-sequence token, which separates documents",
            hint="Add eos_token to its tokenizer_config.json, or set tokenizer.path to another one.",
        )
    return {"bos_id": None if bos == eos else bos, "eos_id": eos, "pad_id": eos if pad is None else pad}


def _digest(content: bytes, special: dict[str, int | None]) -> str:
    state = hashlib.sha256(content)
    state.update(json.dumps([special.get(kind) for kind in ("bos", "eos", "pad")]).encode())
    return state.hexdigest()[:16]


def _clean(text: str) -> str:
    """Half surrogate pairs, which JSON can hold and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _unreadable(folder: Path, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(f"cannot read a tokenizer in {folder}: {reason}", hint="Look at tokenizer.path.")


def train(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's) of at most `vocab_size` tokens; ids 0, 1, 2 are BOS, EOS, PAD."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_clean, documents), trainer)
    return tokenizer


def fingerprint(documents: Sequence[str], vocab_size: int) -> str:
    """Names a trained tokenizer by all that it depends on."""
    digest = hashlib.sha256(f"{tokenizers.__version__}\0{vocab_size}\0{BOS}{EOS}{PAD}".encode())
    for text in documents:
        digest.update(f"\0{len(text)}\0".encode() + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder through a staging folder and a rename: it is there as a whole or not at all."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tokenizer.save(str(staging / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (staging / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    try:
        os.rename(staging, folder)
    except OSError:  # another run was first; its folder has the same content
        shutil.rmtree(staging, ignore_errors=True)
        if not folder.is_dir():
            raise


def copy_files(source: Path, folder: Path) -> None:
    """Brings the tokenizer in `source` to `folder`."""
    for file in {file for pattern in FILES for file in source.glob(pattern) if file.is_file()}:
        shutil.copy(file, folder / file.name)


def prepare(
    documents: Sequence[str],
    vocab_size: int,
    cache: Path,
    *,
    leader: bool,
    timeout: float,
    say: Callable[[str], None],
) -> Path:
    """The tokenizer's folder in `cache`, trained by the node's leader if it is not there yet.

    The other ranks of the node wait for it. Raises DeadlineError after `timeout` seconds.
    """
    folder = cache / f"tokenizer-{fingerprint(documents, vocab_size)}"
    if not leader:
        wait_for(folder.is_dir, timeout, say, f"the node's rank 0 to train the tokenizer ({folder})")
    elif not folder.is_dir():
        with locked(folder.with_suffix(".lock"), timeout, say, "another run's tokenizer lock"):
            if not folder.is_dir():
                say(f"training a tokenizer of {vocab_size} tokens on {sum(map(len, documents)):,} characters")
                save(train(documents, vocab_size), folder)
    return folder
