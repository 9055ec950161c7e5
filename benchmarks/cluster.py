"""What deploy.py and edit_to_step.py share: the same job as a project of orch and as a script's build context.

Both sides get the same base image (the layers that `orch build` makes below the code), the same job file, the same
nodes and registry, and folders of their own, so that an edit of one changes nothing for the other. Everything that is
made carries a name of its own and is removed at the end: containers, run folders and images on the nodes, images of
this machine's engine. What stays is a few kilobytes in the registry, and the shared layers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.errors import OrchError
from orchestrator.inventory import load as load_inventory
from orchestrator.sim.cluster import Cluster, load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ("orchestrator", "trainer", "images")
REPOSITORY = "orch-bench"
PROCS = 2
PORT = 29555
PATIENCE = 600
LEARNING_RATE = re.compile(r"(?m)^LEARNING_RATE = \S+")

# The key exchange that paramiko uses as well: OpenSSH's newer default costs 80 ms of CPU per connection.
SSH_CONFIG = """Host *
  User {user}
  IdentityFile {key}
  IdentitiesOnly yes
  UserKnownHostsFile {known_hosts}
  BatchMode yes
  ExitOnForwardFailure yes
  KexAlgorithms curve25519-sha256
"""


@dataclass(frozen=True)
class Bench:
    """Both sides, ready to run. `name` begins the names of everything that is made."""

    name: str
    folder: Path
    cluster: Cluster
    addresses: tuple[str, ...]
    procs: int

    @property
    def ours(self) -> Path:
        return self.folder / "ours"

    @property
    def script(self) -> Path:
        return self.folder / "script"

    @property
    def repository(self) -> str:
        return f"{self.cluster.registry}/{REPOSITORY}"

    @property
    def image(self) -> str:
        """The script's image."""
        return f"{self.repository}:{self.name}"

    def orch(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator", *words]

    def orch_env(self) -> dict[str, str]:
        env = {**os.environ, "PYTHONPATH": str(self.folder / "checkout"), "ORCH_STATE": str(self.folder / "state")}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed orch is compiled
        return env

    def shell(self, name: str) -> list[str]:
        return ["sh", str(HERE / "shell" / name)]

    def shell_env(self) -> dict[str, str]:
        first, *_ = self.addresses
        return {
            **os.environ,
            "IMAGE": self.image,
            "CONTEXT": str(self.script),
            "REGISTRY": self.cluster.registry.rpartition(":")[2],
            "SSH_CONFIG": str(self.folder / "ssh_config"),
            "NODES": " ".join(self.addresses),
            "NODE_COUNT": str(len(self.addresses)),
            "HEAD": first,
            "NAME": self.name,
            "PORT": str(PORT),
            "PROCS": str(self.procs),
        }

    def on_nodes(self, command: str, *, check: bool = True) -> list[str]:
        """What `command` prints on each node."""

        def one(node: str) -> str:
            argv = self.cluster.ssh_argv(node, command)
            done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
            if check and done.returncode:
                sys.exit(f"{node}: {command}: {done.stderr.strip()}")
            return done.stdout

        with ThreadPoolExecutor(len(self.cluster.nodes)) as pool:
            return list(pool.map(one, self.cluster.nodes))

    def settle(self) -> None:
        """Waits until what was started on the nodes has ended, and removes its containers."""
        ours = f"docker ps -aq --no-trunc --filter name=^/{self.name}$"
        theirs = "docker inspect -f '{{.Id}} {{index .Config.Labels \"orch.run\"}}' orch 2>/dev/null"
        self.on_nodes(
            f"ids=$({ours}; {theirs} | sed -n 's/ {self.name}-.*//p'); "
            '[ -z "$ids" ] || { timeout 60 docker wait $ids; docker rm -f $ids; } >/dev/null 2>&1 || :'
        )

    def edit(self, folder: Path) -> None:
        """One line of the training code becomes another; no build has ever seen it."""
        path = folder / "train.py"
        fresh = f"LEARNING_RATE = 0.01{uuid.uuid4().int % 10**9:09d}"
        text, count = LEARNING_RATE.subn(fresh, path.read_text())
        assert count == 1
        path.write_text(text)


def run(argv: list[str], env: dict[str, str], folder: Path) -> str:
    """Runs to the end; a failure ends the benchmark with the command's last words."""
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(argv)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def timed(argv: list[str], env: dict[str, str], folder: Path) -> float:
    """Seconds from the command's start to its end."""
    begun = time.perf_counter()
    run(argv, env, folder)
    return time.perf_counter() - begun


def until_line(argv: list[str], env: dict[str, str], folder: Path, mark: str) -> float:
    """Seconds from the command's start to the first line of its stdout that holds `mark`; waits for its end."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout
        seen, last = None, ""
        for line in process.stdout:
            if seen is None and mark in line:
                seen = time.perf_counter() - begun
            last = line
        code = process.wait(PATIENCE)
        if code or seen is None:
            errors.seek(0)
            said = errors.read().decode(errors="replace")[-3000:]
            sys.exit(f"{shlex.join(argv)} ended with {code}, {mark!r} {'not ' * (seen is None)}seen\n{last}{said}")
    return seen


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every side once a round, in turns that change direction; a first round that is not counted warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(-1, rounds):
        for name in list(sides) if at % 2 else reversed(sides):
            seconds = sides[name]()
            if at >= 0:
                times[name].append(seconds)
    return times


def compare(ours: list[float], theirs: list[float], *, ratio: float = 1.2, slack: float = 0.5) -> dict:
    """Medians in seconds, their ratio, and whether it is within `ratio` or `slack` seconds."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "orch_s": round(mine, 3),
        "script_s": round(other, 3),
        "ratio": round(mine / other, 2),
        "over_s": round(mine - other, 3),
        "ok": mine <= other * ratio or mine <= other + slack,
        "orch_all_s": [round(each, 3) for each in ours],
        "script_all_s": [round(each, 3) for each in theirs],
    }


