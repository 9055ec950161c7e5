"""A simulated cluster of the tests' own, made once a session, and the `orch` command as a user runs it.

The cluster is called `orchtest`; its project is a temporary folder with an orch.yaml and the scripts of `jobs/`.
Each test finds the nodes free and has to leave them so. All waits have deadlines that suit a loaded machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import DeadlineError
from orchestrator.sim import base, engine, faults, health, plugins
from orchestrator.sim import cluster as sim
from orchestrator.sim.compose import LABEL, LABEL_PROJECT

ROOT = Path(__file__).resolve().parents[2]
NAME = "orchtest"
PATIENCE = 180.0
"""Seconds that anything may take before a test says that it does not happen."""


@dataclass(frozen=True)
class Done:
    """An `orch` command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def text(self) -> str:
        """Both streams, for messages."""
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Command:
    """A running `orch` command: its output is collected while it runs. With `terminal` it has a pty as stdout."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str], *, terminal: bool = False) -> None:
        self._out, self._err = bytearray(), bytearray()
        out: int = subprocess.PIPE
        if terminal:
            master, out = pty.openpty()
        self.process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, start_new_session=True
        )
        if terminal:
            os.close(out)
            stdout = master
        else:
            stdout = self.process.stdout.fileno()
        readers = ((stdout, self._out), (self.process.stderr.fileno(), self._err))
        self._threads = [threading.Thread(target=_collect, args=each, daemon=True) for each in readers]
        for thread in self._threads:
            thread.start()

    @property
    def out(self) -> str:
        return self._out.decode("utf-8", "replace")

    @property
    def err(self) -> str:
        return self._err.decode("utf-8", "replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def until(self, pattern: str, count: int = 1, seconds: float = PATIENCE) -> re.Match[str]:
        """Waits until `pattern` stands `count` times in stdout or in stderr; the last match."""
        deadline = time.monotonic() + seconds
        while True:
            ended = not self.running
            for text in (self.out, self.err):
                found = list(re.finditer(pattern, text))
                if len(found) >= count:
                    return found[-1]
            assert not ended, f"ended without {count} × {pattern!r}: {self.done().text}"
            assert time.monotonic() < deadline, f"no {count} × {pattern!r} in {seconds} s:\n{self.out}\n{self.err}"
            time.sleep(0.05)

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def done(self, seconds: float = PATIENCE) -> Done:
        """Waits for the end of the command."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in {seconds} s:\n{self.out}\n{self.err}") from None
        for thread in self._threads:
            thread.join(10)
        return Done(self.process.returncode, self.out, self.err)

    def kill(self) -> None:
        if self.running:
            self.process.kill()
        self.process.wait()


def _collect(fd: int, into: bytearray) -> None:
    with contextlib.suppress(OSError):  # a pty ends with EIO
        while data := os.read(fd, 1 << 16):
            into += data


class Rig:
    """The cluster, the project and the command line."""

    def __init__(self, cluster: sim.Cluster, project: Path, state: Path) -> None:
        self.cluster, self.project, self.state = cluster, project, state
        self.repository = f"{cluster.registry}/orch-it"
        self.image = ""
        """The CPU image with the scripts, pinned by digest."""
        self._commands: list[Command] = []
        self._configs = 0

    # -- the command line

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ORCH_", "COLUMNS", "NO_COLOR"))}
        return {**kept, "ORCH_STATE": str(self.state), "PYTHONPATH": str(ROOT), "TERM": "xterm", **changes}

    def start(self, *words: str, terminal: bool = False, **env: str) -> Command:
        """Starts `orch WORDS…`; it is killed at the end of the test if it still runs then."""
        argv = [sys.executable, "-m", "orchestrator", *words]
        command = Command(argv, self.project, self.environment(**env), terminal=terminal)
        self._commands.append(command)
        return command

    def orch(self, *words: str, code: int | None = 0, terminal: bool = False, **env: str) -> Done:
        """Runs `orch WORDS…` to its end; `code` is the expected exit code, None for any."""
        done = self.start(*words, terminal=terminal, **env).done()
        assert code is None or done.code == code, f"orch {' '.join(words)}: {done.text}"
        return done

    def hold(self, *options: str, job: str = "hold.py", words: tuple[str, ...] = (), nodes: int = 2) -> str:
        """Starts a detached run of a script, once per node, waits until all are ready; its id."""
        argv = ["deploy", "--nodes", str(nodes), "--detach", "--launcher", "none", *options]
        run = self.orch(*argv, "--", f"jobs/{job}", *words).out.strip()
        for node in self.cluster.nodes[:nodes]:
            self.until(lambda node=node: "ready" in self.log(node, run), f"{run} ready on {node}")
        return run

    def config(self, **changes: Any) -> str:
        """The path of another configuration of the project: the usual one with `section={key: value}` changed."""
        document = yaml.safe_load((self.project / "orch.yaml").read_text())
        for section, values in changes.items():
            document[section] = {**document.get(section, {}), **values} if isinstance(values, dict) else values
        self._configs += 1
        path = self.project / f"other-{self._configs}.yaml"
        path.write_text(yaml.safe_dump(document))
        return str(path)

    # -- the nodes, seen past orch

    def on(self, node: str, script: str, *, root: bool = False) -> str:
        """What a shell script prints on `node`, through the outer engine."""
        user = [] if root else ["-u", "orch", "-e", "HOME=/home/orch", "-w", "/home/orch"]
        argv = ["docker", "exec", *user, self.cluster.container(node), "sh", "-c", script]
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{node}: {script}: {done.stderr}"
        return done.stdout

    def answers(self, node: str) -> bool:
        """Whether the node and its engine are up."""
        up = health.containers(self.cluster).get(node, ("", ""))[0] == "running"
        return up and health.engine_answers(self.cluster, node)

    def log(self, node: str, run: str) -> str:
        return self.on(node, f"cat ~/.orch/runs/{run}/log 2>/dev/null || :")

    def go(self, run: str, *nodes: str) -> None:
        """Lets the scripts of `run` go on, on `nodes` or everywhere."""
        for node in nodes or self.cluster.nodes:
            self.on(node, f"touch ~/.orch/runs/{run}/go")

    def containers(self, node: str) -> list[str]:
        """`NAME STATE RUN` of all containers of the node's engine."""
        form = '{{.Names}} {{.State}} {{.Label "orch.run"}}'
        return self.on(node, f"docker ps -a --format '{form}'").splitlines()

    def running(self, run: str) -> list[str]:
        """The nodes on which a container of `run` runs."""
        return [node for node in self.cluster.nodes if f"orch running {run}" in self.containers(node)]

    def processes(self, node: str, pattern: str) -> list[str]:
        """Command lines of the live processes on `node` that match `pattern`, which must not match itself."""
        return self.on(node, f"pgrep -af {pattern!r} || :", root=True).splitlines()

    def traces(self, name: str) -> list[str]:
        """What the nodes hold of runs called `name`: containers, run folders, checkpoint folders, waiting commands."""
        found = []
        for node in self.cluster.nodes:
            found += [f"{node}: container {row}" for row in self.containers(node) if name in row]
            listing = self.on(node, f"ls -d ~/.orch/runs/{name}* ~/.orch/checkpoints/{name}* 2>/dev/null || :")
            found += [f"{node}: {path}" for path in listing.split()]
        return found

    def until(self, ready: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.1)

    # -- between the tests

    def clear(self) -> list[str]:
        """Ends commands and containers that a test has left; the nodes on which one had not ended by itself.

        An ended container stays, for `orch why`, until the next run takes the node.
        """
        for command in self._commands:
            command.kill()
        self._commands.clear()
        script = "docker ps -a --filter name='^/?orch$' --format '{{.State}}'"
        with ThreadPoolExecutor() as pool:
            states = {node: pool.submit(self.on, node, script) for node in self.cluster.nodes}
        states = {node: asked.result() for node, asked in states.items()}
        for node in states:
            if states[node]:
                self.on(node, "docker rm -f orch >/dev/null")
        for path in self.project.glob("other-*.yaml"):
            path.unlink()
        return [node for node, state in states.items() if state.strip() not in ("", "exited")]


