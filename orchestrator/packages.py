"""Where a build gets its Python packages from: orch.yaml, completed by what pip uses on this machine."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from orchestrator import context
from orchestrator.commands import buildx
from orchestrator.commands.buildx import PipSettings
from orchestrator.context import Entry
from orchestrator.errors import ConfigError

_ARCHIVES = (".whl", ".tar.gz", ".zip")


@dataclass(frozen=True)
class Sources:
    """Where packages come from and how: never hashed, never in a layer."""

    pip: PipSettings = field(default_factory=PipSettings)
    ca_bundle: Path | None = None
    wheels: Path | None = None

    @property
    def default_only(self) -> bool:
        """Whether packages come from pip's default index alone."""
        return not (self.pip.index_url or self.pip.extra_index_urls or self.pip.find_links or self.packages)

    @cached_property
    def packages(self) -> tuple[Entry, ...]:
        """The files of the wheel folder, for mounting; unread until they are streamed."""
        if self.wheels is None:
            return ()
        names = sorted(path.name for path in self.wheels.iterdir() if path.name.endswith(_ARCHIVES))
        return tuple(context.entries(self.wheels, names, "wheels/"))


def wheel_facts(wheels: Path | None) -> list[list[object]]:
    """Names and sizes of the packages in a folder that orch.yaml names, for the hash. Raises ConfigError."""
    if wheels is None:
        return []
    if not wheels.is_dir():
        raise ConfigError(f"there is no folder {wheels}", hint="check image.wheels in orch.yaml")
    files = sorted(path for path in wheels.iterdir() if path.name.endswith(_ARCHIVES))
    return [[path.name, path.stat().st_size] for path in files]


def discover_sources(
    environ: Mapping[str, str],
    *,
    ca_bundle: Path | None = None,
    index_url: str | None = None,
    extra_index_url: str | None = None,
    wheels: Path | None = None,
) -> Sources:
    """What orch.yaml says of package sources, completed by what pip itself would use on this machine.

    Raises ConfigError for a file that does not exist or is too large for a build secret.
    """
    found = _pip_options(environ)
    if ca_bundle is None:
        named = found.get("cert") or environ.get("SSL_CERT_FILE") or environ.get("REQUESTS_CA_BUNDLE") or ""
        ca_bundle = Path(named) if named and Path(named).is_file() else None
    if ca_bundle is not None:
        if not ca_bundle.is_file():
            raise ConfigError(f"there is no CA bundle {ca_bundle}", hint="check image.ca_bundle in orch.yaml")
        if ca_bundle.stat().st_size > buildx.SECRET_LIMIT:
            raise ConfigError(
                f"the CA bundle {ca_bundle} is too large for a build secret (500 kB)",
                hint="set image.ca_bundle to a file with only your proxy's certificates",
            )
    links = found.get("find-links", "").split()
    if wheels is None:
        folders = [Path(link) for link in links if "://" not in link]
        wheels = next((path for path in folders if path.is_dir()), None)
    pip = PipSettings(
        index_url=index_url or _remote(found.get("index-url", "")),
        extra_index_urls=tuple(
            filter(None, [extra_index_url, *map(_remote, found.get("extra-index-url", "").split())])
        ),
        trusted_hosts=tuple(found.get("trusted-host", "").split()),
        find_links=tuple(link for link in links if "://" in link and _remote(link)),
        timeout=found.get("default-timeout", "") or found.get("timeout", ""),
    )
    return Sources(pip, ca_bundle, wheels)


def _remote(url: str) -> str:
    """`url`, or nothing for a folder of this machine, which a build cannot see."""
    return "" if url.startswith(("file:", "/")) else url


def _pip_options(environ: Mapping[str, str]) -> dict[str, str]:
    """pip's own settings, in pip's order: system file, user's files, PIP_CONFIG_FILE, environment."""
    home = Path(environ.get("HOME") or "~").expanduser()
    config_home = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path("/etc/pip.conf"), home / ".pip/pip.conf", config_home / "pip/pip.conf"]
    given = environ.get("PIP_CONFIG_FILE")
    if given == os.devnull:
        files = []
    elif given:
        files.append(Path(given))
    options: dict[str, str] = {}
    for path in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue  # pip itself will say so; a build must not fail for a file that it may not need
        for section in ("global", "install"):
            if parser.has_section(section):
                options.update({key.replace("_", "-"): value for key, value in parser.items(section)})
    for name, value in environ.items():
        if name.startswith("PIP_") and value:
            options[name[4:].lower().replace("_", "-")] = value
    return options
