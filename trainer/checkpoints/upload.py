"""A second home for checkpoints: `checkpoint.remote`, an object store or a mounted path.

Files first, the manifest last: what has a manifest there is whole. Nothing is ever deleted there, except what
would make an older save look like the one that replaces it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any, Protocol

from trainer.checkpoints import manifest
from trainer.checkpoints.group import reason
from trainer.checkpoints.manifest import Found
from trainer.errors import CheckpointError, ConfigError, DeadlineError


class Remote(Protocol):
    """Folders `step_…` of files."""

    url: str

    def names(self) -> list[str]: ...

    def manifests(self, name: str) -> dict[str, str]:
        """The texts of the manifests in folder `name`."""
        ...

    def put(self, source: Path, name: str, file: str) -> None: ...

    def get(self, name: str, file: str, target: Path) -> None: ...

    def delete(self, name: str, file: str) -> None: ...


def open_remote(url: str, run: str) -> Remote:
    """`url`/`run` as a remote; raises ConfigError for a scheme that is not known."""
    if url.startswith("s3://"):
        return S3(f"{url.rstrip('/')}/{run}")
    if "://" in url:
        raise ConfigError(f"checkpoint.remote={url}: unknown scheme", hint="Use s3://BUCKET/PREFIX or a mounted path.")
    return Mounted(Path(url) / run)


class Mounted:
    """A path that is mounted on every node."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._folder = folder

    def names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []

    def manifests(self, name: str) -> dict[str, str]:
        folder = self._folder / name
        files = [path for path in folder.iterdir() if manifest.is_manifest_name(path.name)] if folder.is_dir() else []
        return {path.name: path.read_text(encoding="utf-8") for path in files}

    def put(self, source: Path, name: str, file: str) -> None:
        target = self._folder / name / file
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")  # nodes may put the same file
        with source.open("rb") as read, partial.open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 20)
            write.flush()
            os.fsync(write.fileno())
        os.replace(partial, target)

    def get(self, name: str, file: str, target: Path) -> None:
        shutil.copyfile(self._folder / name / file, target)

    def delete(self, name: str, file: str) -> None:
        (self._folder / name / file).unlink(missing_ok=True)


class S3:
    """An S3 bucket. Credentials and endpoint come from the environment: AWS_…, S3_ENDPOINT_URL (as streaming's)."""

    def __init__(self, url: str) -> None:
        import boto3  # half a second that only users of S3 pay

        self.url = url
        self._bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        self._client: Any = boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))

    def names(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/", Delimiter="/"
        )
        return [entry["Prefix"].split("/")[-2] for page in pages for entry in page.get("CommonPrefixes", [])]

    def manifests(self, name: str) -> dict[str, str]:
        listing = self._client.list_objects_v2(Bucket=self._bucket, Prefix=f"{self._prefix}/{name}/manifest")
        files = [entry["Key"].rpartition("/")[2] for entry in listing.get("Contents", [])]
        return {file: self._text(name, file) for file in files if manifest.is_manifest_name(file)}

    def _text(self, name: str, file: str) -> str:
        response = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}/{file}")
        return str(response["Body"].read().decode())

    def put(self, source: Path, name: str, file: str) -> None:
        self._client.upload_file(str(source), self._bucket, f"{self._prefix}/{name}/{file}")

    def get(self, name: str, file: str, target: Path) -> None:
        self._client.download_file(self._bucket, f"{self._prefix}/{name}/{file}", str(target))

    def delete(self, name: str, file: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}/{file}")


def scan(remote: Remote, only: str = "") -> tuple[list[Found], list[str]]:
    """The checkpoints in `remote`, and why others were passed over; with `only`, just the folder of that name."""
    found, passed_over = [], []
    try:
        for name in remote.names():
            if manifest.is_checkpoint_name(name) and only in ("", name) and (texts := remote.manifests(name)):
                with _noting(passed_over):
                    found.append(Found.of(f"{remote.url}/{name}", manifest.merge(f"{remote.url}/{name}", texts)))
    except Exception as error:  # boto's own tree, and OSError
        passed_over.append(f"{remote.url}: {reason(error)}")
    return found, passed_over


@contextlib.contextmanager
def _noting(reasons: list[str]) -> Any:
    try:
        yield
    except CheckpointError as error:
        reasons.append(error.message)


def fetch(remote: Remote, name: str, root: Path) -> Path:
    """Copies checkpoint `name` to `root`; it gets its name only if all hashes are right. → its path."""
    where = f"{remote.url}/{name}"
    texts = remote.manifests(name)
    head = manifest.merge(where, texts)
    staging = manifest.stage(root, int(head["step"]))
    try:
        for file in head["files"]:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            remote.get(name, file, staging / file)
        for file, entry in manifest.digest(staging, head["files"]).items():
            if entry != head["files"][file]:
                raise CheckpointError(f"{where}: the hash of {file} does not match the manifest")
        return manifest.publish(staging, name, texts)
    except Exception as error:
        manifest.discard_staging(root, int(head["step"]))
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: cannot be fetched: {reason(error)}") from error


def upload(remote: Remote, folder: Path) -> None:
    """Copies a sealed checkpoint, or this disk's part of one, to `remote`."""
    with manifest.hold(folder):
        head = manifest.read(folder)
        for file, text in remote.manifests(folder.name).items():
            if f'"{head["save"]}"' not in text:
                remote.delete(folder.name, file)  # an older save of this step: no longer whole from here on
        for file in head["files"]:
            remote.put(folder / file, folder.name, file)
        for path in folder.iterdir():
            if manifest.is_manifest_name(path.name):
                remote.put(path, folder.name, path.name)


class Uploader:
    """Uploads in a thread of its own, one checkpoint at a time; the newest that waits displaces an older one."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._busy: Path | None = None
        self._notes: list[str] = []
        threading.Thread(target=self._run, name="checkpoint-upload", daemon=True).start()

    def submit(self, folder: Path) -> None:
        with self._changed:
            if self._waiting is not None:
                self._notes.append(f"{self._waiting.name} was not uploaded: the upload before it took too long")
            self._waiting = folder
            self._changed.notify_all()

    def notes(self) -> list[str]:
        """What went wrong since the last call."""
        with self._changed:
            notes, self._notes = self._notes, []
            return notes

    def finish(self, timeout: float) -> None:
        """Waits until all is uploaded; raises DeadlineError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting is None and self._busy is None, timeout):
                raise DeadlineError(f"{self._busy} is still being uploaded to {self._remote.url} after {timeout:.0f} s")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                folder, self._waiting = self._waiting, None
                self._busy = folder
            assert folder is not None
            note = None
            try:
                upload(self._remote, folder)
            except Exception as error:  # boto's own tree, and OSError
                note = f"{folder.name} could not be uploaded to {self._remote.url}: {reason(error)}"
            with self._changed:
                self._notes += [note] if note else []
                self._busy = None
                self._changed.notify_all()
