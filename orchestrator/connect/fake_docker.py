"""A `docker` command with a small engine behind it, for the fake node: state in files, no daemon.

It knows the commands and flags that orch uses, refuses others as Docker does, and answers with
the engine's own words. `docker start` runs the entrypoint as a local process with the mounts'
targets replaced by their sources, so that a launcher runs "in" it. tests/contract/test_fake_node.py
runs the same commands here and on a real engine.

Standard library only; run as `docker ARGS` with FAKE_DOCKER naming the engine's folder.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.connect.fake_run import supervise
from orchestrator.connect.gotemplate import TemplateError, render

NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
NEVER = "0001-01-01T00:00:00Z"

CREATE = {
    "value": "name entrypoint network ipc pid shm-size mount volume user label env env-file gpus stop-timeout "
    "stop-signal cidfile workdir log-opt log-driver ulimit cap-add device restart pull hostname security-opt "
    "memory cpus add-host group-add tmpfs runtime".split(),  # noqa: SIM905
    "flag": ["init", "read-only", "privileged", "rm", "interactive", "tty", "detach", "quiet"],
    "short": {"v": "volume", "u": "user", "l": "label", "e": "env", "w": "workdir", "h": "hostname", "i": "interactive"},
}


class Failure(Exception):
    """Printed to standard error as it is; the exit code is 1 unless given."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def daemon(message: str) -> Failure:
    return Failure(f"Error response from daemon: {message}")


# ---- state


def folder() -> Path:
    return Path(os.environ["FAKE_DOCKER"])


@contextlib.contextmanager
def state() -> Iterator[dict[str, Any]]:
    """The engine's state, locked; written back if the block ends well."""
    with (folder() / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder() / "state.json"
        data = json.loads(file.read_text())
        before = json.dumps(data)
        yield data
        if json.dumps(data) != before:
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps(data))
            temporary.replace(file)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


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


# ---- the command line


