"""The machines: our YAML inventory, MPI hostfiles, names of ~/.ssh/config; and choosing among them.

```yaml
defaults: {user: ubuntu, port: 22, key: ~/.ssh/id_ed25519, gpus: 8}
nodes:
  gpu1: {address: 203.0.113.11, private: 10.0.0.11, jump: bastion, labels: {rack: a}}
  gpu2:                       # only a name: ~/.ssh/config and DNS say the rest
groups: {pair: [gpu1, gpu2]}
```
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, UsageError, unknown
from orchestrator.files import parse_yaml, read_text
from orchestrator.specs import Node, safe_name

_TOP = ("defaults", "nodes", "groups")
_KEYS: dict[str, type] = {
    "address": str,
    "private": str,
    "user": str,
    "port": int,
    "key": str,
    "jump": str,
    "gpus": int,
    "labels": dict,
    "known_hosts": str,
}
_DEFAULTS = [key for key in _KEYS if key not in ("address", "private")]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_HOST = re.compile(r"[A-Za-z0-9_\[:][A-Za-z0-9._:\[\]%-]*\Z")
_HOSTFILE_LINE = re.compile(r"(?P<host>\S+)(?P<rest>(\s+[A-Za-z_-]+=\S+)*)\s*\Z")
_RANGE = re.compile(r"\[([0-9,\-\s]+)\]")
_MAX_RANGE = 10_000


@dataclass(frozen=True)
class Inventory:
    """The nodes of one file, in the file's order."""

    path: Path
    nodes: tuple[Node, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def get(self, name: str) -> Node:
        """The node `name`. Raises UsageError."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise UsageError(unknown("node", name, [node.name for node in self.nodes]), hint=f"inventory: {self.path}")

    def select(self, spec: str | int | None = None, count: int | None = None) -> tuple[Node, ...]:
        """The nodes that `spec` names, each once, in the order named; of these the first `count`.

        `spec` is a number (the first so many), or a list joined by commas of node names, groups, labels
        `key=value`, globs `gpu*` and ranges `gpu[1-4,7]`; None is all nodes. Raises UsageError.
        """
        if spec is not None and str(spec).strip().lstrip("-").isdigit() and not self._names(str(spec).strip()):
            if count is not None and count != int(spec):
                raise UsageError(f"{int(spec)} nodes and {count} nodes cannot both be meant")
            spec, count = None, int(spec)
        found: dict[str, Node] = {}
        for word in [None] if spec is None else _split(str(spec)):
            for node in self.nodes if word is None else self._match(word):
                found[node.name] = node
        nodes = tuple(found.values())
        if count is None:
            return nodes
        if count < 1:
            raise UsageError(f"--nodes {count}: at least one node is needed")
        if count > len(nodes):
            where = f"{self.path} has" if spec is None else f"{spec!r} names"
            raise UsageError(
                f"--nodes {count}: {where} {len(nodes)} node{'s' * (len(nodes) != 1)}",
                hint="ask for fewer, or add nodes to the inventory",
            )
        return nodes[:count]

    def _names(self, word: str) -> bool:
        return word in self.groups or any(node.name == word for node in self.nodes)

    def _match(self, word: str) -> Sequence[Node]:
        by_name = {node.name: node for node in self.nodes}
        if word in by_name:
            return [by_name[word]]
        if word in self.groups:
            return [by_name[name] for name in self.groups[word]]
        if "=" in word:
            key, _, value = word.partition("=")
            found = [node for node in self.nodes if node.labels.get(key) == value]
            if not found:
                labels = {f"{key}={value}" for node in self.nodes for key, value in node.labels.items()}
                raise UsageError(unknown("label", word, sorted(labels)))
            return found
        if _RANGE.search(word):
            return [self.get(name) for name in expand(word)]
        if any(character in word for character in "*?["):
            found = [node for node in self.nodes if fnmatch.fnmatchcase(node.name, word)]
            if not found:
                raise UsageError(f"no node matches {word!r} (nodes: {', '.join(by_name)})")
            return found
        raise UsageError(unknown("node or group", word, [*by_name, *self.groups]), hint=f"inventory: {self.path}")


def load(path: str | os.PathLike[str]) -> Inventory:
    """The inventory in `path`, YAML or a hostfile. Raises ConfigError with all that is wrong."""
    file = Path(path).expanduser().absolute()
    if not file.exists():
        raise ConfigError(
            f"inventory {path} does not exist",
            hint="give --inventory FILE; `orch sim up` makes one for a simulated cluster (inventory/sim.yaml)",
        )
    return parse(read_text(file, "inventory"), file)


def parse(text: str, path: Path) -> Inventory:
    """The inventory in `text`; relative files in it are beside `path`. Raises ConfigError."""
    if looks_like_hostfile(text):
        return _checked(path, _hostfile(text, path), {}, [])
    document = parse_yaml(text, path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected `nodes:` with a mapping of nodes, or a hostfile (`host slots=8` a line)")
    problems: list[str] = [f"{key}: {unknown('key', str(key), _TOP)}" for key in document if key not in _TOP]
    defaults = _fields(document.get("defaults") or {}, "defaults", _DEFAULTS, problems)
    rows = document.get("nodes") or {}
    if isinstance(rows, list):
        rows = {row: None for row in rows}
    if not isinstance(rows, dict):
        raise ConfigError(f"{path}: nodes: expected a mapping of nodes")
    nodes = []
    for name, row in rows.items():
        fields = _fields(row or {}, f"nodes.{name}", list(_KEYS), problems)
        labels = {**defaults.get("labels", {}), **fields.get("labels", {})}
        nodes.append(_node(str(name), {**defaults, **fields, "labels": labels}, path, problems))
    groups = _groups(document.get("groups") or {}, [node.name for node in nodes], problems)
    return _checked(path, nodes, groups, problems)


def looks_like_hostfile(text: str) -> bool:
    """Whether every line is `host` or `host key=value…`, as mpirun and DeepSpeed write them."""
    lines = [line for line in (_bare(line) for line in text.splitlines()) if line]
    return bool(lines) and all(_HOSTFILE_LINE.match(line) and not line.endswith(":") for line in lines)


def names_in(path: Path) -> list[str]:
    """Names of nodes and groups, for shell completion."""
    inventory = load(path)
    return [*(node.name for node in inventory.nodes), *inventory.groups]


def expand(word: str) -> list[str]:
    """`n[1-3,7]` → n1 n2 n3 n7; leading zeros are kept (`n[08-10]`). Raises UsageError."""
    found = _RANGE.search(word)
    if not found:
        return [word]
    names = []
    for part in found[1].split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit()) or int(last) < int(first):
            raise UsageError(f"{word!r}: {part.strip()!r} is not a range", hint="for example n[1-4] or n[1,3]")
        if int(last) - int(first) >= _MAX_RANGE:
            raise UsageError(f"{word!r} is a range of more than {_MAX_RANGE} nodes")
        width = len(first) if first.startswith("0") else 0
        numbers = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        names += [word[: found.start()] + number + word[found.end() :] for number in numbers]
    return [name for each in names for name in expand(each)]


def _split(spec: str) -> list[str]:
    """Words of a selection; a comma within brackets belongs to its range."""
    words = [word.strip() for word in re.split(r",(?![^\[]*\])", spec)]
    if not all(words):
        raise UsageError(f"--nodes {spec!r} has an empty name in it")
    return words


def _bare(line: str) -> str:
    return line.split("#", 1)[0].strip()


def _hostfile(text: str, path: Path) -> list[Node]:
    nodes = []
    for number, line in enumerate(text.splitlines(), 1):
        found = _HOSTFILE_LINE.match(_bare(line))
        if not found:
            continue
        options = dict(word.split("=", 1) for word in found["rest"].split())
        user, at, host = found["host"].rpartition("@")
        gpus = None
        for key, value in options.items():
            if key not in ("slots", "max_slots", "max-slots"):
                raise ConfigError(f"{path}:{number}: {unknown('option', key, ['slots', 'max_slots'])}")
            if not value.isdigit():
                raise ConfigError(f"{path}:{number}: {key}={value}: expected a number")
            gpus = int(value) if key == "slots" else gpus
        nodes.append(Node(name=host, address=host, user=user if at else None, gpus=gpus))
    return nodes


def _fields(row: Any, where: str, valid: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """The keys of one node or of `defaults` that are known and of the right type."""
    if not isinstance(row, dict):
        problems.append(f"{where}: expected a mapping, found {row!r}")
        return {}
    fields = {}
    for key, value in row.items():
        if key not in valid:
            problems.append(f"{where}.{key}: {unknown('key', str(key), valid)}")
        elif value is None:
            continue
        elif _KEYS[key] is str and isinstance(value, int | float) and not isinstance(value, bool):
            fields[key] = str(value)
        elif not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            problems.append(f"{where}.{key}: expected {_KEY_WORDS[_KEYS[key]]}, found {value!r}")
        else:
            fields[key] = value
    port, gpus = fields.get("port"), fields.get("gpus")
    if port is not None and not 1 <= port <= 65535:
        problems.append(f"{where}.port: {port} is not a port (1-65535)")
    if gpus is not None and gpus < 0:
        problems.append(f"{where}.gpus: {gpus} is negative")
    if "labels" in fields:
        fields["labels"] = {str(key): str(value) for key, value in fields["labels"].items()}
    return fields


_KEY_WORDS = {str: "text", int: "a number", dict: "a mapping"}


def _node(name: str, fields: dict[str, Any], path: Path, problems: list[str]) -> Node:
    for key in ("key", "known_hosts"):
        if key in fields:
            fields[key] = os.path.normpath(path.parent / Path(fields[key]).expanduser())
    for key in ("address", "private"):
        if key in fields and not _HOST.match(fields[key]):
            problems.append(f"nodes.{name}.{key}: {fields[key]!r} is not a host name or an address")
    # only a name: the transport looks it up in ~/.ssh/config, then in DNS
    return Node(name=name, **{"address": name, **fields})


def _groups(rows: Any, nodes: Sequence[str], problems: list[str]) -> dict[str, tuple[str, ...]]:
    if not isinstance(rows, dict):
        problems.append("groups: expected a mapping of lists")
        return {}
    groups = {}
    for name, members in rows.items():
        if not isinstance(members, list):
            problems.append(f"groups.{name}: expected a list of nodes")
            continue
        if str(name) in nodes:
            problems.append(f"groups.{name}: a node has this name too")
        problems += [
            f"groups.{name}: {unknown('node', str(member), nodes)}" for member in members if str(member) not in nodes
        ]
        groups[str(name)] = tuple(dict.fromkeys(str(member) for member in members))
    return groups


def _checked(
    path: Path, nodes: Sequence[Node], groups: Mapping[str, tuple[str, ...]], problems: list[str]
) -> Inventory:
    problems = [*problems, *_name_problems(nodes), *_twice(nodes)]
    if not nodes and not problems:
        problems.append("nodes: there are none")
    if len(problems) == 1:
        raise ConfigError(f"{path}: {problems[0]}")
    if problems:
        raise ConfigError(f"{path} has {len(problems)} problems", lines=problems)
    return Inventory(path, tuple(nodes), dict(groups))


def _name_problems(nodes: Iterable[Node]) -> list[str]:
    problems = []
    folders: dict[str, str] = {}
    for node in nodes:
        if not _NAME.match(node.name):
            problems.append(f"nodes: {node.name!r} cannot name a node (letters, digits, . _ - ; no leading . _ -)")
        other = folders.setdefault(safe_name(node.name), node.name)
        if other != node.name:
            problems.append(f"nodes: {other!r} and {node.name!r} are too alike to be told apart")
    return problems


def _twice(nodes: Sequence[Node]) -> list[str]:
    """Two names for one machine would start two parts of a job on it."""
    problems = []
    seen: dict[tuple[str, str | int], str] = {}
    for node in nodes:
        places: list[tuple[str, tuple[str, str | int]]] = [("address", (node.address, node.port))]
        if node.private != node.address:
            places.append(("private address", (node.private, "private")))
        for what, place in places:
            if place in seen:
                problems.append(f"nodes {seen[place]} and {node.name} have the same {what} {place[0]}")
            seen.setdefault(place, node.name)
    return problems
