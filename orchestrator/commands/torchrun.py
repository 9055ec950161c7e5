"""torchrun's own options for one node, and a user's command as it follows them.

`launch.py` starts `python3 -m torch.distributed.run` with these options; it adds where the rank's log
folders lie and the process around each rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator.errors import UsageError
from orchestrator.specs import JobSpec

RENDEZVOUS_TIMEOUT_S = 120

_PYTHON = re.compile(r"python(3(\.\d+)?)?\Z")
_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_STARTERS = ("mpirun", "mpiexec", "srun")


def rendezvous_endpoint(spec: JobSpec) -> str:
    """`host:port` where the nodes meet. One node alone takes any free port: local jobs never collide."""
    if len(spec.nodes) == 1:
        return "127.0.0.1:0"
    host = spec.head.private
    return f"[{host}]:{spec.port}" if ":" in host else f"{host}:{spec.port}"


def torchrun_args(spec: JobSpec, index: int, *, timeout: int = RENDEZVOUS_TIMEOUT_S) -> tuple[str, ...]:
    """torchrun's options for node `index`; `timeout` in seconds is how long it waits for the other nodes.

    is_host is said outright: torchrun would compare the endpoint with what the host name resolves to,
    and hang where that is 127.0.1.1 or another interface. The rendezvous id is new for each attempt,
    because a failed torchrun closes its id for ever.
    """
    single = len(spec.nodes) == 1
    conf = {
        "is_host": str(index == 0).lower(),
        "join_timeout": timeout,
        "read_timeout": timeout,
        "last_call_timeout": 1,
    }
    return (
        f"--nnodes={len(spec.nodes)}",
        f"--nproc-per-node={spec.procs}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rendezvous_endpoint(spec)}",
        f"--rdzv-id={spec.run_id}-{spec.attempt}",
        "--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in conf.items()),
        f"--local-addr={'127.0.0.1' if single else spec.nodes[index].private}",
        "--max-restarts=0",
    )


def normalise(command: Sequence[str], launcher: str = "torchrun") -> tuple[str, ...]:
    """A user's command as torchrun takes it: `train.py --lr 1e-4` or `-m pkg …`.

    A leading `python`, `torchrun`, `deepspeed` or `accelerate launch` is dropped, because orch starts the
    ranks; their own options are refused. With launcher `none` the command stays as it is. Raises UsageError.
    """
    words = list(command)
    if not words:
        raise UsageError(
            "no command to run", hint="give one after `--`, as in `orch deploy -- train.py --lr 1e-4`"
        )
    if any("\0" in word for word in words):
        raise UsageError("the command holds a NUL character, which no program can be given")
    if launcher == "none":
        return tuple(words)
    words, dropped = _without_launcher(words)
    if not words:
        raise UsageError(f"`{dropped}` alone is no command", hint="name the script or `-m MODULE` after it")
    program = words[0].rpartition("/")[2]
    if program in _STARTERS:
        raise UsageError(
            f"{program!r} starts processes itself and would run once per rank",
            hint="leave it out, or run it once per node with `--launcher none`",
        )
    if words[0] in ("-m", "-c") and len(words) == 1:
        raise UsageError(f"`{words[0]}` needs an argument", hint="as in `-- -m package.train`")
    return tuple(words)


def _without_launcher(words: list[str]) -> tuple[list[str], str]:
    """The words after `python` or a launcher, and what was dropped."""
    name = words[0].rpartition("/")[2]
    if _PYTHON.match(name):
        if words[1:2] == ["-m"] and words[2:3] and words[2] in _MODULES:
            return _own_options(words[3:], words[2]), f"python -m {words[2]}"
        rest = words[1:]
        while rest and rest[0] == "-u":  # output is unbuffered anyway
            rest = rest[1:]
        return rest, name
    if name in ("torchrun", "deepspeed"):
        return _own_options(words[1:], name), name
    if name == "accelerate" and words[1:2] == ["launch"]:
        return _own_options(words[2:], "accelerate launch"), "accelerate launch"
    return words, ""


def _own_options(rest: list[str], launcher: str) -> list[str]:
    """`rest` unless it begins with an option of `launcher`; `-m` and `--no-python` have a meaning here."""
    if rest and rest[0] == "--no-python":
        rest = rest[1:]
    if rest and rest[0] in ("-m", "--module"):
        return ["-m", *rest[1:]]
    if rest and rest[0].startswith("-"):
        raise UsageError(
            f"{launcher}'s own option {rest[0]!r} cannot be given: orch sets it itself",
            hint="use --nodes, --gpus, --procs and run.port; put the script right after `--`",
        )
    return rest
