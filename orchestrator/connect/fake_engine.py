"""The engine of the fake node: containers as JSON, each run by a supervising process of its own.

Standard library only: it is imported by every `docker` command of a fake node.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import fcntl
import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.connect.fake_client import Failure

NEVER = "0001-01-01T00:00:00Z"


def daemon(message: str) -> Failure:
    return Failure(f"Error response from daemon: {message}")


def folder() -> Path:
    return Path(os.environ["FAKE_DOCKER"])


@contextlib.contextmanager
def state(engine: Path | None = None) -> Iterator[dict[str, Any]]:
    """The engine's state, locked; written back if the block ends well."""
    engine = engine or folder()
    with (engine / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = engine / "state.json"
        data = json.loads(file.read_text())
        before = json.dumps(data)
        yield data
        if json.dumps(data) != before:
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps(data))
            temporary.replace(file)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def normal(ref: str) -> str:
    """`ref` with the tag that Docker assumes."""
    return ref if "@" in ref or ":" in ref.rpartition("/")[2] else f"{ref}:latest"


def find(data: dict[str, Any], ref: str) -> dict[str, Any] | None:
    for box in data["containers"]:
        if ref and (box["Name"] == "/" + ref.lstrip("/") or box["Id"].startswith(ref)):
            return box
    return None


def get(data: dict[str, Any], ref: str) -> dict[str, Any]:
    box = find(data, ref)
    if box is None:
        raise daemon(f"No such container: {ref}")
    return box


def make(found: dict[str, list[str]], image: str, args: list[str]) -> dict[str, Any]:
    def last(name: str, default: str = "") -> str:
        return found.get(name, [default])[-1]

    identity = secrets.token_hex(32)
    entry = [last("entrypoint")] if last("entrypoint") else []
    command = [*entry, *args]
    env = [item if "=" in item else f"{item}={os.environ.get(item, '')}" for item in found.get("env", [])]
    for file in found.get("env-file", []):
        lines = [line for line in Path(file).read_text().splitlines() if line and not line.startswith("#")]
        env = lines + env
    return {
        "Id": identity,
        "Created": now(),
        "Path": command[0] if command else "",
        "Args": command[1:],
        "State": {
            **{
                "Status": "created",
                "Running": False,
                "Paused": False,
                "Restarting": False,
                "OOMKilled": False,
            },
            **{"Dead": False, "Pid": 0, "ExitCode": 0, "Error": "", "StartedAt": NEVER, "FinishedAt": NEVER},
        },
        "Image": "sha256:" + image.encode().hex().ljust(64, "0")[:64],
        "Name": "/" + last("name") if last("name") else "",
        "RestartCount": 0,
        "Mounts": [_mount(text) for text in found.get("mount", [])],
        "Config": {
            "Hostname": last("hostname", identity[:12]),
            "User": last("user"),
            "Env": env,
            "Cmd": args,
            "Image": image,
            "WorkingDir": last("workdir"),
            "Entrypoint": entry or None,
            "Labels": dict(sorted(item.partition("=")[::2] for item in found.get("label", []))),
            "StopTimeout": int(last("stop-timeout", "10")),
        },
        "HostConfig": {
            "NetworkMode": last("network", "default"),
            "IpcMode": last("ipc", "private"),
            "ShmSize": _bytes(last("shm-size", "64m")),
            "RestartPolicy": {"Name": last("restart", "no"), "MaximumRetryCount": 0},
            "Init": True if "init" in found else None,
            "LogConfig": {
                "Type": "json-file",
                "Config": dict(i.partition("=")[::2] for i in found.get("log-opt", [])),
            },
            "CapAdd": found.get("cap-add"),
            "DeviceRequests": [{"Capabilities": [["gpu"]]}] if "gpus" in found else None,
        },
    }


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([bkmgt]?)b?", text.lower())
    if not match:
        raise Failure(f'invalid argument "{text}" for "--shm-size" flag: invalid size: \'{text}\'', 125)
    return int(match[1]) << (10 * "bkmgt".index(match[2] or "b"))


def _mount(text: str) -> dict[str, Any]:
    fields = dict(part.partition("=")[::2] for part in next(csv.reader([text])))
    source = fields.get("source") or fields.get("src", "")
    target = fields.get("target") or fields.get("dst") or fields.get("destination", "")
    if not target.startswith("/"):
        raise daemon(
            f"invalid mount config for type \"bind\": invalid mount path: '{target}' mount path must be absolute"
        )
    if not os.path.exists(source):
        raise daemon(f'invalid mount config for type "bind": bind source path does not exist: {source}')
    writable = not ({"readonly", "ro"} & fields.keys())
    return {
        "Type": "bind",
        "Source": source,
        "Destination": target,
        "Mode": "",
        "RW": writable,
        "Propagation": "rprivate",
    }


