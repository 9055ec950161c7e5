"""Every error that the trainer raises by itself, as one tree.

TrainerError              exit 1  the root; `message` is one line, `hint` says what to do next
├── ConfigError           exit 2  a recipe, an override or a flag cannot be used
├── RankEnvironmentError  exit 2  the rank environment is incomplete or contradicts itself
├── CheckpointError       exit 1  a checkpoint could not be written, or does not verify
├── DataError             exit 1  the data is not what the checkpoint or the recipe says
├── NonFiniteError        exit 1  the loss or the gradients stayed NaN or infinite
└── DeadlineError         exit 1  something did not happen in its time
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75
"""Stopped on request after a checkpoint; the same command resumes (EX_TEMPFAIL)."""


class TrainerError(Exception):
    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(TrainerError):
    exit_code = EXIT_USAGE


class RankEnvironmentError(TrainerError):
    exit_code = EXIT_USAGE


class CheckpointError(TrainerError):
    pass


class DataError(TrainerError):
    pass


class NonFiniteError(TrainerError):
    pass


class DeadlineError(TrainerError):
    pass


def nearest(word: str, valid: Sequence[str]) -> str | None:
    """The entry of `valid` that `word` most resembles, or None.

    Dotted keys are also compared by their last part, so that `train.lr` finds `optim.lr`.
    """
    own = word.rpartition(".")[2]
    for found in difflib.get_close_matches(word, list(valid), n=3, cutoff=0.6):
        # a long common section alone is no resemblance
        if difflib.SequenceMatcher(None, own, found.rpartition(".")[2]).ratio() >= 0.5:
            return found
    last = {key.rpartition(".")[2]: key for key in reversed(list(valid))}
    found = difflib.get_close_matches(word.rpartition(".")[2], list(last), n=1, cutoff=0.6)
    return last[found[0]] if found else None
