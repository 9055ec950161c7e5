"""What is staged on a node before a run starts: where it lies, job.json, secrets.env, the archive."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.commands.probe import stage
from orchestrator.commands.shell import lines, path, quote
from orchestrator.commands.torchrun import torchrun_args
from orchestrator.specs import SCHEMA, JobSpec, safe_name

STOP_GRACE_S = 120
RENDEZVOUS_TIMEOUT_S = 120


@dataclass(frozen=True)
class Places:
    """The folders of a run on one node, as the node names them and as the job sees them."""

    root: str
    run_dir: str
    checkpoints: str
    cache: str
    job_root: str
    job_run_dir: str
    job_checkpoints: str
    job_cache: str

    @property
    def job_home(self) -> str:
        return f"{self.job_cache}/home"


def places(spec: JobSpec, index: int, *, container: bool = True) -> Places:
    """On shared storage each node has a folder of its own below the run's, so that logs do not meet."""
    storage = spec.storage
    series = safe_name(spec.series)
    below = f"/{safe_name(spec.nodes[index].name)}" if storage.kind == "shared" else ""
    root = f"{storage.runs.rstrip('/')}/{spec.run_id}"
    checkpoints = f"{storage.checkpoint_root.rstrip('/')}/{series}"
    cache = storage.cache.rstrip("/")
    if not container:
        return Places(root, root + below, checkpoints, cache, root, root + below, checkpoints, cache)
    return Places(
        root=root,
        run_dir=root + below,
        checkpoints=checkpoints,
        cache=cache,
        job_root=f"/orch/runs/{spec.run_id}",
        job_run_dir=f"/orch/runs/{spec.run_id}{below}",
        job_checkpoints=f"/orch/checkpoints/{series}",
        job_cache="/orch/cache",
    )


def environment(spec: JobSpec, at: Places, *, container: bool = True) -> dict[str, str]:
    """The job's public environment. A container run by uid has no home and no name unless it is told."""
    env = {
        "ORCH_RUN_ID": spec.run_id,
        "ORCH_RUN_DIR": at.job_run_dir,
        "ORCH_CHECKPOINT_DIR": at.job_checkpoints,
        "ORCH_CACHE_DIR": at.job_cache,
        "ORCH_ATTEMPT": str(spec.attempt),
    }
    if container:
        env |= {
            "HOME": at.job_home,
            "USER": "orch",
            "LOGNAME": "orch",
            "XDG_CACHE_HOME": at.job_cache,
            "HF_HOME": f"{at.job_cache}/huggingface",
            "TORCHINDUCTOR_CACHE_DIR": f"{at.job_cache}/inductor",
            "TRITON_CACHE_DIR": f"{at.job_cache}/triton",
        }
    env["TOKENIZERS_PARALLELISM"] = "false"
    return env | dict(spec.env)


def job(spec: JobSpec, index: int, at: Places, *, container: bool = True) -> dict[str, Any]:
    """The content of job.json for node `index`, as docs/contracts.md fixes it."""
    node = spec.nodes[index]
    return {
        "schema": SCHEMA,
        "run": spec.run_id,
        "name": spec.name,
        "series": spec.series,
        "attempt": spec.attempt,
        "backend": spec.backend,
        "operator": spec.operator,
        "image": spec.image.pinned if spec.image else None,
        "node": node.name,
        "index": index,
        "nodes": len(spec.nodes),
        "node_names": [each.name for each in spec.nodes],
        "procs": spec.procs,
        "gpus": spec.gpus,
        "address": node.private if container or len(spec.nodes) > 1 else "",
        "head": spec.head.private,
        "port": spec.port,
        "launcher": spec.launcher,
        "torchrun": list(torchrun_args(spec, index)) if spec.launcher == "torchrun" else [],
        "command": list(spec.command),
        "stop": spec.stop,
        "grace": spec.grace,
        "stop_grace": max(STOP_GRACE_S, spec.grace),
        "rendezvous_timeout": RENDEZVOUS_TIMEOUT_S,
        "env": environment(spec, at, container=container),
    }


def secrets_file(spec: JobSpec) -> bytes:
    """`NAME=<JSON string>` a line: any value fits on one line and needs no shell to be read."""
    return "".join(f"{name}={json.dumps(value.reveal())}\n" for name, value in spec.secrets.items()).encode()


def files(spec: JobSpec, index: int, at: Places, launcher: bytes, *, container: bool = True) -> dict[str, bytes]:
    """Paths below the run's root folder → content."""
    prefix = at.run_dir[len(at.root) :].lstrip("/")
    prefix = f"{prefix}/" if prefix else ""
    content = {
        f"{prefix}job.json": (json.dumps(job(spec, index, at, container=container)) + "\n").encode(),
        f"{prefix}launch.py": launcher,
        f"nodes/{safe_name(spec.nodes[index].name)}": b"",
    }
    if spec.secrets:
        content[f"{prefix}secrets.env"] = secrets_file(spec)
    return content


def archive(content: Mapping[str, bytes]) -> bytes:
    """A tar archive of `content`, every file readable by its owner only."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = 0o600
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def claim(at: Places) -> str:
    """The beginning of the first command: makes the run's root, with `nodes/.fresh` if the series' folder is new.

    So a rollback knows what it may remove; and when it has removed the root, `stage_script` stages nothing more.
    """
    root = path(at.root)
    return lines(
        f"claimed=; fresh=; [ -d {path(at.checkpoints)} ] || fresh=yes",
        f"if (umask 077; mkdir -p -- {root}/nodes) 2>/dev/null; then",
        f'  claimed=yes; [ -z "$fresh" ] || : > {root}/nodes/.fresh',
        "fi",
    )


def stage_script(spec: JobSpec, at: Places) -> str:
    """Unpacks the archive and makes the folders that the job expects in its run folder."""
    gone = lines(
        f'if [ "${{claimed:-}}" = yes ] && [ ! -d {path(at.root)} ]; then',
        f'  [ -z "$fresh" ] || rmdir -- {path(at.checkpoints)} 2>/dev/null',
        '  say stage_error "it was rolled back"; exit 0',
        "fi",
    )
    default = spec.storage.checkpoints is None
    up = "../" * (2 + (at.run_dir != at.root))
    target = quote(f"{up}checkpoints/{safe_name(spec.series)}") if default else path(at.checkpoints)
    run = path(at.run_dir)
    return gone + stage(at.root) + lines(
        f"if out=$(mkdir -p -- {run}/events {run}/errors {run}/tensorboard 2>&1 "
        f"&& ln -sfn -- {target} {run}/checkpoints 2>&1); then :; "
        'else say stage_error "$(printf %s "$out" | tail -n 1)"; fi',
    )


def folders(at: Places) -> tuple[str, ...]:
    """The folders that must exist and be writable before the container is created."""
    return (at.root.rpartition("/")[0], at.checkpoints, f"{at.cache}/home")
