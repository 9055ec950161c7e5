"""A byte-level BPE tokenizer, trained once per node and shared through the cache.

The folder holds what `AutoTokenizer.from_pretrained` reads, so a checkpoint takes it as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.errors import DeadlineError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2


def train(documents: list[str], vocab_size: int) -> Tokenizer:
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
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def fingerprint(documents: list[str], vocab_size: int) -> str:
    """Names the tokenizer by all that it depends on."""
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


def prepare(
    documents: list[str],
    vocab_size: int,
    cache: Path,
    *,
    leader: bool,
    timeout: float,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Path:
    """The tokenizer's folder in `cache`, trained by the node's leader if it is not there yet.

    The other ranks of the node wait for it. Raises DeadlineError after `timeout` seconds.
    """
    folder = cache / f"tokenizer-{fingerprint(documents, vocab_size)}"
    deadline = clock() + timeout

    def wait_until(done: Callable[[], bool], what: str) -> None:
        told = False
        while not done():
            if clock() > deadline:
                raise DeadlineError(f"waited {timeout:g} s for {what}")
            if not told:
                say(f"waiting for {what}")
                told = True
            sleep(0.1)

    if not leader:
        wait_until(folder.is_dir, f"the node's rank 0 to train the tokenizer ({folder})")
    elif not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(
            folder.with_suffix(".lock"), lambda try_: wait_until(try_, "another run's tokenizer lock")
        ):
            if not folder.is_dir():
                say(f"training a tokenizer of {vocab_size} tokens on {sum(map(len, documents)):,} characters")
                save(train(documents, vocab_size), folder)
    return folder


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@contextmanager
def _lock(path: Path, wait_for: Callable[[Callable[[], bool]], None]) -> Iterator[None]:
    """Holds an flock on `path`; the kernel frees it when the holder dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def attempt() -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    try:
        wait_for(attempt)
        yield
    finally:
        os.close(handle)