def _leftover(project: Path) -> None:
    """Removes the cluster of a test session that was killed; one that still runs is an error."""
    form = f'{{{{.Label "{LABEL_PROJECT}"}}}}'
    argv = ["docker", "ps", "-a", "--filter", f"label={LABEL}={NAME}", "--format", form]
    owners = set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    for owner in map(Path, owners):
        with contextlib.suppress(OSError, ValueError):
            pid = int((owner / "session.pid").read_text())
            os.kill(pid, 0)
            pytest.exit(f"the cluster {NAME} is in use by another test session (process {pid})", 4)
        if owner != project:
            _down(owner if owner.exists() else project)


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The cluster is up, the image built, pushed and pulled by both nodes.

    ORCH_TEST_PROJECT=FOLDER keeps the cluster, with its project in that folder, for the next session.
    """
    engine.ensure_engine()
    plugins.ensure_plugins()
    base.ensure_base(base.JOB)
    kept = os.environ.get("ORCH_TEST_PROJECT")
    project = Path(kept).resolve() if kept else tmp_path_factory.mktemp("cluster")
    project.mkdir(exist_ok=True)
    _leftover(project)
    (project / "session.pid").write_text(str(os.getpid()))
    try:
        made = Rig(sim.up(2, NAME, project, shared=True, registry_port=0), project, project / "state")
        _write_project(made)
        made.image = made.orch("build").out.strip()
        made.clear()
        # Both nodes pull while nothing is measured.
        made.orch("deploy", "--nodes", "2", "--launcher", "none", "--", "true")
        yield made
    finally:
        (project / "session.pid").unlink()
        if not kept:
            _down(project)


def _down(project: Path) -> None:
    # Some gigabytes of volumes go, which takes a slow disk longer than `down` waits for one command.
    for _ in range(4):
        with contextlib.suppress(DeadlineError):
            sim.down(NAME, project=project)
            break
    shutil.rmtree(project, ignore_errors=True)


def _write_project(made: Rig) -> None:
    shutil.rmtree(made.project / "jobs", ignore_errors=True)
    shutil.copytree(Path(__file__).parent / "jobs", made.project / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    (made.project / ".dockerignore").write_text("/*\n!/jobs\n")
    document = {
        "name": "it",
        "image": {"repository": made.repository, "variant": "cpu"},
        "run": {"grace": 5},
        "targets": {
            "default": "sim",
            "sim": {"backend": "ssh", "inventory": f"inventory/{NAME}.yaml", "gpus": 0, "procs": 1},
        },
    }
    (made.project / "orch.yaml").write_text(yaml.safe_dump(document))


@pytest.fixture
def cluster(rig: Rig) -> Iterator[Rig]:
    """The rig with free nodes; afterwards nothing that was done to the nodes is left, and no container of a run."""
    rig.clear()
    with faults.healed(rig.cluster):
        yield rig
    left = rig.clear()
    assert not left, f"the test has left a live container on {', '.join(left)}"


@pytest.fixture
def interrupt() -> Callable[[Command], None]:
    """Ctrl-C, as the terminal sends it."""
    return lambda command: command.send(signal.SIGINT)
