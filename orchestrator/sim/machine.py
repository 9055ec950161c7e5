"""What this machine is and may do: platform, root, apt, its package sources, where state lies."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from orchestrator.sim import aptsources
from orchestrator.sim.process import Say, run


def state_dir() -> Path:
    """The operator's state (`$ORCH_STATE` or `~/.local/state/orch`), made when it is missing."""
    path = Path(os.environ.get("ORCH_STATE") or Path.home() / ".local" / "state" / "orch")
    path.mkdir(parents=True, exist_ok=True)
    return path


def is_linux() -> bool:
    return sys.platform.startswith("linux")


def has_apt() -> bool:
    return is_linux() and shutil.which("apt-get") is not None


def may_install() -> bool:
    """Whether packages can be installed here without asking anybody."""
    return has_apt() and os.geteuid() == 0


def release() -> dict[str, str]:
    """/etc/os-release, or nothing where there is none."""
    path = Path("/etc/os-release")
    return aptsources.os_release(path.read_text()) if path.exists() else {}


def apt_sources(root: Path = Path("/etc/apt")) -> list[aptsources.Source]:
    """Every enabled binary source of this machine."""
    files = [root / "sources.list", *sorted((root / "sources.list.d").glob("*"))]
    found: list[aptsources.Source] = []
    for file in files:
        if file.suffix in (".list", ".sources") and file.is_file():
            found += aptsources.parse(file.read_text(errors="replace"), deb822=file.suffix == ".sources")
    return found


def suite_sources(suite: str) -> list[aptsources.Source]:
    """This machine's sources for another Debian suite; empty if it is not a Debian machine."""
    about = release()
    if about.get("ID") != "debian":
        return []
    return aptsources.derive(apt_sources(), about.get("VERSION_CODENAME", ""), suite)


def apt_install(packages: list[str], say: Say) -> None:
    """`apt-get install` of `packages`, as root, asking nothing. Raises PreflightError."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    say(f"installing {' '.join(packages)} (apt-get)")
    run(["apt-get", "update", "-q"], timeout=180, check=False, env=env, what="update the package lists")
    argv = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    run(argv, timeout=600, env=env, what=f"install {' '.join(packages)}")