def options(
    args: list[str], value: list[str], flag: list[str], short: dict[str, str], *, stop: bool = False
) -> tuple[dict[str, list[str]], list[str]]:
    """({name: values}, positional arguments); with `stop`, options end at the first positional one."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        if arg == "--":
            return found, rest + queue
        if not arg.startswith("-") or arg == "-":
            rest.append(arg)
            if stop:
                return found, rest + queue
            continue
        if arg.startswith("--"):
            name, equals, given = arg[2:].partition("=")
            names = [name]
        else:
            # -aq are two flags; -fname=x and -n20 are one option with its value
            letters, equals, given = arg[1:].partition("=")
            if short.get(letters[:1]) in value and len(letters) > 1 and not equals:
                letters, equals, given = letters[0], "=", letters[1:]
            names = [short.get(letter, "-" + letter) for letter in letters]
        for name in names:
            if name in flag:
                found.setdefault(name, []).append(given or "true")
            elif name in value:
                if not equals and not queue:
                    raise Failure(f"flag needs an argument: --{name}", 125)
                found.setdefault(name, []).append(given if equals else queue.pop(0))
            else:
                dashes = "shorthand flag: " if name.startswith("-") else "flag: --"
                raise Failure(f"unknown {dashes}{name.lstrip('-')}", 125)
    return found, rest


def main(argv: list[str]) -> int:
    if argv[:1] == ["__supervise__"]:
        return supervise(argv[1], state)
    try:
        verb = " ".join(argv[:2]) if argv[:1] in (["image"], ["container"]) else argv[0]
        command = COMMANDS.get(verb)
        if command is None:
            raise Failure(f"docker: '{verb}' is not a docker command.")
        _faults(verb)
        return command(argv[len(verb.split()) :]) or 0
    except Failure as failure:
        print(failure, file=sys.stderr)
        return failure.code
    except TemplateError as error:
        print(f"template parsing error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 141


def _faults(verb: str) -> None:
    """What the test has ordered to go wrong."""
    with state() as data:
        if not data["up"]:
            raise Failure(NO_DAEMON)
        for fault in data["faults"]:
            if fault["verb"] == verb:
                fault["times"] -= 1
                data["faults"] = [each for each in data["faults"] if each["times"] > 0]
                # (the state must be written although this fails)
                message, code = fault["message"], fault["code"]
                break
        else:
            return
    raise Failure(message, code)


# ---- images


def version(args: list[str]) -> None:
    found, _ = options(args, ["format"], [], {"f": "format"})
    with state() as data:
        engine = data["version"]
    value = {
        "Client": {"Version": engine},
        "Server": {"Version": engine, "ApiVersion": "1.41", "Os": "linux", "Arch": "amd64"},
    }
    print(render(found.get("format", ["{{json .}}"])[-1], value))


def info(args: list[str]) -> None:
    found, _ = options(args, ["format"], [], {"f": "format"})
    with state() as data:
        boxes = data["containers"]
        value = {
            "ServerVersion": data["version"],
            "DockerRootDir": str(folder()),
            "Containers": len(boxes),
            "ContainersRunning": sum(box["State"]["Running"] for box in boxes),
            "NCPU": os.cpu_count(),
            "OSType": "linux",
            "Runtimes": {"runc": {"path": "runc"}, **({"nvidia": {"path": "nvidia"}} if data["gpus"] else {})},
            "DefaultRuntime": "runc",
        }
    print(render(found.get("format", ["{{json .}}"])[-1], value))


def pull(args: list[str]) -> None:
    found, rest = options(args, ["platform"], ["quiet", "all-tags"], {"q": "quiet", "a": "all-tags"})
    ref = normal(rest[0])
    with state() as data:
        _fetch(data, ref)
    print(ref if "quiet" in found else f"Status: Downloaded newer image for {ref}")


def _fetch(data: dict[str, Any], ref: str) -> None:
    if ref not in map(normal, data["registry"]):
        raise daemon(f"manifest for {ref} not found: manifest unknown: manifest unknown")
    if ref not in data["images"]:
        data["images"].append(ref)


def image_inspect(args: list[str]) -> int:
    found, rest = options(args, ["format"], [], {"f": "format"})
    with state() as data:
        local = data["images"]
    known = [ref for ref in rest if normal(ref) in local]
    values = [
        {
            "Id": "sha256:" + normal(ref).encode().hex().ljust(64, "0")[:64],
            "RepoTags": [] if "@" in ref else [normal(ref)],
            "RepoDigests": [ref] if "@" in ref else [],
            "Os": "linux",
            "Architecture": "amd64",
        }
        for ref in known
    ]
    return _print_inspected(values, found, [f"Error response from daemon: No such image: {normal(ref)}" for ref in rest if ref not in known])


def _print_inspected(values: list[dict], found: dict[str, list[str]], errors: list[str]) -> int:
    if "format" in found:
        for value in values:
            print(render(found["format"][-1], value))
        if not values:
            print()
    else:
        print(json.dumps(values, indent=4))
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


# ---- containers


def create(args: list[str]) -> None:
    found, rest = options(args, CREATE["value"], CREATE["flag"], CREATE["short"], stop=True)
    if not rest:
        raise Failure('"docker create" requires at least 1 argument.')
    box = _make(found, normal(rest[0]), rest[1:])
    file = found.get("cidfile", [""])[-1]
    if file and Path(file).exists():
        raise Failure(
            f"container ID file found, make sure the other container isn't running or delete {file}", 125
        )
    with state() as data:
        if box["Config"]["Image"] not in data["images"]:
            if found.get("pull", ["missing"])[-1] == "never":
                raise daemon(f"No such image: {box['Config']['Image']}")
            print(f"Unable to find image '{box['Config']['Image']}' locally", file=sys.stderr)
            _fetch(data, box["Config"]["Image"])
        holder = find(data, box["Name"]) if box["Name"] else None
        if holder:
            raise daemon(
                f'Conflict. The container name "{box["Name"]}" is already in use by container '
                f'"{holder["Id"]}". You have to remove (or rename) that container to be able to reuse that name.'
            )
        box["Name"] = box["Name"] or "/" + secrets.token_hex(4)
        data["containers"].append(box)
    if file:
        Path(file).write_text(box["Id"])
    print(box["Id"])


def _make(found: dict[str, list[str]], image: str, args: list[str]) -> dict[str, Any]:
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
            **{"Status": "created", "Running": False, "Paused": False, "Restarting": False, "OOMKilled": False},
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
            "Labels": dict(item.partition("=")[::2] for item in found.get("label", [])),
            "StopTimeout": int(last("stop-timeout", "10")),
        },
        "HostConfig": {
            "NetworkMode": last("network", "default"),
            "IpcMode": last("ipc", "private"),
            "ShmSize": _bytes(last("shm-size", "64m")),
            "RestartPolicy": {"Name": last("restart", "no"), "MaximumRetryCount": 0},
            "Init": True if "init" in found else None,
            "LogConfig": {"Type": "json-file", "Config": dict(i.partition("=")[::2] for i in found.get("log-opt", []))},
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
        raise daemon(f"invalid mount config for type \"bind\": invalid mount path: '{target}' mount path must be absolute")
    if not os.path.exists(source):
        raise daemon(f'invalid mount config for type "bind": bind source path does not exist: {source}')
    writable = not ({"readonly", "ro"} & fields.keys())
    return {"Type": "bind", "Source": source, "Destination": target, "Mode": "", "RW": writable, "Propagation": "rprivate"}


def start(args: list[str]) -> int:
    _, rest = options(args, [], ["attach", "interactive"], {"a": "attach", "i": "interactive"})
    failed = []
    for ref in rest:
        with state() as data:
            box = get(data, ref)
            if box["State"]["Running"]:
                print(ref)
                continue
            if box["HostConfig"]["DeviceRequests"] and not data["gpus"]:
                print(daemon('could not select device driver "" with capabilities: [[gpu]]'), file=sys.stderr)
                failed.append(ref)
                continue
            execute = data["execute"]
            if not execute:
                box["State"].update(Status="running", Running=True, Pid=1, StartedAt=now(), ExitCode=0)
        error = _launch(box["Id"]) if execute else ""
        if error:
            print(daemon(error), file=sys.stderr)
            failed.append(ref)
        else:
            print(ref)
    if failed:
        print(f"Error: failed to start containers: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _launch(identity: str) -> str:
    """Starts the process that runs the container; what it says went wrong, or nothing."""
    command = [*os.environ["FAKE_DOCKER_COMMAND"].split("\t"), "__supervise__", identity]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with process.stdout as out:
        return out.read().decode().strip()  # closed by it once the container runs, or cannot


def stop(args: list[str]) -> None:
    found, rest = options(args, ["time", "timeout", "signal"], [], {"t": "time", "s": "signal"})
    for ref in rest:
        with state() as data:
            box = get(data, ref)
        limit = float((found.get("time") or found.get("timeout") or [box["Config"]["StopTimeout"]])[-1])
        _signal(box["Id"], signal.SIGTERM)
        if not _ended(box["Id"], limit):
            _signal(box["Id"], signal.SIGKILL)
            _ended(box["Id"], 10)
        print(ref)


def kill(args: list[str]) -> None:
    found, rest = options(args, ["signal"], [], {"s": "signal"})
    name = found.get("signal", ["KILL"])[-1]
    number = int(name) if name.isdigit() else getattr(signal, "SIG" + name.upper().removeprefix("SIG"))
    for ref in rest:
        with state() as data:
            box = get(data, ref)
        if not box["State"]["Running"]:
            raise daemon(f"Cannot kill container: {ref}: Container {box['Id']} is not running")
        _signal(box["Id"], number)
        print(ref)


def _signal(identity: str, number: int) -> None:
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


def _ended(identity: str, limit: float | None) -> dict[str, Any] | None:
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


def remove(args: list[str]) -> int:
    found, rest = options(args, [], ["force", "volumes"], {"f": "force", "v": "volumes"})
    code = 0
    for ref in rest:
        with state() as data:
            box = find(data, ref)
        if box is None:
            print(daemon(f"No such container: {ref}"), file=sys.stderr)
            code = code if "force" in found else 1
            continue
        if box["State"]["Running"]:
            if "force" not in found:
                raise daemon(
                    f"You cannot remove a running container {box['Id']}. "
                    "Stop the container before attempting removal or force remove"
                )
            _signal(box["Id"], signal.SIGKILL)
            _ended(box["Id"], 10)
        with state() as data:
            data["containers"] = [each for each in data["containers"] if each["Id"] != box["Id"]]
        print(ref)
    return code


def wait(args: list[str]) -> None:
    for ref in args:
        with state() as data:
            identity = get(data, ref)["Id"]
        print(_ended(identity, None)["State"]["ExitCode"], flush=True)


def inspect(args: list[str]) -> int:
    found, rest = options(args, ["format", "type"], ["size"], {"f": "format", "s": "size"})
    with state() as data:
        boxes = {ref: find(data, ref) for ref in rest}
    errors = [f"Error: No such object: {ref}" for ref, box in boxes.items() if box is None]
    return _print_inspected([box for box in boxes.values() if box], found, errors)


def ps(args: list[str]) -> None:
    short = {"a": "all", "q": "quiet", "f": "filter"}
    found, _ = options(args, ["filter", "format"], ["all", "quiet", "no-trunc"], short)
    wanted: dict[str, list[str]] = {}
    for item in found.get("filter", []):
        key, _, value = item.partition("=")
        wanted.setdefault(key, []).append(value)
    with state() as data:
        boxes = [box for box in reversed(data["containers"]) if _matches(box, wanted)]
    if "all" not in found and "status" not in wanted:
        boxes = [box for box in boxes if box["State"]["Running"]]
    full = "no-trunc" in found
    default = "{{.ID}}" if "quiet" in found else "{{.ID}}   {{.Image}}   {{.Command}}   {{.Status}}   {{.Names}}"
    template = found.get("format", [default])[-1]
    if "format" not in found and "quiet" not in found:
        print("CONTAINER ID   IMAGE   COMMAND   STATUS   NAMES")
    for box in boxes:
        row = _row(box, full)
        shown = {key: value for key, value in row.items() if key != "_labels"}
        print(render(template, row if "{{json .}}" not in template else shown))


def _matches(box: dict[str, Any], wanted: dict[str, list[str]]) -> bool:
    """Values of one filter are alternatives, except labels, which must all be there."""
    labels = box["Config"]["Labels"]
    for key, values in wanted.items():
        if key == "name":
            fits = any(re.search(value, box["Name"]) or re.search(value, box["Name"][1:]) for value in values)
        elif key == "status":
            fits = box["State"]["Status"] in values
        elif key == "id":
            fits = any(box["Id"].startswith(value) for value in values)
        elif key == "label":
            pairs = [value.partition("=") for value in values]
            fits = all(name in labels and (not equals or labels[name] == text) for name, equals, text in pairs)
        else:
            raise daemon(f"invalid filter '{key}'")
        if not fits:
            return False
    return True


def _row(box: dict[str, Any], full: bool) -> dict[str, Any]:
    status = box["State"]["Status"]
    words = {"created": "Created", "running": "Up Less than a second"}
    command = " ".join([box["Path"], *box["Args"]])
    return {
        "ID": box["Id"] if full else box["Id"][:12],
        "Names": box["Name"][1:],
        "Image": box["Config"]["Image"],
        "Command": json.dumps(command if full else command[:20]),
        "CreatedAt": box["Created"],
        "State": status,
        "Status": words.get(status, f"Exited ({box['State']['ExitCode']}) Less than a second ago"),
        "Labels": ",".join(f"{key}={value}" for key, value in box["Config"]["Labels"].items()),
        "_labels": box["Config"]["Labels"],
    }


def logs(args: list[str]) -> None:
    found, rest = options(args, ["tail", "since", "until"], ["follow", "timestamps"], {"n": "tail", "f": "follow"})
    with state() as data:
        identity = get(data, rest[0])["Id"]
    file = folder() / f"{identity}.log"
    lines = file.read_text().splitlines() if file.exists() else []
    tail = found.get("tail", ["all"])[-1]
    for line in lines if tail == "all" else lines[len(lines) - min(int(tail), len(lines)) :]:
        entry = json.loads(line)
        stream = sys.stderr if entry["stream"] == "stderr" else sys.stdout
        stream.write(entry["log"])
        stream.flush()


def execute(args: list[str]) -> NoReturn:
    from orchestrator.connect.fake_run import environment, mapped

    value = ["env", "user", "workdir", "env-file"]
    short = {"i": "interactive", "t": "tty", "d": "detach", "e": "env", "u": "user", "w": "workdir"}
    found, rest = options(args, value, ["interactive", "tty", "detach"], short, stop=True)
    with state() as data:
        box = get(data, rest[0])
    if not box["State"]["Running"]:
        raise daemon(f"Container {box['Id']} is not running")
    command = [mapped(word, box) for word in rest[1:]]
    env = {**environment(box), **dict(item.partition("=")[::2] for item in found.get("env", []))}
    workdir = found.get("workdir", [box["Config"]["WorkingDir"]])[-1]
    if workdir:
        os.chdir(mapped(workdir, box))
    try:
        os.execvpe(command[0], command, env)
    except FileNotFoundError:
        raise Failure(
            f'OCI runtime exec failed: exec failed: unable to start container process: exec: "{command[0]}": '
            "executable file not found in $PATH: unknown",
            127,
        ) from None


COMMANDS = {
    "version": version,
    "info": info,
    "pull": pull,
    "image inspect": image_inspect,
    "image pull": pull,
    "create": create,
    "container create": create,
    "start": start,
    "stop": stop,
    "kill": kill,
    "rm": remove,
    "wait": wait,
    "inspect": inspect,
    "container inspect": inspect,
    "ps": ps,
    "logs": logs,
    "exec": execute,
}
