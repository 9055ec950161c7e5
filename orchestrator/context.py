"""What goes into a build: the files of a folder, their hash, and the tar that carries exactly them."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator.commands.dockerignore import compile_ignore
from orchestrator.errors import BuildError

_NEVER = (
    *(".git", ".hg", ".svn", ".orch", ".venv*", "__pycache__", "*.pyc", ".DS_Store", "*.egg-info"),
    *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".tox", ".nox"),
)
"""Names that never belong in an image, in any folder."""

_SECRET = (
    *(".env", ".env.*", "secrets.env", ".netrc", ".pypirc", ".ssh", ".aws", ".docker", ".kube"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.kdbx"),
)
"""Names that hold secrets by convention: kept out even where git tracks them."""

_NOT_SECRET = (".env.example", ".env.sample", ".env.template", ".env.dist")

_BIG = 4 << 20
"""Bytes from which a file's hash is remembered by (size, mtime, inode) between calls."""

_SMALL = 1 << 20
_SNAPSHOT = 128 << 20
"""Files of less than _SMALL bytes are kept in memory, up to this sum: what was hashed is then what is built,
even if you go on editing while the layers below are being built."""


@dataclass(frozen=True)
class Entry:
    """One file, link or folder of the context. Time, owner and umask play no part."""

    path: str
    digest: str = ""
    """SHA-256 of the content; of the target for a link; empty for a folder."""
    executable: bool = False
    source: Path | None = None
    data: bytes | None = None
    link: str = ""

    @classmethod
    def text(cls, path: str, content: str | bytes) -> Entry:
        data = content.encode() if isinstance(content, str) else content
        return cls(path, hashlib.sha256(data).hexdigest(), data=data)

    @property
    def is_dir(self) -> bool:
        return self.source is None and self.data is None and not self.link

    @property
    def size(self) -> int:
        return len(self.data) if self.data is not None else self.source.stat().st_size if self.source else 0


def list_files(root: Path, *, exclude: Iterable[Path] = ()) -> list[str]:
    """The files of `root` that belong in an image, as sorted posix paths.

    In a git work tree what git tracks or would add; elsewhere everything. A .dockerignore holds in both.
    Never: version control, environments, caches, files that hold secrets by their name, and `exclude`.
    Raises BuildError when `root` cannot be read.
    """
    if not root.is_dir():
        raise BuildError(f"the build context {root} is not a folder", hint="check image.context in orch.yaml")
    ignored = compile_ignore(_read(root / ".dockerignore"))
    left_out = {os.path.abspath(path) for path in exclude}
    base = os.path.abspath(root)
    listed = _git_files(root)
    found = _walk(root, "") if listed is None else _expand(root, listed)
    return sorted(
        path for path in found if not is_private(path) and not ignored(path) and f"{base}/{path}" not in left_out
    )


def is_private(path: str) -> bool:
    """Whether a part of `path` is a name that never goes into an image."""
    return any(_matches(part) for part in path.split("/"))


def _matches(name: str) -> bool:
    if name in _NOT_SECRET:
        return False
    if name[:1] != "." and name[:2] != "__" and "." not in name and name[:3] != "id_":
        return False  # nearly every name: spares a score of patterns
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_NEVER, *_SECRET))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _git_files(root: Path) -> list[str] | None:
    """What git tracks or would add below `root`; None where git has no say."""
    argv = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if b"dubious ownership" in done.stderr:
        # Walking instead would silently put in what .gitignore keeps out.
        raise BuildError(
            f"git refuses to read {root}: it belongs to another user",
            hint=f"git config --global --add safe.directory {root}",
        )
    names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    return sorted(set(names)) if done.returncode == 0 and names else None


