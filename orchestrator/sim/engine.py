"""The Docker engine of this machine: found, or installed and started where we may, and stopped again.

Only an engine that we started ourselves is ever stopped: its process id, start time and command line are kept
in the operator's state folder and compared first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import DeadlineError, PreflightError
from orchestrator.sim import machine
from orchestrator.sim.image import disk_free
from orchestrator.sim.process import Say, docker, run, say, wait_until

DISK_NEEDED = 12 * 10**9
DISK_NEEDED_WARM = 2 * 10**9
"""With the images already there, only the nodes' own writes are to come."""
MEMORY_NEEDED = int(3.7 * 10**9)
"""A machine sold as 4 GB reports a little less."""

_BRIDGE = "docker0"
_START_SECONDS = 60.0
_STOP_SECONDS = 40.0


@dataclass(frozen=True)
class Engine:
    """What the answering engine says of itself; `reachable`: whether container addresses can be reached."""

    id: str
    root: str
    memory: int
    reachable: bool


@dataclass(frozen=True)
class Started:
    """An engine that we started by hand; kept in `engine.json` so that exactly it can be stopped."""

    pid: int
    start_time: int
    cmdline: tuple[str, ...]
    root: str
    run_dir: str
    log: str


def ensure_engine(say: Say = say) -> None:
    """Makes `docker` answer: starts or installs an engine where that is possible, else says what to install.

    Raises PreflightError, or DeadlineError when a started engine does not answer in time.
    """
    problem = _problem()
    if problem is None:
        return
    if "permission denied" in problem.lower():
        raise PreflightError(
            "the Docker engine refuses this user: permission denied on its socket",
            hint="sudo usermod -aG docker $USER, then log in again",
        )
    if os.environ.get("DOCKER_HOST"):
        raise PreflightError(
            f"no Docker engine answers at DOCKER_HOST={os.environ['DOCKER_HOST']}",
            hint="start it, or unset DOCKER_HOST to use an engine on this machine",
        )
    if not machine.is_linux():
        raise PreflightError("no Docker engine answers", hint="install and start Docker Desktop, then run this again")
    if not machine.may_install():
        raise PreflightError("no Docker engine answers", hint=_install_hint())
    check_machine(Path("/var/lib/docker"), DISK_NEEDED)
    if shutil.which("dockerd") is None or shutil.which("docker") is None:
        packages = ["docker.io"]
        if run(["apt-cache", "show", "docker-cli"], check=False).returncode == 0:
            packages.append("docker-cli")
        machine.apt_install([*packages, "iptables", "ca-certificates"], say)
    _start(say)


def _problem() -> str | None:
    """Why no engine answers, or None if one does."""
    if shutil.which("docker") is None:
        return "there is no docker on this machine"
    try:
        asked = docker("version", "--format", "{{.Server.Version}}", check=False, timeout=20)
    except DeadlineError:
        return "the engine accepts connections but does not answer"
    return None if asked.returncode == 0 and asked.stdout.strip() else asked.stderr.strip() or "no answer"


def _install_hint() -> str:
    if shutil.which("dockerd"):
        return "start it: sudo systemctl start docker (or: sudo dockerd), with your user in the group docker"
    if machine.has_apt():
        return "sudo apt-get install docker.io && sudo usermod -aG docker $USER, then log in again"
    return "install Docker Engine 20.10 or newer with its buildx and compose plugins, and start it"


def describe() -> Engine:
    """Asks the engine about itself. Raises PreflightError."""
    info = json.loads(docker("info", "--format", "{{json .}}", timeout=30, what="ask the engine").stdout)
    desktop = "Docker Desktop" in info.get("OperatingSystem", "")
    rootless = any("rootless" in option for option in info.get("SecurityOptions") or ())
    local = machine.is_linux() and not desktop and not rootless
    return Engine(info.get("ID", ""), info.get("DockerRootDir", ""), int(info.get("MemTotal", 0)), local)


def check_machine(root: Path, disk: int, memory: int | None = None) -> None:
    """Raises PreflightError unless this machine has `disk` bytes free at `root` and enough memory."""
    if machine.is_linux():
        free = disk_free(root)
        if free < disk:
            raise PreflightError(
                f"too little disk: {free / 1e9:.1f} GB free at {root}, {disk / 1e9:.0f} GB are needed",
                hint="free some space there (docker system prune may help), or move the engine's data-root",
            )
        memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory is not None and memory < MEMORY_NEEDED:
        raise PreflightError(
            f"too little memory: {memory / 1e9:.1f} GB, 4 GB are needed",
            hint="use a larger machine, or give Docker more memory in its settings",
        )


