"""The client plugins `docker buildx` and `docker compose`, from Debian's packages where they are missing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from orchestrator.errors import PreflightError
from orchestrator.sim import aptsources, machine
from orchestrator.sim.process import Say, docker, run, say

PACKAGES = {"buildx": ("docker-buildx",), "compose": ("docker-compose-v2", "docker-compose")}
_FIRST_SUITE = "trixie"
"""The first Debian suite with both; the binaries are static enough to run on the suite before it."""

_HINT = "install the packages docker-buildx-plugin and docker-compose-plugin (or your system's equivalents)"


def has_plugin(name: str) -> bool:
    return docker(name, "version", check=False, timeout=20).returncode == 0


def plugin_folder() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "cli-plugins"


def ensure_plugins(say: Say = say) -> None:
    """Makes `docker buildx` and `docker compose` answer. Raises PreflightError that says what to install."""
    missing = [name for name in PACKAGES if not has_plugin(name)]
    if not missing:
        return
    names = " and ".join(f"docker {name}" for name in missing)
    if not machine.has_apt():
        raise PreflightError(f"{names} does not answer", hint=_HINT)
    sources, suite = _sources()
    if not sources:
        raise PreflightError(f"{names} does not answer and no apt source offers it", hint=_HINT)
    say(f"getting {names} from the packages of {suite} into {plugin_folder()}")
    with tempfile.TemporaryDirectory(prefix="orch-plugins-") as folder:
        _fetch(missing, sources, Path(folder))
    for name in missing:
        if not has_plugin(name):
            raise PreflightError(f"docker {name} was put in {plugin_folder()} but does not run", hint=_HINT)


def _sources() -> tuple[list[aptsources.Source], str]:
    about = machine.release()
    codename = about.get("VERSION_CODENAME", "")
    if about.get("ID") == "debian":
        suite = _FIRST_SUITE if codename in ("bullseye", "bookworm") else codename
        return machine.suite_sources(suite), suite
    return machine.apt_sources(), codename or "this system"


def _fetch(names: list[str], sources: list[aptsources.Source], folder: Path) -> None:
    """Downloads and unpacks the packages with an apt state of its own: the machine's is not touched."""
    (folder / "sources.list").write_text(aptsources.render(sources))
    for part in ("state/lists/partial", "cache/archives/partial", "deb", "root"):
        (folder / part).mkdir(parents=True)
    # _apt must be able to enter, else apt complains that the download is not sandboxed.
    folder.chmod(0o755)
    apt = ["apt-get", "-q", "-o", f"Dir::Etc::sourcelist={folder}/sources.list"]
    apt += ["-o", "Dir::Etc::sourceparts=-", "-o", f"Dir::State={folder}/state"]
    apt += ["-o", "Dir::State::status=/var/lib/dpkg/status", "-o", f"Dir::Cache={folder}/cache"]
    apt += ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]
    run([*apt, "update"], timeout=180, what="read the package lists for docker's plugins")
    target = plugin_folder()
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        binary = _unpack(apt, name, folder)
        if binary is None:
            raise PreflightError(f"no package of this machine's sources holds docker {name}", hint=_HINT)
        fresh = target / f".docker-{name}.new"
        shutil.copyfile(binary, fresh)
        fresh.chmod(0o755)
        fresh.replace(target / f"docker-{name}")


def _unpack(apt: list[str], name: str, folder: Path) -> Path | None:
    """The plugin's binary out of the first package that has one (old docker-compose packages do not)."""
    for package in PACKAGES[name]:
        deb = folder / "deb" / package
        deb.mkdir()
        if run([*apt, "download", package], timeout=180, check=False, cwd=deb).returncode:
            continue
        for file in deb.glob("*.deb"):
            root = folder / "root" / package
            run(["dpkg-deb", "-x", str(file), str(root)], what=f"unpack {file.name}")
            binaries = [*root.rglob(f"cli-plugins/docker-{name}")]
            if binaries:
                return binaries[0]
    return None