def arguments(text: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds, after one to warm up")
    parser.add_argument("--sim", default="sim", metavar="NAME", help="simulated cluster, as in `orch sim up --name`")
    parser.add_argument("--project", type=Path, default=ROOT, help="the folder in which it was started")
    parser.add_argument("--json", action="store_true")
    return parser


@contextmanager
def bench(sim: str, project: Path, procs: int = PROCS) -> Iterator[Bench]:
    """Both sides set up on a simulated cluster, images built and pulled; all of it removed at the end."""
    try:
        cluster = load(sim, project)
    except OrchError as error:
        sys.exit(f"{error}; {error.hint}")
    addresses = tuple(node.address for node in load_inventory(cluster.inventory).select(None))
    with tempfile.TemporaryDirectory(prefix="orch-bench-") as folder:
        made = Bench(f"bench-{uuid.uuid4().hex[:6]}", Path(folder), cluster, addresses, procs)
        try:
            _set_up(made)
            yield made
        finally:
            _clean(made)


def _set_up(made: Bench) -> None:
    for package in PACKAGES:  # a copy: an edit in this checkout during the benchmark would change the image
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, made.folder / "checkout" / package, ignore=ignore)
    for folder in (made.ours, made.script):
        folder.mkdir()
        shutil.copy(HERE / "job" / "train.py", folder)
    target = {"backend": "ssh", "inventory": str(made.cluster.inventory), "gpus": 0, "procs": made.procs}
    config = {
        "name": made.name,
        "image": {"repository": made.repository, "variant": "cpu"},
        "run": {"port": PORT, "shm": "1g"},
        "targets": {"default": "bench", "bench": target},
    }
    (made.ours / "orch.yaml").write_text(json.dumps(config))  # JSON is YAML
    known = {"user": "orch", "key": made.cluster.key, "known_hosts": made.cluster.known_hosts}
    (made.folder / "ssh_config").write_text(SSH_CONFIG.format(**{key: f'"{value}"' for key, value in known.items()}))
    made.edit(made.ours)
    made.edit(made.script)
    run(made.orch("build"), made.orch_env(), made.ours)
    commands = json.loads(run(made.orch("build", "--dry-run", "--json"), made.orch_env(), made.ours))["commands"]
    deps = re.search(r" -t (\S+)", commands[0])
    assert deps
    (made.script / "Dockerfile").write_text(f"FROM {deps[1]}\nWORKDIR /workspace\nCOPY train.py .\n")


def _clean(made: Bench) -> None:
    made.settle()
    made.on_nodes(
        f"rm -rf ~/.orch/runs/{made.name}-* ~/.orch/checkpoints/{made.name}-*; "
        f"docker image ls -q '*/{REPOSITORY}' | sort -u | xargs -r docker image rm -f >/dev/null 2>&1",
        check=False,
    )
    argv = ["docker", "image", "ls", "-q", made.repository]
    listed = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ids := set(listed.stdout.split()):
        subprocess.run(["docker", "image", "rm", "-f", *ids], capture_output=True, check=False)
