"""Bare nodes with sshd and a Docker engine: three remote commands a node start a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from orchestrator.backends.base import Errors, Found, NodePlan, NodeStatus, Plan, Report, Step
from orchestrator.backends.found import merge, node_status
from orchestrator.commands import docker, job, probe, report
from orchestrator.commands.shell import join, lines, path, quote
from orchestrator.connect.base import Completed, Connector, Host, Stream
from orchestrator.connect.fanout import fanout, raise_failures
from orchestrator.errors import LeaseError, OrchError, PreflightError, RegistryError, RemoteError
from orchestrator.specs import (
    LABEL_DIR,
    LABEL_INDEX,
    LABEL_JOB,
    LABEL_NODE,
    LABEL_OPERATOR,
    LABEL_RUN,
    LABEL_SCHEMA,
    SCHEMA,
    ImageRef,
    JobSpec,
    Node,
    NodeResult,
    Secret,
)

LAUNCHER = Path(__file__).parent.parent / "node" / "launch.py"
PREFLIGHT_S, PULL_S, START_S, STOP_S = 45.0, 3600.0, 120.0, 30.0
IMAGE_DISK_GB = 4.0


class SshBackend:
    """`credentials` gives a registry's login as a Docker config.json, None where the registry is open."""

    name = "ssh"

    def __init__(
        self, connector: Connector, *, credentials: Callable[[ImageRef], Secret | None] = lambda image: None
    ) -> None:
        self._connector = connector
        self._credentials = credentials

    # -- plan ---------------------------------------------------------------------------------

    def plan(self, spec: JobSpec) -> Plan:
        launcher = LAUNCHER.read_bytes()
        return Plan(spec, tuple(self._plan_node(spec, index, launcher) for index in range(len(spec.nodes))))

    def _plan_node(self, spec: JobSpec, index: int, launcher: bytes) -> NodePlan:
        node, at = spec.nodes[index], job.places(spec, index)
        files = job.files(spec, index, at, launcher)
        secret = ", secrets.env" if spec.secrets else ""
        first = job.claim(at) + probe.preflight(_request(spec, index, at)) + job.stage_script(spec, at)
        second = docker.pull_and_create(
            spec.image.pinned,
            _create(spec, index, at),
            run_dir=at.run_dir,
            storage_check=docker.check_storage(at.root, len(spec.nodes), spec.storage.kind),
            credentials=False,
            patient=node is not min(spec.nodes, key=lambda each: (each.private, each.port, each.name)),
        )
        steps = (
            Step("preflight and stage", first, PREFLIGHT_S, f"a tar archive: job.json, launch.py{secret}"),
            Step("pull and create", second, PULL_S),
            Step("start", docker.start(at.run_dir), START_S),
        )
        return NodePlan(node, index, job.job(spec, index, at), at.run_dir, steps, files)

    # -- submit -------------------------------------------------------------------------------

    def submit(self, plan: Plan, report: Report) -> None:
        by_name = {each.node.name: each for each in plan.nodes}
        nodes = [each.node for each in plan.nodes]
        try:
            facts = self._all(nodes, by_name, self._preflight, report, "checking", PREFLIGHT_S, "preflight")
            self._all(
                nodes,
                by_name,
                partial(self._create, facts),
                report,
                "preparing the image and container",
                PULL_S,
                "pull and create",
            )
            self._all(nodes, by_name, self._start, report, "starting", START_S, "start")
        except BaseException:
            self._rollback(plan, report)
            raise

    def _all(
        self,
        nodes: Sequence[Node],
        plans: Mapping[str, NodePlan],
        action: Callable[[NodePlan, JobSpec, Host], object],
        tell: Report,
        doing: str,
        deadline: float,
        what: str,
    ) -> dict:
        def one(node: Node) -> object:
            tell(node.name, doing)
            return action(plans[node.name], self._connector.connect(node))

        results = fanout(nodes, one, deadline=deadline + 20, what=what)
        return raise_failures(results, f"the run was not started: {what} failed")

    def _preflight(self, plan: NodePlan, host: Host) -> probe.Facts:
        step = plan.steps[0]
        sent = time.time_ns()
        done = host.run(step.command, stdin=job.archive(plan.files), timeout=step.timeout)
        facts = probe.facts(done.stdout, sent, time.time_ns())
        if not done.ok:
            raise _failed("preflight", done)
        spec = plan.job
        problems = probe.judge(
            facts,
            node=plan.node.name,
            gpus=spec["gpus"],
            image=spec["image"],
            port=spec["port"] if facts.get("listening") else 0,
            reach=_reach(spec) if plan.index else None,
            disk_gb=IMAGE_DISK_GB,
        )
        if problems:
            raise problems[0]
        return facts

    def _create(self, facts: Mapping[str, probe.Facts], plan: NodePlan, host: Host) -> None:
        step, image = plan.steps[1], str(plan.job["image"])
        ref = _parse_pinned(image)
        present = facts[plan.node.name].get("image") == "yes"
        command, stdin = step.command, None
        forward = nullcontext(0)
        if not present and ref.local_port:
            forward = host.forward(ref.local_port, ("127.0.0.1", ref.local_port))
        elif not present and (login := self._credentials(ref)):
            command = _with_credentials(command, image)
            stdin = login.reveal().encode()
        with forward as port:
            if port and port != ref.local_port:
                command = command.replace(f"{ref.registry}/", f"localhost:{port}/")
            done = host.run(command, stdin=stdin, timeout=step.timeout)
        if not done.ok:
            raise _create_error(done, image, plan)

    def _start(self, plan: NodePlan, host: Host) -> None:
        done = host.run(plan.steps[2].command, timeout=plan.steps[2].timeout)
        if not done.ok:
            raise RemoteError(
                f"the container did not start: {docker.refusal(done.stderr) or _last(done)}",
                hint="if it names a mount or a device, see run.mounts in orch.yaml and what that node has there",
            )

    def _rollback(self, plan: Plan, tell: Report) -> None:
        """Twice: a command that was still on its way when the first pass ran finds its folder gone, or is cleared."""
        spec, at = plan.spec, job.places(plan.spec, 0)
        undo = docker.rollback(spec.run_id, at.root, at.checkpoints)

        def one(each: Node) -> None:
            tell(each.name, "rolling back")
            host = self._connector.connect(each, timeout=5)
            for _ in range(2):
                done = host.run(undo, timeout=STOP_S)
            if not done.ok:
                raise _failed("rolling back", done)

        left = fanout([each.node for each in plan.nodes], one, deadline=STOP_S, what="roll back")
        for name, outcome in left.items():
            tell(name, f"not rolled back: {outcome}" if isinstance(outcome, OrchError) else "rolled back")

    # -- read and steer -----------------------------------------------------------------------

    def discover(self, nodes: Sequence[Node], runs: str) -> tuple[list[Found], Errors]:
        def one(node: Node) -> tuple[list[dict], list[dict]]:
            done = self._connector.connect(node).run(docker.discover(runs), timeout=PREFLIGHT_S)
            if not done.ok:
                raise _failed("listing runs", done)
            return docker.parse_discover(done.stdout)

        return _split(fanout(nodes, one, deadline=PREFLIGHT_S, what="list runs"), merge)

    def status(self, found: Found, nodes: Sequence[Node], *, timeout: float = 20) -> dict[str, NodeStatus | OrchError]:
        order = {name: index for index, name in enumerate(found.run.nodes)}

        def one(node: Node) -> NodeStatus:
            sent = time.time_ns()
            host = self._connector.connect(node, timeout=min(timeout, 15))
            done = host.run(_read(found.dir(node.name)), timeout=timeout)
            answer = report.parse_read(done.stdout, sent, time.time_ns())
            if answer.state == "unknown" and not answer.engine_error:
                raise _failed("reading the run's state", done)
            return node_status(answer, node.name, order.get(node.name, 0))

        return fanout(nodes, one, deadline=timeout + 5, what=f"status of {found.run.id}")

    def open_log(self, found: Found, node: Node, offset: int) -> Stream:
        run_dir = found.dir(node.name)
        return self._connector.connect(node).stream(report.tail_log(run_dir, offset, docker.pid(run_dir)))

    def open_log_so_far(self, found: Found, node: Node, offset: int) -> Stream:
        return self._connector.connect(node).stream(report.tail_log(found.dir(node.name), offset, "0"))

    def read_file(self, found: Found, node: Node, name: str) -> bytes:
        target = f"{path(found.dir(node.name))}/{quote(name)}"
        done = self._connector.connect(node).run(f"[ ! -f {target} ] || cat {target}", timeout=60)
        if not done.ok:
            raise _failed(f"reading {name}", done)
        return done.stdout.encode()

    def watch(self, found: Found, node: Node) -> Stream:
        run_dir = found.dir(node.name)
        return self._connector.connect(node).stream(report.watch(docker.wait(run_dir), _read(run_dir)))

    def ended(self, text: bytes, node: Node, index: int) -> NodeResult | None:
        now = time.time_ns()
        answer = report.parse_read(text.decode("utf-8", "replace"), now, now)
        return report.verdict(answer, node.name, index)

    def stop(self, found: Found, nodes: Sequence[Node], *, kill: bool) -> Errors:
        def one(node: Node) -> None:
            command = report.request_stop(found.dir(node.name), kill=kill)
            done = self._connector.connect(node, timeout=5).run(command, timeout=STOP_S)
            if not done.ok:
                raise _failed("asking for a stop", done)

        return _errors(fanout(nodes, one, deadline=STOP_S, what="ask for a stop"))

    def end(self, found: Found, nodes: Sequence[Node], *, grace: int = 2) -> Errors:
        """Ends the containers from outside, for launchers that did not heed `stop`."""

        def one(node: Node) -> None:
            self._connector.connect(node, timeout=5).run(
                docker.kill(found.dir(node.name), grace), timeout=grace + STOP_S
            )

        return _errors(fanout(nodes, one, deadline=grace + STOP_S, what="end the container"))

    def remove(self, found: Found, nodes: Sequence[Node], *, files: bool = False) -> Errors:
        def one(node: Node) -> None:
            command = docker.remove_ended(found.run.id, found.dir(node.name))
            if files:
                command = lines("set -e", command, f"rm -rf -- {path(found.dir(node.name))}")
            done = self._connector.connect(node, timeout=5).run(command, timeout=STOP_S)
            if not done.ok:
                raise _failed("removing the container", done)

        return _errors(fanout(nodes, one, deadline=STOP_S, what="remove the ended container"))

    def checkpoints(self, found: Found, node: Node) -> list[str]:
        done = self._connector.connect(node).run(report.list_checkpoints(found.dir(node.name)), timeout=60)
        return done.stdout.split()

    # -- beside the job -----------------------------------------------------------------------

    def attach(self, found: Found, node: Node, command: Sequence[str]) -> list[str]:
        target = f"{node.user}@{node.address}" if node.user else node.address
        argv = ["ssh", "-t", "-p", str(node.port), "-o", "StrictHostKeyChecking=yes"]
        argv += ["-i", node.key] if node.key else []
        argv += ["-o", f"UserKnownHostsFile={node.known_hosts}"] if node.known_hosts else []
        argv += ["-J", node.jump] if node.jump else []
        return [*argv, target, self.attach_command(found, node, command, terminal=True)]

    def attach_command(self, found: Found, node: Node, command: Sequence[str], *, terminal: bool) -> str:
        """`docker exec` of `command` in the run's container, as text for the node's shell."""
        flags = ["-it"] if terminal else []
        words = ["docker", "exec", *flags, docker.container_id(found.dir(node.name)), *command]
        return join(words)

    def execute(self, found: Found, node: Node, command: Sequence[str], *, timeout: float = 3600) -> Completed:
        text = self.attach_command(found, node, command, terminal=False)
        return self._connector.connect(node).run(text, timeout=timeout)

    def fetch(self, found: Found, node: Node, paths: Sequence[str]) -> Stream:
        return self._connector.connect(node).stream(report.archive(found.dir(node.name), paths))


