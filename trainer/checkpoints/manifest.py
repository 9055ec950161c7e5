"""Checkpoints on disk: `step_<8 digits>/` is either whole or not there.

A checkpoint is written into a staging folder; every file is flushed to the disk; `manifest.json`, written
last, holds sizes and SHA-256 of all others; one rename gives the folder its name. A reader trusts a folder
only after its manifest verifies. This module knows files only, not what is in them.

Where ranks write to several disks, each disk's folder is one *part* with a manifest of its own,
`manifest-<part>-of-<parts>.json`. Parts with the same `save` belong together; side by side in one folder, as in
a remote, they are a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"
Manifest = dict[str, Any]
Files = dict[str, dict[str, Any]]
"""Name within the folder → `bytes` and `sha256`."""

_STEP = re.compile(r"^step_(\d{8})$")
_PART = re.compile(r"^manifest-(\d+)-of-(\d+)\.json$")
_STAGING, _TRASH = ".staging-", ".trash-"
_KEYS = ("step", "timeline", "world", "layout", "parallel", "save")
_held: dict[str, int] = {}
_held_lock = threading.Lock()


@dataclass(frozen=True, order=True)
class Found:
    """A checkpoint whose manifest can be read; ordered by age, the newest last."""

    timeline: int
    """Counts how often training in this folder started anew: a new start outranks all older steps."""
    step: int
    path: str
    layout: str
    """`full`, `shard` or `local`."""
    save: str
    """The same for all parts of one save, and for no other."""
    parts: tuple[int, ...] = ()
    """The parts that lie here; empty if it is whole."""

    @classmethod
    def of(cls, path: str, head: Manifest) -> Found:
        parts = tuple(head.get("parts", ()))
        return cls(int(head["timeline"]), int(head["step"]), path, head["layout"], head["save"], parts)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return bool(_STEP.match(name))


def manifest_name(part: int, parts: int) -> str:
    """The manifest of part `part` (from 0) of `parts`."""
    return MANIFEST if parts == 1 else f"manifest-{part + 1}-of-{parts}.json"


def is_manifest_name(name: str) -> bool:
    return name == MANIFEST or bool(_PART.match(name))


def scan(root: Path) -> tuple[list[Found], list[str]]:
    """The checkpoints in `root`, newest first, and why others were passed over. Reads manifests only."""
    found, passed_over = [], []
    for path in sorted(root.glob("step_*")) if root.is_dir() else []:
        if not is_checkpoint_name(path.name) or not path.is_dir():
            continue
        try:
            found.append(Found.of(str(path), read(path)))
        except CheckpointError as error:
            passed_over.append(error.message)
    return sorted(found, reverse=True), passed_over


def read(path: Path) -> Manifest:
    """The manifest, or that of the parts which lie here, with `parts` (from 0) unless these are all.

    Raises CheckpointError if there is none, or one is unreadable, of another schema or of another save.
    """
    try:
        names = sorted(item.name for item in path.iterdir() if is_manifest_name(item.name))
        texts = {name: (path / name).read_text(encoding="utf-8") for name in names}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error})") from None
    return merge(str(path), texts)


def merge(where: str, texts: dict[str, str]) -> Manifest:
    """What `read` gives, from the manifests' texts by file name; `where` is for messages."""
    if not texts:
        raise CheckpointError(f"{where}: no {MANIFEST}")
    heads = {name: _parse(where, name, text) for name, text in texts.items()}
    if MANIFEST in heads:
        return heads[MANIFEST]
    matches = [match for match in map(_PART.match, heads) if match]
    saves = {head["save"] for head in heads.values()}
    totals = {int(match[2]) for match in matches}
    if len(saves) > 1 or len(totals) > 1:
        raise CheckpointError(f"{where}: parts of several saves: {', '.join(heads)}")
    merged: Manifest = dict(next(iter(heads.values())))
    merged["files"] = {name: entry for head in heads.values() for name, entry in head["files"].items()}
    present = sorted(int(match[1]) - 1 for match in matches)
    if len(present) < totals.pop():
        merged["parts"] = present
    return merged


