"""A `docker` command with a small engine behind it, for the fake node: state in files, no daemon.

It knows the commands and flags that orch uses, refuses others as Docker does, and answers with
the engine's own words. `docker start` runs the entrypoint as a local process with the mounts'
targets replaced by their sources, so that a launcher runs "in" it. tests/contract/test_fake_node.py
runs the same commands here and on a real engine.

Standard library only; run as `docker ARGS` with FAKE_DOCKER naming the engine's folder.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.connect.fake_client import FLAGS, SHORT, VALUES, Failure, TemplateError, options, render
from orchestrator.connect.fake_engine import (
    daemon,
    ended,
    environment,
    find,
    folder,
    get,
    launch,
    make,
    mapped,
    normal,
    now,
    send,
    state,
    supervise,
)

NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"


def main(argv: list[str]) -> int:
    if argv[:1] == ["__supervise__"]:
        return supervise(argv[1])
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
            "Runtimes": {
                "runc": {"path": "runc"},
                **({"nvidia": {"path": "nvidia"}} if data["gpus"] else {}),
            },
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
    return _print_inspected(
        values,
        found,
        [f"Error response from daemon: No such image: {normal(ref)}" for ref in rest if ref not in known],
    )


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
    found, rest = options(args, VALUES, FLAGS, SHORT, stop=True)
    if not rest:
        raise Failure('"docker create" requires at least 1 argument.')
    box = make(found, normal(rest[0]), rest[1:])
    file = found.get("cidfile", [""])[-1]
    if file and Path(file).exists():
        raise Failure(f"container ID file found, make sure the other container isn't running or delete {file}")
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
        error = launch(box["Id"]) if execute else ""
        if error:
            print(daemon(error), file=sys.stderr)
            failed.append(ref)
        else:
            print(ref)
    if failed:
        print(f"Error: failed to start containers: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def stop(args: list[str]) -> None:
    found, rest = options(args, ["time", "timeout", "signal"], [], {"t": "time", "s": "signal"})
    for ref in rest:
        with state() as data:
            box = get(data, ref)
        limit = float((found.get("time") or found.get("timeout") or [box["Config"]["StopTimeout"]])[-1])
        send(box["Id"], signal.SIGTERM)
        if not ended(box["Id"], limit):
            send(box["Id"], signal.SIGKILL)
            ended(box["Id"], 10)
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
        send(box["Id"], number)
        print(ref)


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
            send(box["Id"], signal.SIGKILL)
            ended(box["Id"], 10)
        with state() as data:
            data["containers"] = [each for each in data["containers"] if each["Id"] != box["Id"]]
        print(ref)
    return code


def wait(args: list[str]) -> None:
    for ref in args:
        with state() as data:
            identity = get(data, ref)["Id"]
        print(ended(identity, None)["State"]["ExitCode"], flush=True)


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
        if key not in ("name", "status", "id", "label"):
            raise daemon(f"invalid filter '{key}'")
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
        else:
            pairs = [value.partition("=") for value in values]
            fits = all(name in labels and (not equals or labels[name] == text) for name, equals, text in pairs)
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