def launch(identity: str) -> str:
    """Starts the process that runs the container; what it says went wrong, or nothing."""
    command = [*os.environ["FAKE_DOCKER_COMMAND"].split("\t"), "__supervise__", identity]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process.stdout as out:
        return out.read().decode().strip()  # closed by it once the container runs, or cannot


def send(identity: str, number: int) -> None:
    with state() as data:
        box = find(data, identity)
        if box is None or not box["State"]["Running"]:
            return
        if not data["execute"]:
            if number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
                box["State"].update(Status="exited", Running=False, Pid=0, ExitCode=128 + number, FinishedAt=now())
            return
        pid = box["State"]["Pid"]
    with contextlib.suppress(ProcessLookupError):
        # An ended init takes its whole process namespace along; TERM goes to the command only.
        os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)


def ended(identity: str, limit: float | None) -> dict[str, Any] | None:
    """The container once it does not run; None if it still does after `limit` seconds."""
    deadline = None if limit is None else time.monotonic() + limit
    while True:
        with state() as data:
            box = find(data, identity)
        if box is None or not box["State"]["Running"]:
            return box or {"State": {"ExitCode": 137}}
        if deadline is not None and time.monotonic() > deadline:
            return None
        time.sleep(0.02)


# ---- running a container


def mapped(text: str, box: dict[str, Any]) -> str:
    """`text` with the targets of the container's mounts replaced by their sources."""
    mounts = sorted(box["Mounts"], key=lambda mount: -len(mount["Destination"]))
    if not mounts:
        return text
    places = {mount["Destination"].rstrip("/"): mount["Source"].rstrip("/") for mount in mounts}
    pattern = "|".join(map(re.escape, places))
    return re.sub(rf"(?<![\w./-])({pattern})(?=/|$|[^\w.-])", lambda match: places[match[1]], text)


def environment(box: dict[str, Any]) -> dict[str, str]:
    """What a process in the container sees: the container's own variables, not the client's."""
    env = {"PATH": os.environ["PATH"], "HOSTNAME": box["Config"]["Hostname"], "HOME": os.environ["HOME"]}
    env.update(item.partition("=")[::2] for item in box["Config"]["Env"])
    return {key: mapped(value, box) for key, value in env.items()}


def supervise(identity: str) -> int:
    """Runs the container to its end. Prints why it cannot start, else closes stdout once it runs."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us, as to an init
    with state() as data:
        box = get(data, identity)
        command = [mapped(word, box) for word in [box["Path"], *box["Args"]]]
        try:
            process = subprocess.Popen(
                command,
                env=environment(box),
                cwd=mapped(box["Config"]["WorkingDir"], box) or None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError:
            return _not_started(box, command[0])
        box["State"].update(Status="running", Running=True, Pid=process.pid, StartedAt=now(), ExitCode=0, Error="")
    os.close(1)
    _record(process, folder() / f"{identity}.log")
    code = process.wait()
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with state() as data:
        box = find(data, identity)
        if box:
            code = code if code >= 0 else 128 - code
            box["State"].update(Status="exited", Running=False, Pid=0, ExitCode=code, FinishedAt=now())
    return 0


def _not_started(box: dict[str, Any], program: str) -> int:
    """With an init, the container does start: it is the init that then finds no program."""
    if box["HostConfig"]["Init"]:
        line = f"[FATAL tini (7)] exec {program} failed: No such file or directory\n"
        with (folder() / f"{box['Id']}.log").open("a") as log:
            log.write(json.dumps({"stream": "stderr", "log": line}) + "\n")
        box["State"].update(Status="exited", ExitCode=127, StartedAt=now(), FinishedAt=now())
        return 0
    error = (
        "failed to create shim task: OCI runtime create failed: runc create failed: unable to start "
        f'container process: exec: "{program}": executable file not found in $PATH: unknown'
    )
    box["State"].update(ExitCode=127, Error=error)
    print(error)
    return 1


def _record(process: subprocess.Popen[bytes], file: Path) -> None:
    """Writes both streams to the container's log until the process ends (its children may outlive it)."""
    watch = selectors.DefaultSelector()
    for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
        os.set_blocking(pipe.fileno(), False)
        watch.register(pipe, selectors.EVENT_READ, name)
    rest = {"stdout": b"", "stderr": b""}
    with file.open("a") as log:
        while watch.get_map():
            ready = watch.select(0.05)
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    watch.unregister(key.fileobj)
                *lines, rest[key.data] = (rest[key.data] + data).split(b"\n")
                for line in [each + b"\n" for each in lines] + (
                    [rest[key.data]] if not data and rest[key.data] else []
                ):
                    log.write(json.dumps({"stream": key.data, "log": line.decode(errors="replace")}) + "\n")
                log.flush()
            if not ready and process.poll() is not None:
                return


def _descendants(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid:
                    found += [int(entry.name), *_descendants(int(entry.name))]
    return found