def _request(spec: JobSpec, index: int, at: job.Places) -> probe.Request:
    several = len(spec.nodes) > 1
    return probe.Request(
        folders=job.folders(at),
        mounts=tuple(each.source for each in spec.mounts),
        image=spec.image.pinned,
        listen_port=spec.port if several and index == 0 and spec.launcher == "torchrun" else 0,
        reach=(spec.head.private, spec.port) if several and index else None,
    )


def _create(spec: JobSpec, index: int, at: job.Places) -> str:
    node = spec.nodes[index]
    summary = {
        "name": spec.name,
        "attempt": spec.attempt,
        "backend": spec.backend,
        "image": spec.image.pinned,
        "node_names": [each.name for each in spec.nodes],
    }
    labels = {
        LABEL_RUN: spec.run_id,
        LABEL_NODE: node.name,
        LABEL_INDEX: str(index),
        LABEL_OPERATOR: spec.operator,
        LABEL_SCHEMA: str(SCHEMA),
        LABEL_DIR: at.run_dir,
        LABEL_JOB: json.dumps(summary, separators=(",", ":")),
    }
    mounts = [
        docker.mount(at.root, at.job_root),
        docker.mount(at.checkpoints, at.job_checkpoints),
        docker.mount(at.cache, at.job_cache),
        *(docker.mount(each.source, each.target, readonly=each.readonly) for each in spec.mounts),
    ]
    return docker.create_argv(
        spec.image.pinned,
        [f"{at.job_run_dir}/launch.py", at.job_run_dir],
        run_dir=at.run_dir,
        mounts=mounts,
        labels=labels,
        shm=spec.shm,
        gpus=spec.gpus,
        stop_timeout=job.STOP_GRACE_S + spec.grace + 10,
    )