def _expand(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Files that exist; a submodule or an embedded repository gives its own files."""
    for name in names:
        path = f"{root}/{name}"
        if os.path.isdir(path) and not os.path.islink(path):
            name = name.rstrip("/")
            inner = _git_files(Path(path)) if os.path.exists(f"{path}/.git") else None
            below = _walk(Path(path), "") if inner is None else _expand(Path(path), inner)
            yield from (f"{name}/{rest}" for rest in below)
        elif os.path.lexists(path):
            yield name


def _walk(root: Path, prefix: str) -> Iterator[str]:
    try:
        entries = list(os.scandir(root))
    except OSError as error:
        raise BuildError(f"cannot read {root}: {error.strerror}") from None
    for entry in entries:
        if _matches(entry.name):
            continue
        path = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            if not os.path.exists(f"{entry.path}/pyvenv.cfg"):
                yield from _walk(Path(entry.path), path + "/")
        elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
            yield path


def walk_package(root: Path) -> list[str]:
    """All files of an installed package folder, without caches, sorted."""
    return sorted(_walk(root, ""))


def entries(root: Path, names: Iterable[str], prefix: str, cache: HashCache | None = None) -> list[Entry]:
    """`names` below `root` as entries below `prefix` (which ends in `/` or is empty)."""
    made = []
    kept = 0
    for name in names:
        path = root / name
        try:
            status = os.lstat(path)
            executable = bool(status.st_mode & 0o111)
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(path)
                made.append(Entry(prefix + name, _sha(os.fsencode(target)), link=target))
            elif status.st_size < _SMALL and kept < _SNAPSHOT:
                data = path.read_bytes()
                kept += len(data)
                made.append(Entry(prefix + name, _sha(data), executable, data=data))
            else:
                made.append(Entry(prefix + name, _file_digest(path, status, cache), executable, source=path))
        except OSError as error:
            raise BuildError(f"cannot read {path}: {error.strerror}") from None
    return made


def content_hash(parts: Sequence[Entry], facts: dict[str, object]) -> str:
    """64 hex digits over paths, contents, exec bits and `facts`; the order of `parts` is of no account."""
    rows = sorted([entry.path, entry.digest, entry.executable, bool(entry.link)] for entry in parts)
    return _sha(json.dumps([rows, facts], sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())


def write_tar(parts: Sequence[Entry], stream: BinaryIO) -> None:
    """The deterministic tar of `parts`. Raises BuildError if a file is not what was hashed."""
    # Folders are entries of their own, with a fixed time: else each build would make a new layer of them.
    parents = {parent for entry in parts for parent in _parents(entry.path)}
    whole = [*parts, *(Entry(path) for path in parents - {entry.path for entry in parts})]
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        for entry in sorted(whole, key=lambda entry: entry.path):
            info = tarfile.TarInfo(entry.path.rstrip("/"))
            info.mode = 0o755 if entry.executable or entry.is_dir else 0o644
            if entry.link:
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
                tar.addfile(info)
            elif entry.is_dir:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                _add_file(tar, info, entry)


def _parents(path: str) -> Iterator[str]:
    """`a/`, `a/b/` for `a/b/c`."""
    parts = path.rstrip("/").split("/")[:-1]
    for at in range(1, len(parts) + 1):
        yield "/".join(parts[:at]) + "/"


def _add_file(tar: tarfile.TarFile, info: tarfile.TarInfo, entry: Entry) -> None:
    if entry.data is not None:
        info.size = len(entry.data)
        tar.addfile(info, io.BytesIO(entry.data))
        return
    assert entry.source is not None
    changed = BuildError(f"{entry.source} changed while the image was being built", hint="run the command again")
    try:
        with open(entry.source, "rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            reader = _HashingReader(file)
            tar.addfile(info, reader)  # type: ignore[arg-type]
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise changed from None
    if reader.hash.hexdigest() != entry.digest:
        raise changed


class _HashingReader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data


class HashCache:
    """Hashes of big files by (path, size, mtime, inode), in a JSON file; losing it costs only time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        try:
            self._known: dict[str, str] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def digest(self, path: Path, status: os.stat_result, compute: Callable[[], str]) -> str:
        key = f"{path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
        if key not in self._known:
            self._known[key] = compute()
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        """Writes what is new, keeping the newest 1000; a folder that cannot be written is no error."""
        if not self._changed:
            return
        text = json.dumps(dict(list(self._known.items())[-1000:]))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, self._path)
        except OSError:
            pass


def _file_digest(path: Path, status: os.stat_result, cache: HashCache | None) -> str:
    def compute() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if status.st_size < _BIG or cache is None:
        return compute()
    return cache.digest(path, status, compute)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
