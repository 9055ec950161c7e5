"""This machine's package sources, read and turned into those of another Debian suite. Pure.

Mirror, proxy and keyring are whatever the machine already uses: nothing here names a host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_ROLLING = ("stable", "oldstable", "oldoldstable", "testing")


@dataclass(frozen=True)
class Source:
    """One `deb` entry; `signed_by` is a keyring path, or empty for apt's trusted keys."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""
    trusted: bool = False

    def line(self) -> str:
        """The entry in apt's one-line format."""
        options = []
        if self.signed_by:
            options.append(f"signed-by={self.signed_by}")
        if self.trusted:
            options.append("trusted=yes")
        bracket = f"[{' '.join(options)}] " if options else ""
        return f"deb {bracket}{self.uri} {self.suite} {' '.join(self.components)}"


def parse(text: str, *, deb822: bool) -> list[Source]:
    """The enabled binary entries of one file of apt sources, in either of apt's two formats."""
    return list(_deb822(text)) if deb822 else list(_one_line(text))


def _one_line(text: str) -> Iterable[Source]:
    for raw in text.splitlines():
        entry = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", raw)
        if not entry:
            continue
        options = dict(pair.split("=", 1) for pair in (entry[1] or "").split() if "=" in pair)
        signed_by = options.get("signed-by", "")
        trusted = options.get("trusted") == "yes"
        yield Source(entry[2], entry[3], tuple(entry[4].split()), signed_by, trusted)


def _deb822(text: str) -> Iterable[Source]:
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t") and key:
                fields[key] += "\n" + line.strip()
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        signed_by = fields.get("signed-by", "")
        if not signed_by.startswith("/"):
            signed_by = ""  # a key written into the file itself has no one-line form: apt's trusted keys decide
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = tuple(fields.get("components", "").split())
                yield Source(uri, suite, components, signed_by, fields.get("trusted", "").lower() == "yes")


def derive(sources: Sequence[Source], codename: str, suite: str) -> list[Source]:
    """The distribution's own entries among `sources` (not third parties'), for `suite` instead of `codename`.

    Entries are taken when they offer `main` for the machine's own suite, its updates or its security
    updates. Only `main` is asked for. Empty if the machine has none.
    """
    found: list[Source] = []
    for source in sources:
        stem, dash, rest = source.suite.partition("-")
        own = stem == codename or stem in _ROLLING
        if not own or rest not in ("", "updates", "security") or "main" not in source.components:
            continue
        wanted = replace(source, suite=f"{suite}{dash}{rest}", components=("main",))
        if wanted not in found:
            found.append(wanted)
    return found


def render(sources: Iterable[Source]) -> str:
    """A `sources.list` of `sources`."""
    return "".join(source.line() + "\n" for source in sources)


def os_release(text: str) -> dict[str, str]:
    """The fields of /etc/os-release, unquoted."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}
