"""A node that is not there: the very same shell text, run by this machine's sh in a private home.

Its `docker` is fake_docker.py, with its state under the node's folder. So tests of everything
above need neither machines nor an engine, and exercise the real scripts. Shipped, because a
user's own plug-ins and the demo of an error message need it too.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.connect.base import Completed, Host, Stream
from orchestrator.connect.local import LocalHost
from orchestrator.errors import ConnectError, ConnectionLost, DeadlineError
from orchestrator.specs import Node

PACKAGE_ROOT = Path(__file__).resolve().parents[2]

_DOCKER = """#!/bin/sh
FAKE_DOCKER={folder} FAKE_DOCKER_COMMAND={command}
export FAKE_DOCKER FAKE_DOCKER_COMMAND
exec {python} -S -E -c {code} "$@"
"""

_CODE = (
    "import sys; sys.path.insert(0, {root!r}); "
    "from orchestrator.connect.fake_docker import main; sys.exit(main(sys.argv[1:]))"
)

_NVIDIA_SMI = """#!/bin/sh
[ "$1" = -L ] || exit 0
i=0; while [ $i -lt {gpus} ]; do echo "GPU $i: Fake H100 (UUID: GPU-$i)"; i=$((i+1)); done
"""


class FakeHost:
    """Host of connect/base.py. `root` is the node's folder: its HOME, its engine, its commands.

    `images` are in the engine already, `registry` can be pulled. With `execute`, a started
    container really runs its entrypoint here; without, it is `running` until `finish` or a signal.
    """

    def __init__(
        self,
        node: Node,
        root: Path,
        *,
        images: Iterable[str] = (),
        registry: Iterable[str] = (),
        execute: bool = False,
        version: str = "28.2.2",
    ) -> None:
        self.node = node
        self.root = root
        self.home = root / "home"
        self.commands: list[str] = []
        """Every command that came here, in order: `run` and `stream`."""
        self._engine = root / "engine"
        self._trouble = ""
        self._streams: list[FakeStream] = []
        for folder in (self.home, self._engine, root / "bin"):
            folder.mkdir(parents=True, exist_ok=True)
        self._write_commands()
        if not (self._engine / "state.json").exists():
            empty = {"up": True, "containers": [], "faults": [], "images": [], "registry": []}
            self._save({**empty, "version": version, "execute": execute, "gpus": node.gpus or 0})
        self.add_images(images, registry)
        path = f"{root / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        self._host = LocalHost(node, {"HOME": str(self.home), "PATH": path, "USER": node.user or "fake"})

    # ---- Host

    def run(self, command: str, *, stdin: bytes | None = None, timeout: float = 60.0) -> Completed:
        self.commands.append(command)
        self.check(timeout)
        return self._host.run(command, stdin=stdin, timeout=timeout)

    def stream(self, command: str) -> Stream:
        self.commands.append(command)
        self.check(60.0)
        stream = FakeStream(self._host.stream(command), self)
        self._streams.append(stream)
        return stream

    @contextmanager
    def forward(self, port: int, target: tuple[str, int]) -> Iterator[int]:
        self.check(15.0)
        with self._host.forward(port, target) as got:
            yield got

    def close(self) -> None:
        """Ends all that runs here. The folder, and with it the engine's state, stays."""
        for stream in self._streams:
            stream.close()
        self._host.run('ids=$(docker ps -q) && [ -z "$ids" ] || docker kill $ids >/dev/null 2>&1', timeout=20)

    # ---- faults and inspection

    def check(self, timeout: float) -> None:
        """Raises what a command meets now."""
        if self._trouble == "down":
            raise ConnectError(
                f"cannot reach {self.node.address}:{self.node.port}: no route to host", node=self.node.name
            )
        if self._trouble == "hang":
            raise DeadlineError(f"the command did not end within {timeout:g} s", node=self.node.name)

    def down(self) -> None:
        """The machine is gone: streams break, nothing connects, until `up`."""
        self._trouble = "down"
        self.cut()

    def hang(self) -> None:
        """The machine answers nothing any more. Deadlines are missed at once, without waiting."""
        self._trouble = "hang"

    def up(self) -> None:
        self._trouble = ""

    def cut(self) -> None:
        """Breaks the open connection: every stream raises ConnectionLost at its next read."""
        for stream in self._streams:
            stream.cut()
        self._streams.clear()

    @property
    def hanging(self) -> bool:
        return self._trouble == "hang"

    def fail(self, verb: str, message: str, *, code: int = 1, times: int = 1) -> None:
        """The next `times` calls of `docker VERB` print `message` (on stderr) and exit with `code`."""
        with self._edit() as state:
            state["faults"].append({"verb": verb, "message": message, "code": code, "times": times})

    def engine(self, *, up: bool) -> None:
        """Stops or starts the engine's daemon; containers stay as they are."""
        with self._edit() as state:
            state["up"] = up

    def add_images(self, images: Iterable[str] = (), registry: Iterable[str] = ()) -> None:
        from orchestrator.connect.fake_engine import normal

        with self._edit() as state:
            state["images"] += [normal(ref) for ref in images]
            state["registry"] += [normal(ref) for ref in registry]

    @property
    def images(self) -> list[str]:
        return list(self._state()["images"])

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All containers, as `docker inspect` shows them."""
        return list(self._state()["containers"])

    def finish(self, name: str, code: int = 0) -> None:
        """Ends a container that does not really run (`execute=False`) with `code`."""
        with self._edit() as state:
            for box in state["containers"]:
                if box["Name"] == f"/{name}":
                    box["State"].update(Status="exited", Running=False, Pid=0, ExitCode=code)

    def _write_commands(self) -> None:
        code = _CODE.format(root=str(PACKAGE_ROOT))
        command = [sys.executable, "-S", "-E", "-c", code]
        text = _DOCKER.format(
            folder=shlex.quote(str(self._engine)),
            command=shlex.quote("\t".join(command)),
            python=shlex.quote(sys.executable),
            code=shlex.quote(code),
        )
        scripts = {"docker": text}
        if self.node.gpus:
            scripts["nvidia-smi"] = _NVIDIA_SMI.format(gpus=self.node.gpus)
        for name, content in scripts.items():
            file = self.root / "bin" / name
            file.write_text(content)
            file.chmod(0o755)

    def _state(self) -> dict[str, Any]:
        return json.loads((self._engine / "state.json").read_text())

    def _save(self, state: Mapping[str, Any]) -> None:
        (self._engine / "state.json").write_text(json.dumps(state))

    @contextmanager
    def _edit(self) -> Iterator[dict[str, Any]]:
        from orchestrator.connect.fake_engine import state

        with state(self._engine) as data:
            yield data


class FakeStream:
    """A stream that the fake node can break."""

    def __init__(self, inner: Stream, host: FakeHost) -> None:
        self._inner = inner
        self._host = host
        self._broken = False

    def read(self, timeout: float | None = None) -> bytes | None:
        if self._broken:
            raise ConnectionLost("the SSH connection broke while a command was running", node=self._host.node.name)
        if self._host.hanging:
            return None
        data = self._inner.read(timeout)
        return self.read(timeout) if data == b"" and self._broken else data

    @property
    def returncode(self) -> int | None:
        return None if self._broken else self._inner.returncode

    @property
    def stderr(self) -> str:
        return self._inner.stderr

    def cut(self) -> None:
        self._broken = True
        self._inner.close()

    def close(self) -> None:
        with suppress(OSError):
            self._inner.close()


class FakeConnector:
    """Connector of connect/base.py over fake hosts, by node name."""

    def __init__(self, hosts: Mapping[str, FakeHost]) -> None:
        self.hosts = dict(hosts)
        self.connects: list[str] = []

    def connect(self, node: Node, *, timeout: float = 15.0) -> Host:
        self.connects.append(node.name)
        host = self.hosts.get(node.name)
        if host is None:
            raise ConnectError(f"the name {node.address} cannot be resolved", node=node.name)
        host.check(timeout)
        return host

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
