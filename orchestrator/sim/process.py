"""Runs programs of this machine with a deadline, and turns what goes wrong into one clear error."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrator.errors import DeadlineError, OrchError, PreflightError

Say = Callable[[str], None]


def say(text: str) -> None:
    """Progress for a person: on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def run(
    argv: Sequence[str],
    *,
    timeout: float = 60.0,
    check: bool = True,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    what: str = "",
    error: type[OrchError] = PreflightError,
) -> subprocess.CompletedProcess[str]:
    """Runs `argv`; with `check`, a non-zero exit raises `error`, which carries the last lines of output.

    `what` says in words what was tried ("build the node image"). Raises DeadlineError after
    `timeout` seconds and PreflightError where the program does not exist.
    """
    what = what or "run " + " ".join(argv[:3])
    try:
        done = subprocess.run(
            list(argv),
            check=False,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=None if env is None else dict(env),
            cwd=cwd,
        )
    except FileNotFoundError as missing:
        raise PreflightError(
            f"could not {what}: there is no program {argv[0]!r} on this machine", hint=f"install {argv[0]}"
        ) from missing
    except subprocess.TimeoutExpired as late:
        raise DeadlineError(f"could not {what}: no end after {timeout:.0f} s") from late
    if check and done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = lines[-1] if lines else f"exit {done.returncode}"
        raise error(f"could not {what}: {reason}", lines=lines[-20:])
    return done


def docker(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`docker ARGS…` on the engine of this machine; options as for `run`."""
    return run(["docker", *args], **options)  # type: ignore[arg-type]


def wait_until(
    ready: Callable[[], bool], what: str, *, deadline: float, every: float = 0.2, hint: str | None = None
) -> None:
    """Asks `ready` until it says yes. Raises DeadlineError, naming `what`, after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not ready():
        if time.monotonic() >= end:
            raise DeadlineError(f"{what}: still not there after {deadline:.0f} s", hint=hint)
        time.sleep(every)
