"""Where and as whom to connect: a node of the inventory seen through ~/.ssh/config.

What the inventory says wins over ~/.ssh/config, and that over the defaults of OpenSSH.
"""

from __future__ import annotations

import getpass
import glob
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.connect import known_hosts
from orchestrator.errors import ConfigError
from orchestrator.specs import Node

Lookup = Callable[[str], Mapping[str, Any]]
"""The options of ~/.ssh/config for a host name, keys in lower case."""

DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True)
class Endpoint:
    """One SSH server and how to log in there. `name` is the inventory's, for messages."""

    name: str
    host: str
    port: int
    user: str
    alias: str
    """The name that is looked up in known_hosts."""
    known_hosts: tuple[Path, ...]
    """The files that count; the first is where `orch nodes trust` writes."""
    keys: tuple[Path, ...] = ()
    only_keys: bool = False
    """Offer nothing but `keys` (from the file, or the agent where it holds the same key)."""
    explicit: bool = False
    """The inventory names the key, so its absence is an error, not the next thing to try."""
    jump: tuple[str, ...] = ()
    proxy_command: str = ""

    @property
    def where(self) -> str:
        return f"{self.user}@{self.host}" + (f":{self.port}" if self.port != 22 else "")


def resolve(node: Node, lookup: Lookup, home: Path | None = None) -> Endpoint:
    """The endpoint of `node`. Raises ConfigError for a port or jump that cannot be read."""
    home = home or Path.home()
    options = lookup(node.address)
    host = str(options.get("hostname") or node.address)
    port = node.port if node.port != 22 else _port(options.get("port", 22), node)
    keys, explicit = _keys(node, options, home)
    # An alias is looked up as it stands, without the port, as OpenSSH does.
    alias = options.get("hostkeyalias") or known_hosts.host_name(host, port)
    jump = node.jump if node.jump is not None else str(options.get("proxyjump") or "")
    proxy = "" if jump or node.jump is not None else str(options.get("proxycommand") or "")
    return Endpoint(
        name=node.name,
        host=host,
        port=port,
        user=node.user or str(options.get("user") or getpass.getuser()),
        alias=str(alias).lower(),
        known_hosts=_known_hosts(node, options, home),
        keys=keys,
        only_keys=explicit or str(options.get("identitiesonly", "no")).lower() == "yes",
        explicit=explicit,
        jump=() if jump.lower() in ("", "none") else tuple(part.strip() for part in jump.split(",")),
        proxy_command="" if proxy.lower() == "none" else proxy,
    )


def jump_node(text: str, nodes: Mapping[str, Node], through: Node) -> Node:
    """The machine that `jump: text` means: a node of the inventory, else `[user@]host[:port]`.

    A machine outside the inventory is logged in to with the key and known_hosts of the node
    behind it; ~/.ssh/config may say otherwise for its name.
    """
    if text in nodes:
        return nodes[text]
    match = re.fullmatch(r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^]]+\]|[^:@]+)(?::(?P<port>\d+))?/?", text)
    if not match:
        raise ConfigError(
            f"cannot read the jump host {text!r}",
            node=through.name,
            hint="write the name of a node, a name in ~/.ssh/config, or user@host:port",
        )
    return Node(
        name=text,
        address=match["host"].strip("[]"),
        user=match["user"],
        port=int(match["port"] or 22),
        key=through.key,
        known_hosts=through.known_hosts,
    )


def with_includes(file: Path, depth: int = 0) -> str:
    """The text of an ssh_config file with its `Include` lines replaced by what they include."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return ""
    out = []
    for line in text.splitlines():
        match = re.match(r"\s*include[\s=]+(.+)", line, re.IGNORECASE)
        if not match:
            out.append(line)
        elif depth < 16:
            for pattern in match[1].split():
                path = Path(pattern.strip('"')).expanduser()
                path = path if path.is_absolute() else Path.home() / ".ssh" / path
                out += [with_includes(Path(name), depth + 1) for name in sorted(glob.glob(str(path)))]
    return "\n".join(out) + "\n"


def _port(value: object, node: Node) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ConfigError(f"~/.ssh/config gives port {value!r}", node=node.name) from None


def _keys(node: Node, options: Mapping[str, Any], home: Path) -> tuple[tuple[Path, ...], bool]:
    if node.key:
        return (_path(node.key, home),), True
    named = [_path(str(name), home) for name in options.get("identityfile", ())]
    usual = [home / ".ssh" / name for name in DEFAULT_KEYS]
    return tuple(path for path in (named or usual) if path.is_file()), False


def _known_hosts(node: Node, options: Mapping[str, Any], home: Path) -> tuple[Path, ...]:
    if node.known_hosts:
        return (_path(node.known_hosts, home),)
    named = str(options.get("userknownhostsfile") or "").split()
    user = [_path(name, home) for name in named if name.lower() != "none"]
    return (*(user or [home / ".ssh" / "known_hosts"]), known_hosts.SYSTEM_FILE)


def _path(text: str, home: Path) -> Path:
    return home / text[2:] if text.startswith("~/") else Path(text)
