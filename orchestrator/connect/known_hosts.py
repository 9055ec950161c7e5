"""Host keys as OpenSSH keeps them: look up, check, pin.

Only text and files; the keys themselves are fetched by `SshConnector.scan`. The policy is strict:
a key that is not pinned, and a key that differs from the pinned one, are both refused.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError, HostKeyError

SYSTEM_FILE = Path("/etc/ssh/ssh_known_hosts")

_writing = threading.Lock()


@dataclass(frozen=True)
class HostKey:
    """A server's public key: its type (`ssh-ed25519`, `ssh-rsa`, …) and the base64 of its blob."""

    type: str
    base64: str

    @property
    def fingerprint(self) -> str:
        """`SHA256:…`, as `ssh-keygen -l` prints it."""
        return fingerprint(self)

    def __str__(self) -> str:
        return f"{self.type} {self.fingerprint}"


@dataclass(frozen=True)
class Entry:
    """One line of a known_hosts file."""

    names: tuple[str, ...]
    key: HostKey
    file: Path
    line: int
    marker: str = ""

    def matches(self, name: str) -> bool:
        """Whether the line speaks of `name`; a negated pattern (`!name`) rules the line out."""
        found = False
        for pattern in self.names:
            if pattern.startswith("!"):
                if _match(name, pattern[1:]):
                    return False
            elif _match(name, pattern):
                found = True
        return found

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def fingerprint(key: HostKey) -> str:
    digest = hashlib.sha256(base64.b64decode(key.base64)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def host_name(host: str, port: int = 22) -> str:
    """The name under which a host is pinned: `host`, or `[host]:port` off port 22."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def read(files: Iterable[Path]) -> list[Entry]:
    """All usable lines of `files`, in order; a file that does not exist is an empty one.

    Raises ConfigError for a file that cannot be read. Lines that OpenSSH would skip are skipped.
    """
    entries: list[Entry] = []
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot read the known_hosts file {file}: {error.strerror}") from error
        for number, line in enumerate(text.splitlines(), 1):
            entry = _parse(line, file, number)
            if entry:
                entries.append(entry)
    return entries


def lookup(name: str, files: Sequence[Path]) -> list[Entry]:
    """The lines that pin (or revoke) a key for `name`; certificate authorities are left out."""
    return [entry for entry in read(files) if entry.marker != "@cert-authority" and entry.matches(name)]


def pinned_types(name: str, files: Sequence[Path]) -> list[str]:
    """The key types pinned for `name`, in the order of the files: what to ask the server for."""
    return list(dict.fromkeys(entry.key.type for entry in lookup(name, files) if not entry.marker))


def check(name: str, key: HostKey, files: Sequence[Path], *, node: str) -> None:
    """Returns if `key` is pinned for `name`, else raises HostKeyError: revoked, changed or unknown."""
    entries = lookup(name, files)
    for entry in entries:
        if entry.marker == "@revoked" and entry.key == key:
            raise HostKeyError(
                f"the host key of {name} is revoked in {entry.where} ({key})",
                node=node,
                hint="the machine must get a new host key, or it is not your machine",
            )
    pinned = [entry for entry in entries if not entry.marker]
    if any(entry.key == key for entry in pinned):
        return
    if pinned:
        same = [entry for entry in pinned if entry.key.type == key.type] or pinned
        raise HostKeyError(
            f"the host key of {name} has changed: pinned {same[0].key} in {same[0].where}, "
            f"but the server shows {key}; refused",
            node=node,
            hint="if the machine was really reinstalled, compare the fingerprint on its console, "
            f"then: orch nodes trust {node} --replace",
        )
    raise HostKeyError(
        f"the host key of {name} is unknown ({key})",
        node=node,
        hint=f"compare the fingerprint with the machine's own, then: orch nodes trust {node}",
    )


def pin(
    name: str,
    keys: Sequence[HostKey],
    file: Path,
    *,
    node: str,
    replace: bool = False,
    hashed: bool = False,
    also: Sequence[Path] = (),
) -> list[HostKey]:
    """Adds `keys` for `name` to `file` and returns those that were new; safe to repeat.

    `also` are further files that count when looking for what is pinned already. A key that differs
    from a pinned one of its type raises HostKeyError, unless `replace`: then all lines for this
    name go from `file` first. The file is replaced in one step and keeps its mode (0600 if new).
    """
    with _writing:
        known = lookup(name, [file, *also])
        for key in keys:
            if any(entry.marker == "@revoked" and entry.key == key for entry in known):
                check(name, key, [file, *also], node=node)
            other = [e for e in known if not e.marker and e.key.type == key.type]
            if other and all(entry.key != key for entry in other) and not replace:
                check(name, key, [file, *also], node=node)
        new = [k for k in keys if replace or all(e.key != k or e.marker for e in known)]
        if new:
            label = _hash(name) if hashed else name
            added = [f"{label} {key.type} {key.base64}" for key in new]
            _write(file, _kept(name, file) if replace else _lines(file), added)
        return new


def _kept(name: str, file: Path) -> list[str]:
    """The lines of `file` without `name`; a line for several names keeps the others."""
    kept = []
    for number, line in enumerate(_lines(file), 1):
        entry = _parse(line, file, number)
        if entry is None or entry.marker or not entry.matches(name):
            kept.append(line)
            continue
        others = [other for other in entry.names if not _match(name, other)]
        if others:
            kept.append(" ".join([",".join(others), *line.split()[1:]]))
    return kept


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="surrogateescape").splitlines() if file.exists() else []


def _write(file: Path, old: Sequence[str], added: Sequence[str]) -> None:
    file = file.resolve()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".known_hosts-")
    try:
        with os.fdopen(handle, "w", errors="surrogateescape") as out:
            out.writelines(line + "\n" for line in [*old, *added])
        os.chmod(temporary, mode)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _parse(line: str, file: Path, number: int) -> Entry | None:
    fields = line.split()
    if not fields or fields[0].startswith("#"):
        return None
    marker = fields.pop(0) if fields[0].startswith("@") else ""
    if len(fields) < 3:
        return None
    names, kind, blob = fields[:3]
    try:
        base64.b64decode(blob, validate=True)
    except (binascii.Error, ValueError):
        return None
    return Entry(tuple(names.split(",")), HostKey(kind, blob), file, number, marker)


def _match(name: str, pattern: str) -> bool:
    if pattern.startswith("|1|"):
        return hmac.compare_digest(_hash(name, pattern), pattern)
    # `[` is literal in OpenSSH's patterns (it starts `[host]:port`); only * and ? are special.
    return fnmatch.fnmatchcase(name, pattern.lower().replace("[", "[[]"))


def _hash(name: str, like: str | None = None) -> str:
    """`name` as OpenSSH's HashKnownHosts writes it, with a new salt or the salt of `like`."""
    try:
        salt = base64.b64decode(like.split("|")[2]) if like else os.urandom(20)
    except (IndexError, binascii.Error):
        return ""
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