def _start(say: Say) -> None:
    """Starts an installed engine: by systemd where it runs, else by hand."""
    if Path("/run/systemd/system").is_dir():
        say("starting the Docker engine (systemctl start docker)")
        run(["systemctl", "start", "docker"], timeout=_START_SECONDS, what="start the Docker engine")
        wait_until(lambda: _problem() is None, "the Docker engine's answer", deadline=_START_SECONDS)
        return
    # Debian's package may have started it in the old way; give that a moment before a second one is started.
    if Path("/var/run/docker.pid").exists():
        try:
            wait_until(lambda: _problem() is None, "the Docker engine's answer", deadline=3)
            return
        except DeadlineError:
            pass
    log = machine.state_dir() / "dockerd.log"
    say(f"starting the Docker engine by hand (no systemd here; its log: {log})")
    start_by_hand(["dockerd"], root="/var/lib/docker", run_dir="/var/run/docker", log=log, record=record_file())
    hint = f"see the end of {log}"
    wait_until(lambda: _problem() is None, "the Docker engine's answer", deadline=_START_SECONDS, hint=hint)


def record_file() -> Path:
    return machine.state_dir() / "engine.json"


def start_by_hand(argv: Sequence[str], *, root: str, run_dir: str, log: Path, record: Path) -> Started:
    """Starts `dockerd` in a session of its own, its output to `log`, and writes down which process that is."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    # Right after exec the kernel shows no arguments yet; by them the process is recognized later.
    wait_until(lambda: bool(_cmdline(child.pid)) or child.poll() is not None, "dockerd's start", deadline=5, every=0.01)
    started = Started(child.pid, _start_time(child.pid) or 0, tuple(argv), root, run_dir, str(log))
    record.write_text(json.dumps(asdict(started)))
    return started


def stop_ours(record: Path | None = None, say: Say = say) -> bool:
    """Stops the engine that `start_by_hand` wrote down, with its containerd and its mounts.

    False if there is none of ours (anybody else's engine is left alone). Raises DeadlineError.
    """
    record = record or record_file()
    if not record.exists():
        return False
    fields = json.loads(record.read_text())
    ours = Started(**{**fields, "cmdline": tuple(fields["cmdline"])})
    running = _is_ours(ours)
    containerd = _containerd(ours)
    if running:
        say(f"stopping the Docker engine that was started here (process {ours.pid})")
        os.kill(ours.pid, 15)
        try:
            wait_until(lambda: not _is_ours(ours), "the engine's end", deadline=_STOP_SECONDS)
        except DeadlineError:
            if _is_ours(ours):
                os.kill(ours.pid, 9)
            wait_until(lambda: not _is_ours(ours), "the engine's end after SIGKILL", deadline=10)
    if containerd and _cmdline(containerd) and ours.run_dir in " ".join(_cmdline(containerd)):
        os.kill(containerd, 15)
        wait_until(lambda: not _cmdline(containerd), "the end of the engine's containerd", deadline=15)
    if running or not _answers_elsewhere(ours):
        for point in mounts_below((ours.root, ours.run_dir), Path("/proc/self/mounts").read_text()):
            run(["umount", "-l", point], check=False, timeout=20)
    if running and not answers():
        run(["ip", "link", "delete", _BRIDGE], check=False, timeout=20)  # an engine leaves its bridge behind
    record.unlink(missing_ok=True)
    Path(ours.log).unlink(missing_ok=True)
    return running


def _answers_elsewhere(ours: Started) -> bool:
    """Whether another engine has taken over the same folders (then their mounts are its own)."""
    return bool(_containerd(ours)) or (ours.root == "/var/lib/docker" and _problem() is None)


def _is_ours(ours: Started) -> bool:
    return _cmdline(ours.pid) == ours.cmdline and _start_time(ours.pid) == ours.start_time


def _cmdline(pid: int) -> tuple[str, ...]:
    """The arguments of a living process; empty for a dead one or a zombie."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ()
    return tuple(word.decode(errors="replace") for word in words[:-1])


def _start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started: with the number it names one process for good."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19])


def _containerd(ours: Started) -> int | None:
    """The containerd that the engine started as its own, by its pid file and command line."""
    try:
        pid = int((Path(ours.run_dir) / "containerd" / "containerd.pid").read_text())
    except (OSError, ValueError):
        return None
    return pid if "containerd" in " ".join(_cmdline(pid)[:1]) else None


def mounts_below(folders: Sequence[str], table: str) -> list[str]:
    """The mount points below `folders` in /proc/self/mounts (`table`), deepest first. Pure."""
    real = tuple(os.path.realpath(folder).rstrip("/") + "/" for folder in folders)
    points = []
    for line in table.splitlines():
        point = line.split()[1].encode().decode("unicode_escape")
        if (point + "/").startswith(real):
            points.append(point)
    return sorted(points, key=lambda point: point.count("/"), reverse=True)


def answers() -> bool:
    """Whether a Docker engine answers."""
    return _problem() is None
