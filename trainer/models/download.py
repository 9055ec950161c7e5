"""A model's or tokenizer's folder: a local one as it is, else fetched from the hub once per node."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.errors import ConfigError, DataError
from trainer.locks import locked, wait_for

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Weights as safetensors, configurations, tokenizers; never pickles nor code."""

IGNORED = ["*/*", "consolidated*"]
"""The same weights once more, for other programs."""

TOKENIZER_PATTERNS = tuple(pattern for pattern in PATTERNS if pattern != "*.safetensors")


def fetch(
    name: str,
    revision: str | None,
    cache: Path,
    *,
    leader: bool,
    timeout: float,
    say: Callable[[str], None],
    patterns: Sequence[str] = PATTERNS,
) -> Path:
    """The folder of `name`: a local path, or a repository on the hub at `revision` (branch, tag, commit).

    Only the node's leader downloads, under a lock, into `cache/hub`; the other ranks wait for it. A marker that is
    written last names the folder: a partial download is never taken for a whole one, and is continued. Without
    network a folder that is already there is used. Raises ConfigError or DataError, saying what to do, and
    DeadlineError after `timeout` seconds of waiting.
    """
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"the folder {name} does not exist", hint="Give an existing folder, or a name on the hub.")
    asked = f"{name}\0{revision}\0{sorted(patterns)}"
    # in the folder's name, so that the ranks agree on it without a word
    marker = cache / "hub" / f"{name.replace('/', '--')}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.done"
    if not leader:
        wait_for(lambda: _done(marker) is not None, timeout, say, f"the node's rank 0 to download {name}")
    else:
        with locked(marker.with_suffix(".lock"), timeout, say, f"another run's download of {name}"):
            if _done(marker) is None:
                say(f"downloading {name} to {marker.parent}")
                folder = _download(name, revision, marker.parent, patterns)
                staging = marker.with_suffix(f".{os.getpid()}")
                staging.write_text(folder.relative_to(marker.parent).as_posix())
                os.replace(staging, marker)
    folder = _done(marker)
    assert folder is not None
    return folder


def _done(marker: Path) -> Path | None:
    """The folder that the marker names, if both are there."""
    try:
        folder = marker.parent / marker.read_text()
    except FileNotFoundError:
        return None
    return folder if folder.is_dir() else None


def _download(name: str, revision: str | None, cache: Path, patterns: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import filter_repo_objects

    try:
        # snapshot_download alone would, without network, return a snapshot that was never completed
        info = HfApi().repo_info(name, revision=revision)
        listed = [file.rfilename for file in info.siblings or ()]
        files = list(filter_repo_objects(listed, allow_patterns=list(patterns), ignore_patterns=IGNORED))
        folder = Path(snapshot_download(name, revision=info.sha, cache_dir=cache, allow_patterns=files))
    except GatedRepoError:
        raise ConfigError(
            f"{name} on the hub is gated", hint="Accept its licence there and pass a token: run.secrets: [HF_TOKEN]."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ConfigError(
            f"{name} is neither a local folder nor on the hub",
            hint="Correct the name; for a private repository pass a token: run.secrets: [HF_TOKEN].",
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{name} on the hub has no revision {revision!r}", hint="Correct the revision.") from None
    except OSError as error:  # huggingface_hub's and requests' network errors are OSErrors
        # what it raises itself only says that there is no connection, perhaps
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else cause
        raise DataError(
            f"{name} is not in the cache {cache} and cannot be downloaded: {why}",
            hint="Download it where there is a network (huggingface-cli download) and give that folder instead.",
        ) from None
    if not files:
        raise DataError(f"{name} on the hub has no files of the kinds {', '.join(patterns)}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise DataError(f"the download of {name} is incomplete: {missing[0]} is missing", hint="Start again.")
    return folder
