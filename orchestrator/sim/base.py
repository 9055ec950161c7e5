"""Base images: pulled where that is possible, else made from this machine's own Debian packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import PreflightError
from orchestrator.sim import aptsources, machine
from orchestrator.sim.process import Say, docker, run, say

PULL_SECONDS = 20.0
"""How long the registry may stay silent before the packages are used: an air-gapped machine must not wait."""

_PULL_TOTAL = 600.0


@dataclass(frozen=True)
class Base:
    """An image that can be pulled, or made from `packages` of a Debian `suite`."""

    pull: str
    local: str
    suite: str
    packages: tuple[str, ...]
    command: str


JOB = Base(
    pull="python:3.11-slim-bookworm",
    local="orch-base:bookworm",
    suite="bookworm",
    packages=("python3", "python3-venv", "python3-pip", "python3-dev", "gcc", "libc6-dev", "ca-certificates"),
    command="python3",
)
NODE = Base(
    pull="debian:trixie-slim",
    local="orch-base:trixie",
    suite="trixie",
    packages=("ca-certificates",),
    command="bash",
)


def ensure_base(base: Base = JOB, say: Say = say) -> str:
    """The reference to use as BASE_IMAGE: one that is already here, else pulled, else built.

    Raises PreflightError when neither a registry nor a Debian mirror answers.
    """
    for name in (base.pull, base.local):
        if has_image(name):
            return name
    say(f"getting the base image {base.pull}")
    if _pull(base.pull):
        return base.pull
    say(f"{base.pull} cannot be pulled here: building {base.local} from Debian packages (about a minute)")
    _build(base, say)
    return base.local


def has_image(name: str) -> bool:
    return docker("image", "inspect", "--format", "{{.Id}}", name, check=False, timeout=30).returncode == 0


def _pull(name: str) -> bool:
    """Pulls `name`; the registry has PULL_SECONDS to say its first word, and far more to deliver.

    The engine prints its first line once the manifest is there: only then is a download worth waiting for.
    """
    spoke = threading.Event()
    pull = subprocess.Popen(
        ["docker", "pull", name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )

    def listen() -> None:
        assert pull.stdout is not None
        for _ in pull.stdout:
            spoke.set()
        spoke.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        return spoke.wait(PULL_SECONDS) and pull.wait(_PULL_TOTAL) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if pull.poll() is None:
            pull.kill()
            pull.wait(10)


def _build(base: Base, say: Say) -> None:
    sources = machine.suite_sources(base.suite)
    missing = (
        "this is not a Debian machine"
        if not sources
        else "that takes root"
        if os.geteuid() != 0
        else "mmdebstrap is not installed"
        if shutil.which("mmdebstrap") is None and not machine.may_install()
        else ""
    )
    if missing:
        raise PreflightError(
            f"{base.pull} cannot be pulled and cannot be built from packages: {missing}",
            hint=f"make the image available and tag it: docker tag YOUR-IMAGE {base.local}",
        )
    if shutil.which("mmdebstrap") is None:
        machine.apt_install(["mmdebstrap"], say)
    with tempfile.TemporaryDirectory(prefix="orch-base-") as folder:
        tar = Path(folder) / "base.tar"
        env = {**os.environ, **_proxies()}
        run(bootstrap_argv(base, tar), input=aptsources.render(sources), timeout=900, env=env,
            what=f"build {base.local} with mmdebstrap")  # fmt: skip
        changes = [f'CMD ["{base.command}"]', "ENV LANG=C.UTF-8", "LABEL orch.base=" + base.suite]
        flags = [word for change in changes for word in ("--change", change)]
        docker("import", *flags, str(tar), base.local, timeout=300, what=f"import {base.local}")


def bootstrap_argv(base: Base, tar: Path) -> list[str]:
    """The mmdebstrap command; its `-` reads the sources.list from stdin. Pure.

    Like the official Python image: no manuals, `python` is there, and pip may install system-wide.
    """
    argv = ["mmdebstrap", "--variant=minbase", "--format=tar", f"--include={','.join(base.packages)}"]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")]
    if "python3" in base.packages:
        argv.append('--customize-hook=ln -sf python3 "$1/usr/bin/python"')
        argv.append('--customize-hook=rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED')
    # Docker writes these two itself; the host's would be copied in.
    argv.append('--customize-hook=rm -f "$1/etc/hostname" "$1/etc/resolv.conf"')
    return [*argv, base.suite, str(tar), "-"]


def _proxies() -> dict[str, str]:
    """apt's own proxy settings as environment: mmdebstrap reads none of the machine's apt configuration."""
    found = {}
    for scheme in ("http", "https"):
        argv = ["apt-config", "shell", "value", f"Acquire::{scheme}::Proxy"]
        text = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=20).stdout
        value = text.partition("=")[2].strip().strip("'")
        if value and value != "DIRECT":
            found[f"{scheme}_proxy"] = value
    return found
