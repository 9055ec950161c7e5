"""The launcher and torchrun on this machine, without Docker: the quickest way to try a job.

The launcher runs in a session of its own, so that it outlives the operator's process; the run
folder holds its pid together with the kernel's start time of that process, since pids come again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.backends.base import Errors, Found, NodePlan, NodeStatus, Plan, Report, Step
from orchestrator.backends.found import merge, node_status
from orchestrator.commands import docker, job, probe, report
from orchestrator.commands.shell import Raw, join, lines, path, quote
from orchestrator.connect.base import Completed, Connector, Host, Stream
from orchestrator.errors import OrchError, RemoteError
from orchestrator.specs import JobSpec, Node, NodeResult, Storage

LAUNCHER = Path(__file__).parent.parent / "node" / "launch.py"
HERE = "here"


class LocalBackend:
    """`python` is the interpreter that has torch; `workdir` is where a foreign command is looked for."""

    name = "local"

    def __init__(self, connector: Connector, *, python: str, workdir: str) -> None:
        self._connector = connector
        self._python = python
        self._workdir = workdir

    def plan(self, spec: JobSpec) -> Plan:
        spec = replace(spec, storage=_expanded(spec.storage))
        at = job.places(spec, 0, container=False)
        files = job.files(spec, 0, at, LAUNCHER.read_bytes(), container=False)
        request = probe.Request(folders=job.folders(at), docker=False)
        first = job.claim(at) + probe.preflight(request) + job.stage_script(spec, at)
        steps = (
            Step("preflight and stage", first, 45, "a tar archive"),
            Step("start", start(at.run_dir, self._python, self._workdir), 30),
        )
        work = job.job(spec, 0, at, container=False)
        return Plan(spec, (NodePlan(spec.nodes[0], 0, work, at.run_dir, steps, files),))

    def submit(self, plan: Plan, report: Report) -> None:
        node = plan.nodes[0]
        host = self._connector.connect(node.node)
        try:
            report(node.node.name, "checking")
            self._preflight(node, host)
            report(node.node.name, "starting")
            done = host.run(node.steps[1].command, timeout=node.steps[1].timeout)
            if not done.ok:
                why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
                raise RemoteError(f"the launcher did not start: {why[0]}", node=node.node.name)
        except BaseException:
            at = job.places(plan.spec, 0, container=False)
            empty = f"[ ! -e {path(at.root)}/nodes/.fresh ] || rmdir -- {path(at.checkpoints)} 2>/dev/null"
            host.run(lines(_kill(node.run_dir), empty, f"rm -rf -- {path(at.root)}"), timeout=30)
            raise

    def _preflight(self, plan: NodePlan, host: Host) -> None:
        done = host.run(plan.steps[0].command, stdin=job.archive(plan.files), timeout=plan.steps[0].timeout)
        facts = probe.facts(done.stdout)
        python = Path(os.path.expanduser(self._python))
        if not python.exists():
            raise RemoteError(
                f"{self._python} does not exist",
                node=plan.node.name,
                hint="`make setup-trainer` makes it; or set local.python",
            )
        problems = probe.judge(facts, node=plan.node.name, gpus=plan.job["gpus"], docker=False)
        if problems:
            raise problems[0]

    def discover(self, nodes: Sequence[Node], runs: str) -> tuple[list[Found], Errors]:
        host = self._connector.connect(nodes[0])
        done = host.run(docker.folders(runs, alive=_alive(Raw('"$d"'))), timeout=30)
        containers, folders = docker.parse_discover(done.stdout)
        found = merge({nodes[0].name: (containers, folders)})
        return [each for each in found if each.run.backend == self.name], {}

    def status(self, found: Found, nodes: Sequence[Node], *, timeout: float = 20) -> dict[str, NodeStatus | OrchError]:
        node = nodes[0]
        sent = time.time_ns()
        done = self._connector.connect(node).run(_read(found.dir(node.name)), timeout=timeout)
        answer = report.parse_read(done.stdout, sent, time.time_ns())
        if answer.state == "unknown":
            return {
                node.name: RemoteError("its state could not be read", node=node.name, lines=done.stderr.splitlines())
            }
        return {node.name: node_status(answer, node.name, 0)}

    def open_log(self, found: Found, node: Node, offset: int) -> Stream:
        run_dir = found.dir(node.name)
        return self._connector.connect(node).stream(report.tail_log(run_dir, offset, f"$({_alive(run_dir)})"))

    def open_log_so_far(self, found: Found, node: Node, offset: int) -> Stream:
        return self._connector.connect(node).stream(report.tail_log(found.dir(node.name), offset, "0"))

    def read_file(self, found: Found, node: Node, name: str) -> bytes:
        target = f"{path(found.dir(node.name))}/{quote(name)}"
        return self._connector.connect(node).run(f"[ ! -f {target} ] || cat {target}", timeout=60).stdout.encode()

    def watch(self, found: Found, node: Node) -> Stream:
        run_dir = found.dir(node.name)
        wait = f'pid=$({_alive(run_dir)}); exec tail --pid="$pid" -s 0.1 -f /dev/null'
        wait = f'[ "$({_alive(run_dir)})" = 0 ] || {{ {wait}; }}'
        return self._connector.connect(node).stream(report.watch(wait, _read(run_dir)))

    def ended(self, text: bytes, node: Node, index: int) -> NodeResult | None:
        now = time.time_ns()
        return report.verdict(report.parse_read(text.decode("utf-8", "replace"), now, now), node.name, index)

    def stop(self, found: Found, nodes: Sequence[Node], *, kill: bool) -> Errors:
        self._connector.connect(nodes[0]).run(report.request_stop(found.dir(nodes[0].name), kill=kill), timeout=30)
        return {}

    def end(self, found: Found, nodes: Sequence[Node], *, grace: int = 2) -> Errors:
        self._connector.connect(nodes[0]).run(_kill(found.dir(nodes[0].name)), timeout=30)
        return {}

    def remove(self, found: Found, nodes: Sequence[Node], *, files: bool = False) -> Errors:
        if files:
            self._connector.connect(nodes[0]).run(f"rm -rf -- {path(found.dir(nodes[0].name))}", timeout=60)
        return {}

    def checkpoints(self, found: Found, node: Node) -> list[str]:
        done = self._connector.connect(node).run(report.list_checkpoints(found.dir(node.name)), timeout=60)
        return done.stdout.split()

    def attach(self, found: Found, node: Node, command: Sequence[str]) -> list[str]:
        return list(command)

    def execute(self, found: Found, node: Node, command: Sequence[str], *, timeout: float = 3600) -> Completed:
        return self._connector.connect(node).run(join(command), timeout=timeout)

    def fetch(self, found: Found, node: Node, paths: Sequence[str]) -> Stream:
        return self._connector.connect(node).stream(report.archive(found.dir(node.name), paths))


def start(run_dir: str, python: str, workdir: str) -> str:
    """Starts the launcher in a session of its own and notes its pid and start time."""
    folder = path(run_dir)
    return lines(
        "set -eu",
        f"cd -- {path(workdir)}",
        f"setsid {path(python)} {folder}/launch.py {folder} </dev/null >{folder}/launcher.out 2>&1 &",
        "pid=$!",
        f"""printf '%s %s\\n' "$pid" "$(awk '{{print $22}}' /proc/"$pid"/stat)" > {folder}/pid""",
    )


def _alive(run_dir: str) -> str:
    """Prints the launcher's pid while that very process lives, else 0."""
    folder = path(run_dir)
    return (
        f"read -r p t < {folder}/pid 2>/dev/null || p=0; "
        'if [ "$p" != 0 ] && [ "$(awk \'{print $22}\' /proc/"$p"/stat 2>/dev/null)" = "$t" ]; '
        'then echo "$p"; else echo 0; fi'
    )


def _read(run_dir: str) -> str:
    folder = path(run_dir)
    probe_text = lines(
        f'if [ "$({_alive(run_dir)})" != 0 ]; then state=running; elif [ -f {folder}/pid ]; then state=exited; fi',
        f'if [ "$state" = exited ] && [ ! -f {folder}/result.json ]; then '
        f"echo 'orch.text tail'; tail -n 20 {folder}/launcher.out; echo; echo orch.end; fi",
    )
    return report.read(run_dir, probe_text)


def _kill(run_dir: str) -> str:
    return lines(f'p=$({_alive(run_dir)}); [ "$p" = 0 ] || kill "$p" 2>/dev/null || :')


def _expanded(storage: Storage) -> Storage:
    """There is no container whose mounts would give `~` a meaning: the job sees this machine's own paths."""
    return replace(
        storage,
        runs=os.path.expanduser(storage.runs),
        cache=os.path.expanduser(storage.cache),
        checkpoints=os.path.expanduser(storage.checkpoints) if storage.checkpoints else None,
    )


def local_node(gpus: int | None = None) -> Node:
    return Node(HERE, "127.0.0.1", gpus=gpus)
