"""Checkpoints on disk: `step_<8 digits>/` is either whole or not there.

A checkpoint is written into a staging folder; every file is flushed to the disk; `manifest.json`, written
last, holds sizes and SHA-256 of all others; one rename gives the folder its name. A reader trusts a folder
only after its manifest verifies. This module knows files only, not what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"^step_(\d{8})$")
_STAGING, _TRASH = ".staging-", ".trash-"


@dataclass(frozen=True, order=True)
class Found:
    """A checkpoint whose manifest can be read; ordered by age, the newest last."""

    timeline: int
    """Counts how often training in this folder started anew: a new start outranks all older steps."""
    step: int
    path: str


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def scan(root: Path) -> tuple[list[Found], list[str]]:
    """The checkpoints in `root`, newest first, and why others were passed over. Reads manifests only."""
    found, passed_over = [], []
    for path in sorted(root.glob("step_*")) if root.is_dir() else []:
        if not _STEP.match(path.name) or not path.is_dir():
            continue
        try:
            manifest = read(path)
            found.append(Found(int(manifest["timeline"]), int(manifest["step"]), str(path)))
        except CheckpointError as error:
            passed_over.append(error.message)
    return sorted(found, reverse=True), passed_over


def read(path: Path) -> dict[str, Any]:
    """The manifest; raises CheckpointError if it is missing, unreadable or of another schema."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        schema, files = manifest["schema"], manifest["files"]
        complete = all(key in manifest for key in ("step", "timeline", "world", "layout"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {MANIFEST} cannot be read ({type(error).__name__}: {error})"
        ) from None
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: schema {schema}, this version reads {SCHEMA}")
    if not complete or not isinstance(files, dict):
        raise CheckpointError(f"{path}: {MANIFEST} is incomplete")
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once all sizes and hashes match it; raises CheckpointError naming the first bad file."""
    manifest = read(path)
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"{path}: {name} has {size} bytes, the manifest says {expected['bytes']}"
                )
            if _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{path}: the hash of {name} does not match the manifest")
        except OSError as error:
            raise CheckpointError(f"{path}: {name}: {error.strerror or error}") from None
    return manifest


def write(
    root: Path, step: int, fill: Callable[[Path], None], *, timeline: int, world: int, layout: str
) -> tuple[Path, int]:
    """Writes checkpoint `step`: `fill` puts the files into the folder it is given. → (path, bytes).

    On any error nothing but a staging folder was touched, and that is removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    staging = root / f"{_STAGING}{folder_name(step)}"
    staging.mkdir()
    try:
        fill(staging)
        files = {}
        for path in sorted(item for item in staging.rglob("*") if item.is_file()):
            _fsync(path)
            name = path.relative_to(staging).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "timeline": timeline,
            "world": world,
            "layout": layout,
            "created": round(time.time(), 3),
            "files": files,
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _fsync(staging / MANIFEST)
        for folder in (item for item in staging.rglob("*") if item.is_dir()):
            _fsync(folder)
        _fsync(staging)
        final = root / folder_name(step)
        if final.exists():  # of an older timeline, or one that did not verify
            _discard(final)
        os.rename(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _fsync(root)
    _sweep(root)
    return final, sum(entry["bytes"] for entry in files.values())


def retain(root: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` checkpoints; folders it cannot read are left alone."""
    found, _ = scan(root)
    for old in found[keep_last:]:
        _discard(Path(old.path))
    _sweep(root)


def _discard(path: Path) -> None:
    """Takes the folder's name away first, so that a half-deleted checkpoint never looks like one."""
    os.rename(path, path.with_name(f"{_TRASH}{path.name}-{time.time_ns()}"))


def _sweep(root: Path) -> None:
    """Removes what earlier writers left. There is one writer: global rank 0."""
    for path in root.iterdir():
        if path.name.startswith((_STAGING, _TRASH)):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
