"""What a node says of itself, in lines `orch.KEY VALUE`, and the readers of those lines.

Each script prints facts and judges nothing; the functions beside it judge, on recorded
output in the tests. A line `orch.text KEY` begins a block that runs to the next `orch.` line.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from orchestrator.commands.shell import join, lines, path, quote
from orchestrator.errors import LeaseError, OrchError, PreflightError
from orchestrator.specs import CONTAINER

SAY = """say() { printf 'orch.%s %s\\n' "$1" "$2"; }"""

CLOCK_TOLERANCE_S = 60.0
STALE_CREATED_S = 600


@dataclass(frozen=True)
class Request:
    """What a preflight asks of one node. Ports and addresses of 0 and "" are not asked for."""

    folders: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    image: str = ""
    listen_port: int = 0
    """A port that must be free here (the head's rendezvous port)."""
    reach: tuple[str, int] | None = None
    """An address and port that must be reachable from here (refused counts as reached)."""
    docker: bool = True


@dataclass(frozen=True)
class Facts:
    """One node's answer to a preflight."""

    values: Mapping[str, str]
    texts: Mapping[str, str]
    clock_offset_ns: int = 0

    def get(self, key: str, default: str = "") -> str:
        return self.values.get(key, default)

    def number(self, key: str, default: int = 0) -> int:
        text = self.values.get(key, "")
        return int(text) if text.lstrip("-").isdigit() else default


def parse(output: str) -> tuple[dict[str, str], dict[str, str]]:
    """The values and the text blocks of a script's output; other lines before the first block are passed over.

    >>> parse("orch.engine 20.10\\norch.text log\\na\\nb\\norch.pid 3\\n")
    ({'engine': '20.10', 'pid': '3'}, {'log': 'a\\nb\\n'})
    """
    values: dict[str, str] = {}
    texts: dict[str, str] = {}
    block: str | None = None
    for line in io.StringIO(output, newline="\n"):  # the other line ends of Unicode are plain characters here
        if line.startswith("orch."):
            key, _, value = line[5:].rstrip("\n").partition(" ")
            if key == "text":
                block = value
                texts[block] = ""
            else:
                block = None
                values[key] = value
        elif block is not None:
            texts[block] += line
    return values, texts


def facts(output: str, sent_ns: int = 0, received_ns: int = 0) -> Facts:
    """Reads a preflight's output; the clock offset is the node's time minus the middle of the exchange.

    `prompt_ns` bounds: the node's clock is read first thing, so half the round trip is an upper bound of the error.
    """
    values, texts = parse(output)
    clock = values.get("clock", "")
    offset = int(clock) - (sent_ns + received_ns) // 2 if clock.isdigit() and received_ns else 0
    return Facts(values, texts, offset)


def preflight(request: Request) -> str:
    """The script that answers `request`; it ends with status 0 whatever it finds.

    What takes time (the engine, the GPUs' driver, the way to the head) is asked all at once; each answers in lines
    that are written whole, and the one text block comes after all of them.
    """
    parts = ["set -u", "export LC_ALL=C", SAY, 'say clock "$(date +%s%N)"', 'say home "$HOME"', 'say user "$(id -un)"']
    slow = _engine(request.image) if request.docker else []
    slow.append('say gpus "$(nvidia-smi -L 2>/dev/null | grep -c "^GPU")"')
    if request.reach:
        slow.append(_reach(*request.reach))
    parts += [f"{{ {each}; }} &" for each in slow]
    parts += [
        "gpu_processes=$(nvidia-smi --query-compute-apps=pid,used_memory,name --format=csv,noheader 2>/dev/null)",
        'say cpus "$(getconf _NPROCESSORS_ONLN)"',
        "say memory_kb \"$(awk '/^MemAvailable/{print $2}' /proc/meminfo)\"",
    ]
    for folder in request.folders:
        target = path(folder)
        parts.append(
            f"if out=$(mkdir -p -- {target} 2>&1 && [ -w {target} ] 2>&1); then :; else say unwritable {target}; fi"
        )
    if request.folders:
        parts.append(f"say disk_kb \"$(df -Pk -- {path(request.folders[0])} 2>/dev/null | awk 'NR==2{{print $4}}')\"")
    for mount in request.mounts:
        parts.append(f"[ -e {path(mount)} ] || say missing {path(mount)}")
    if request.listen_port:
        parts.append(_listening(request.listen_port))
    return lines(*parts, "wait", 'printf "orch.text gpu_processes\\n%s\\norch.end\\n" "$gpu_processes"')


def _engine(image: str) -> list[str]:
    """One call of the client each: it is what costs. Only `docker version` words an engine that does not answer."""
    holder = (
        f"docker ps -a --no-trunc --filter name={quote(f'^/?{CONTAINER}$')} "
        '--format \'{{.State}}|{{.Label "orch.run"}}|{{.Label "orch.operator"}}|{{.ID}}|{{.CreatedAt}}\''
    )
    parts = [
        "if out=$(docker info --format '{{.ServerVersion}}|{{.DockerRootDir}}' 2>/dev/null) && "
        '[ -n "${out%%|*}" ]; then say engine "${out%%|*}"; '
        'say engine_disk_kb "$(df -Pk -- "${out#*|}" 2>/dev/null | awk \'NR==2{print $4}\')"; '
        "elif out=$(docker version --format '{{.Server.Version}}' 2>&1); then say engine \"$out\"; "
        'else say engine_error "$(printf %s "$out" | tail -n 1)"; fi',
        f'say holder "$({holder} 2>/dev/null | head -n 1)"',
    ]
    if image:
        parts.append(
            f"if docker image inspect {quote(image)} >/dev/null 2>&1; then say image yes; else say image no; fi"
        )
    return parts


def _listening(port: int) -> str:
    """/proc holds what listens, so no tool is needed; `0A` is LISTEN, ports are in hexadecimal."""
    return (
        f'say listening "$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | '
        f'awk \'$4=="0A" && $2 ~ /:{port:04X}$/\' | grep -c .)"'
    )


def _reach(address: str, port: int) -> str:
    """Only bash opens sockets; a refusal shows that the way is open, silence that it is not."""
    attempt = join(["timeout", "4", "bash", "-c", 'exec 3<>"/dev/tcp/$1/$2"', "bash", address, str(port)])
    return (
        f"if command -v bash >/dev/null; then out=$({attempt} 2>&1); code=$?; "
        'case "$code:$out" in 0:*|*refused*) say reach yes;; 124:*) say reach "timed out";; '
        '*) say reach "$(printf %s "$out" | tail -n 1)";; esac; fi'
    )


def stage(root: str) -> str:
    """Unpacks the tar archive on standard input into the run's root folder, readable by its owner only."""
    target = path(root)
    return lines(
        "umask 077",
        f"if out=$(mkdir -p -- {target} 2>&1 && tar -xmf - -C {target} 2>&1); then say staged {target}; "
        'else say stage_error "$(printf %s "$out" | tail -n 1)"; fi',
    )


def stray_gpu_processes(found: Facts) -> list[str]:
    return [line for line in found.texts.get("gpu_processes", "").splitlines() if line.strip()]


def judge(
    found: Facts,
    *,
    node: str,
    gpus: int = 0,
    docker: bool = True,
    image: str = "",
    port: int = 0,
    reach: tuple[str, int] | None = None,
    disk_gb: float = 1.0,
    lease: bool = True,
) -> list[OrchError]:
    """Everything that makes this node unfit, in the order in which it should be mended; empty if it is fit."""
    problems: list[OrchError] = []

    def unfit(message: str, hint: str, kind: type[OrchError] = PreflightError) -> None:
        problems.append(kind(message, node=node, hint=hint))

    if docker and (error := found.get("engine_error")):
        unfit(f"the Docker engine does not answer: {error}", _engine_hint(error, found.get("user")))
    if lease and docker and (holder := found.get("holder")):
        state, run, operator, _, created = (holder.split("|") + [""] * 4)[:5]
        old = state in ("exited", "dead") or (state == "created" and _age_s(found, created) >= STALE_CREATED_S)
        if not (run and old):
            run = run or f"a container named {CONTAINER!r} that is not a run"
            unfit(
                f"busy: {run} ({state}, started by {operator or 'unknown'})",
                "wait for it, stop it with `orch stop`, or choose other nodes: --nodes a,b",
                LeaseError,
            )
    if found.number("gpus") < gpus:
        unfit(
            f"{found.number('gpus')} GPUs found, {gpus} asked for",
            "check `nvidia-smi -L` there, or ask for fewer with --gpus (0 trains on the CPU)",
        )
    if gpus and (stray := stray_gpu_processes(found)):
        unfit(f"{len(stray)} other process(es) hold its GPUs: {stray[0]}", "end them, or choose other nodes")
    if folder := found.get("unwritable"):
        unfit(f"cannot write to {folder}", "check its owner and mode, or set storage.runs in orch.yaml")
    if source := found.get("missing"):
        unfit(f"the mount source {source} does not exist", "create it there, or correct run.mounts in orch.yaml")
    for key, where in (("disk_kb", "the run folder's disk"), ("engine_disk_kb", "the engine's disk")):
        free = found.number(key, -1)
        need = disk_gb if not (key == "engine_disk_kb" and found.get("image") == "yes") else 0.2
        if 0 <= free < need * 1e6:
            unfit(
                f"{where} has {free / 1e6:.1f} GB free, {need:g} GB needed",
                "free some: `orch prune`, `docker image prune`",
            )
    if abs(found.clock_offset_ns) > CLOCK_TOLERANCE_S * 1e9:
        unfit(
            f"its clock is {found.clock_offset_ns / 1e9:+.0f} s off this machine's",
            "set both by NTP: `timedatectl set-ntp true`",
        )
    if port and found.number("listening"):
        unfit(f"port {port} (rendezvous) is taken", "end what listens there, or set another run.port in orch.yaml")
    if reach and found.get("reach", "yes") != "yes":
        unfit(
            f"cannot reach the head node at {reach[0]}:{reach[1]}: {found.get('reach')}",
            "open that port between the nodes, or set `private:` in the inventory to the address they share",
        )
    if error := found.get("stage_error"):
        unfit(f"cannot write the run's files: {error}", "check the disk and storage.runs in orch.yaml")
    return problems


def _age_s(found: Facts, created: str) -> float:
    """Seconds since `created` (`2026-01-31 12:00:00 +0100 CET`) by the node's own clock; 0 if that cannot be told."""
    try:
        moment = datetime.strptime(created[:25], "%Y-%m-%d %H:%M:%S %z")
        return int(found.get("clock")) / 1e9 - moment.timestamp()
    except ValueError:
        return 0.0


def _engine_hint(error: str, user: str) -> str:
    if "permission denied" in error.lower():
        return f"add {user or 'the user'} to the docker group there: `sudo usermod -aG docker {user or 'USER'}`"
    if "not found" in error:
        return "install a Docker engine there"
    return "start it there: `sudo systemctl start docker`"