def _parse(where: str, name: str, text: str) -> Manifest:
    try:
        head = json.loads(text)
        schema, files = head["schema"], head["files"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{where}: {name} cannot be read ({type(error).__name__}: {error})") from None
    if schema != SCHEMA:
        raise CheckpointError(f"{where}: schema {schema}, this version reads {SCHEMA}")
    if not isinstance(files, dict) or not all(key in head for key in _KEYS):
        raise CheckpointError(f"{where}: {name} is incomplete")
    return head


def verify(path: Path, *, share: tuple[int, int] = (0, 1)) -> Manifest:
    """The manifest, once sizes and hashes match it; raises CheckpointError naming the first bad file.

    `share` = (i, n): check each n-th file only, from the i-th largest, where n ranks read the same disk.
    """
    head = read(path)
    names = sorted(head["files"], key=lambda name: (-head["files"][name]["bytes"], name))[share[0] :: share[1]]
    for name in names:  # sizes first: they cost nothing
        try:
            size, expected = (path / name).stat().st_size, head["files"][name]["bytes"]
        except OSError as error:
            raise CheckpointError(f"{path}: {name}: {error.strerror or error}") from None
        if size != expected:
            raise CheckpointError(f"{path}: {name} has {size} bytes, the manifest says {expected}")
    for name, entry in _hashes(path, names).items():
        if entry["sha256"] != head["files"][name]["sha256"]:
            raise CheckpointError(f"{path}: the hash of {name} does not match the manifest")
    return head


def stage(root: Path, step: int) -> Path:
    """An empty folder to write checkpoint `step` into; removes what earlier writers left in `root`."""
    return stage_as(root, folder_name(step))


def stage_as(root: Path, name: str) -> Path:
    """The same for a folder of any name, which `publish` gives it."""
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    staging = root / f"{_STAGING}{name}"
    staging.mkdir()
    return staging


def staging_folder(root: Path, step: int) -> Path:
    return root / f"{_STAGING}{folder_name(step)}"


def digest(folder: Path, names: Iterable[str]) -> Files:
    """Flushes these files of `folder` to the disk and hashes them."""
    names = list(names)
    for name in names:
        _fsync(folder / name)
    return _hashes(folder, names)


def seal(staging: Path, head: Manifest, files: Files, *, part: int = 0, parts: int = 1) -> Path:
    """Writes the manifest of `files`, which `digest` has flushed, and gives the folder its name. → its path."""
    return publish(staging, folder_name(head["step"]), {manifest_name(part, parts): text_of(head, files)})


def text_of(head: Manifest, files: Files) -> str:
    """The manifest itself."""
    manifest = {"schema": SCHEMA, **head, "created": round(time.time(), 3), "files": files}
    return json.dumps(manifest, indent=1) + "\n"


def publish(staging: Path, name: str, manifests: dict[str, str]) -> Path:
    """Writes these manifests into `staging`, whose other files are flushed, and renames it to `name`."""
    for file, text in manifests.items():
        (staging / file).write_text(text, encoding="utf-8")
        _fsync(staging / file)
    for folder in (item for item in staging.rglob("*") if item.is_dir()):
        _fsync(folder)
    _fsync(staging)
    final = staging.with_name(name)
    if final.exists():  # of an older timeline, or one that did not verify
        _discard(final)
    os.rename(staging, final)
    _fsync(final.parent)
    sweep(final.parent)
    return final


def retain(root: Path, keep_last: int, keep_every: int = 0) -> None:
    """Deletes all but the newest `keep_last` checkpoints, and those of the newest timeline whose step is a
    multiple of `keep_every`. Folders that cannot be read, and those that someone holds, are left alone."""
    found, _ = scan(root)
    for old in found[keep_last:]:
        milestone = keep_every and old.step % keep_every == 0 and old.timeline == found[0].timeline
        if not milestone and not _is_held(Path(old.path)):
            _discard(Path(old.path))
    sweep(root)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """While open, no retention deletes `path`: neither this process's nor, where the file system knows
    `flock`, that of another."""
    key = str(path.resolve())
    with _held_lock:
        _held[key] = _held.get(key, 0) + 1
    try:
        with contextlib.ExitStack() as stack:
            for name in _manifests(path):
                file = stack.enter_context((path / name).open("rb"))
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield
    finally:
        with _held_lock:
            _held[key] -= 1


def _is_held(path: Path) -> bool:
    with _held_lock:
        if _held.get(str(path.resolve())):
            return True
    for name in _manifests(path):
        try:
            with (path / name).open("r+b") as file:  # NFS wants a writable file for an exclusive lock
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue  # a file system without locks
    return False


def _manifests(path: Path) -> Sequence[str]:
    return [item.name for item in path.iterdir() if is_manifest_name(item.name)]


def discard_staging(root: Path, step: int) -> None:
    shutil.rmtree(staging_folder(root, step), ignore_errors=True)


def _discard(path: Path) -> None:
    """Takes the folder's name away first, so that a half-deleted checkpoint never looks like one."""
    os.rename(path, path.with_name(f"{_TRASH}{path.name}-{time.time_ns()}"))


def sweep(root: Path) -> None:
    """Removes what earlier writers left. Each folder has one writer at a time."""
    for path in root.iterdir():
        if path.name.startswith((_STAGING, _TRASH)):
            shutil.rmtree(path, ignore_errors=True)


def _hashes(folder: Path, names: Sequence[str]) -> Files:
    """Several files at once: hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda name: _hash(folder, name), names)
        return dict(zip(names, results, strict=True))


def _hash(folder: Path, name: str) -> dict[str, Any]:
    try:
        with (folder / name).open("rb") as file:
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise CheckpointError(f"{folder}: {name}: {error.strerror or error}") from error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