def _read(run_dir: str) -> str:
    return report.read(run_dir, docker.probe(run_dir))


def _reach(spec: Mapping) -> tuple[str, int]:
    return spec["head"], spec["port"]


def _parse_pinned(image: str) -> ImageRef:
    repository, _, digest = image.partition("@")
    if digest:
        return ImageRef(repository, digest=digest)
    repository, colon, tag = image.rpartition(":")
    return ImageRef(repository, tag) if colon and "/" not in tag else ImageRef(image)


def _with_credentials(command: str, image: str) -> str:
    return command.replace(docker.pull(image, credentials=False), docker.pull(image, credentials=True))


def _last(done: Completed) -> str:
    text = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
    return text[-1].removeprefix("Error response from daemon: ") if text else f"exit code {done.returncode}"


def _failed(what: str, done: Completed) -> RemoteError:
    return RemoteError(f"{what} failed: {_last(done)}", lines=done.stderr.splitlines()[-10:])


def _create_error(done: Completed, image: str, plan: NodePlan) -> OrchError:
    """Why pull or create failed; the engine gives no exit code to tell by, so its sentence is read."""
    text, why = done.stderr.lower(), _last(done)
    if done.returncode == 41:
        marks = probe.parse(done.stdout)[0].get("marks", "?")
        shared = marks != "1"
        return PreflightError(
            f"its runs folder is {'shared with' if shared else 'not shared with'} the other nodes, "
            "which is not what orch.yaml says",
            hint=f"set storage.kind: {'shared' if shared else 'local'} in orch.yaml",
        )
    if "is already in use by container" in text:
        return LeaseError(
            "another run took the node while this one was starting",
            hint="`orch ps` shows it; wait for it, or choose other nodes: --nodes a,b",
        )
    if "no space left" in text:
        return PreflightError(f"the disk is full: {why}", hint="free some: `orch prune`, `docker image prune`")
    if any(word in text for word in ("manifest unknown", "not found: manifest", "pull access denied", "unauthorized")):
        return RegistryError(f"image {image} cannot be pulled: {why}", hint="`orch build` pushes it; check the login")
    if any(word in text for word in ("connection refused", "i/o timeout", "no such host", "dial tcp", "eof")):
        return RegistryError(
            f"the registry of {image} does not answer: {why}",
            hint="is it up? `orch sim up` or `orch registry up` starts a local one",
        )
    return RemoteError(f"pull and create failed: {why}", lines=done.stderr.splitlines()[-10:])


def _errors(results: Mapping[str, object]) -> Errors:
    return {name: outcome for name, outcome in results.items() if isinstance(outcome, OrchError)}


def _split(results: Mapping[str, object], build: Callable) -> tuple[list[Found], Errors]:
    errors = _errors(results)
    return build({name: answer for name, answer in results.items() if name not in errors}), errors
