"""The image of a job: what goes in, the tag that follows from it, and its build.

A plan contacts nothing: the same files give the same tag on every machine. With our Dockerfile there are two
builds: `orch-deps:<hash>` (base, torch, requirements; stays on this machine) and the code on top of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator import context
from orchestrator.commands import buildx
from orchestrator.commands.buildx import BuildSecret
from orchestrator.context import Entry, HashCache
from orchestrator.errors import BuildError, ConfigError
from orchestrator.packages import Sources, wheel_facts
from orchestrator.specs import ImageRef
from orchestrator.tee import run_tee

DEFAULT_BASE = "python:3.11-slim-bookworm"
LOCAL_BASE = "orch-base:bookworm"
"""The same thing made from Debian packages by `orch sim up`, used where DEFAULT_BASE cannot be pulled."""

DEPS_REPOSITORY = "orch-deps"
LABEL_CONTENT = "orch.content"
"""Label of every image that orch has built, with the hash of what went in."""

LOCKS = (("uv.lock", "pyproject.toml"), ("pylock.toml",), ("poetry.lock", "pyproject.toml"))
"""What a project's exact dependencies are read from, the first set that is complete."""
_ENGINE_PATIENCE = 30.0
_RECIPE = 2
"""Counts up when the way an image is put together changes without a change of any file that is hashed."""


@dataclass(frozen=True)
class Build:
    """One `docker buildx build`: the tag it makes and the exact context it is given."""

    tag: str
    entries: tuple[Entry, ...] = field(repr=False)
    dockerfile: str
    target: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    platform: str = ""

    def argv(self, secrets: Iterable[BuildSecret] = (), *, progress: str = "auto") -> list[str]:
        proxies = {name: None for name in _proxy_names() if name not in self.args}
        return buildx.build_argv(
            self.tag,
            dockerfile=self.dockerfile,
            target=self.target,
            build_args={**self.args, **proxies},
            labels={LABEL_CONTENT: self.label},
            secrets=tuple(secrets),
            platform=self.platform,
            progress=progress,
        )


@dataclass(frozen=True)
class BuildPlan:
    """The builds, in order, that make `image`. `deps` is None for the user's own Dockerfile."""

    image: ImageRef
    code: Build
    deps: Build | None = None
    base: str = ""
    notes: tuple[str, ...] = ()

    def on_base(self, base: str) -> BuildPlan:
        """The same plan on another base image; the tag, which says what was asked for, stays."""
        if self.deps is None or base == self.base:
            return self
        return replace(self, base=base, deps=replace(self.deps, args={**self.deps.args, "BASE_IMAGE": base}))

    def commands(self) -> list[str]:
        """The builds as lines of shell, for the dry run."""
        return [buildx.render(build.argv()) for build in (self.deps, self.code) if build]


def plan(
    *,
    repository: str,
    root: Path,
    variant: str = "cpu",
    base: str | None = None,
    dockerfile: Path | None = None,
    platform: str | None = None,
    build_args: Mapping[str, str] | None = None,
    wheels: Path | None = None,
    exclude: Iterable[Path] = (),
    cache: HashCache | None = None,
) -> BuildPlan:
    """The plan for the code in `root`; `wheels` counts when the project names it. Contacts nothing.

    Raises BuildError or ConfigError for files that cannot be read.
    """
    names = context.list_files(root, exclude=exclude)
    args = {str(key): str(value) for key, value in (build_args or {}).items()}
    facts: dict[str, Any] = {
        "recipe": _RECIPE,
        "platform": platform or "",
        "args": args,
        "wheels": wheel_facts(wheels),
    }
    if dockerfile is not None:
        return _plan_own(repository, root, names, dockerfile, facts, cache)
    facts |= {"base": base or DEFAULT_BASE, "variant": variant}
    files = package_folder("images")
    recipe = context.entries(files, ["Dockerfile"], "")
    user, notes = _user_requirements(root, names)
    setup = [*recipe, *context.entries(files, ["setup.sh"], "setup/"), *_requirements(files, variant), *user]
    deps_hash = context.content_hash(setup, facts)[:16]
    trainer = package_folder("trainer")
    code = [
        *context.entries(trainer, context.walk_package(trainer), "orch/trainer/", cache),
        *context.entries(root, names, "root/workspace/", cache),
    ]
    image = ImageRef(repository, context.content_hash(code, {"deps": deps_hash})[:16])
    deps = Build(
        tag=f"{DEPS_REPOSITORY}:{deps_hash}",
        entries=(*setup, Entry("user/"), Entry("wheels/")),
        dockerfile="Dockerfile",
        target="deps",
        args={"BASE_IMAGE": facts["base"], "VARIANT": variant, **args},
        label=deps_hash,
        platform=platform or "",
    )
    top = Build(
        tag=image.tagged,
        entries=(*recipe, *code, Entry("orch/trainer/"), Entry("root/workspace/")),
        dockerfile="Dockerfile",
        target="image",
        args={"DEPS": deps.tag, **args},
        label=image.tag,
        platform=platform or "",
    )
    return BuildPlan(image, top, deps, facts["base"], notes)


def _plan_own(
    repository: str,
    root: Path,
    names: list[str],
    dockerfile: Path,
    facts: Mapping[str, Any],
    cache: HashCache | None,
) -> BuildPlan:
    """The user's own Dockerfile on the user's own files."""
    path = dockerfile if dockerfile.is_absolute() else root / dockerfile
    if not path.is_file():
        raise ConfigError(f"there is no Dockerfile {path}", hint="check image.dockerfile in orch.yaml")
    parts = context.entries(root, names, "", cache)
    inside = os.path.relpath(path, root)
    if inside not in {entry.path for entry in parts}:
        inside = ".orch.Dockerfile"
        parts.append(Entry.text(inside, path.read_bytes()))
    content = context.content_hash(parts, {**facts, "dockerfile": inside})[:16]
    image = ImageRef(repository, content)
    step = Build(image.tagged, tuple(parts), inside, "", facts["args"], content, facts["platform"])
    return BuildPlan(image, step)


def package_folder(name: str) -> Path:
    """`images` or `trainer`: beside this package, in a checkout as in an installed wheel."""
    folder = Path(__file__).resolve().parent.parent / name
    if not folder.is_dir():
        raise BuildError(f"this installation of orch lacks its folder {name}", hint="install orch again")
    return folder


def _requirements(files: Path, variant: str) -> list[Entry]:
    """The trainer's requirements of `variant` under the names that the Dockerfile knows."""
    found = []
    for suffix in ("", ".no-deps"):
        path = files / f"requirements-{variant}{suffix}.txt"
        if path.is_file():
            found.append(Entry.text(f"setup/requirements{suffix}.txt", path.read_bytes()))
    if not found:
        raise BuildError(f"there is no {files}/requirements-{variant}.txt", hint="image.variant is cpu or cuda")
    return found


_INCLUDE = re.compile(r"^\s*(?:-r|-c|--requirement|--constraint)[ =]\s*(?P<file>\S+)")
_LOCAL = re.compile(r"^\s*(?:(?:-e|--editable)[ =]?\s*)?(?:\.{1,2}(?:[/\[\s]|$)|file:)")


def _user_requirements(root: Path, names: list[str]) -> tuple[list[Entry], tuple[str, ...]]:
    """The project's dependencies: a lock with pyproject.toml, else requirements.txt and what it includes."""
    have = set(names)
    for wanted in LOCKS:
        if have.issuperset(wanted):
            return context.entries(root, wanted, "user/"), ()
    if "requirements.txt" not in have:
        return [], ()
    made: dict[str, Entry] = {}
    notes: list[str] = []
    todo = ["requirements.txt"]
    while todo:
        name = todo.pop()
        if name in made:
            continue
        path = root / name
        if not path.is_file():
            raise BuildError(f"{root / 'requirements.txt'} includes {name}, which does not exist")
        rows = []
        for row in path.read_text(encoding="utf-8", errors="replace").splitlines():
            included = _INCLUDE.match(row)
            if included and "://" not in included["file"]:
                todo.append(os.path.normpath(os.path.join(os.path.dirname(name), included["file"])))
            if _LOCAL.match(row):
                notes.append(f"{name}: {row.strip()!r} is left out; /workspace is on the import path anyway")
                continue
            rows.append(row)
        made[name] = Entry.text("user/" + name, "\n".join(rows) + "\n")
    if any(name.startswith("../") for name in made):
        raise BuildError("requirements.txt includes a file from outside image.context")
    return list(made.values()), tuple(notes)


def _proxy_names() -> list[str]:
    return [name for name in buildx.PROXY_ARGS if os.environ.get(name)]


def present(*names: str) -> set[str]:
    """Those of `names` that the engine has; one call of the `docker` command: it starts faster than the SDK.

    Raises BuildError when no engine answers.
    """
    try:
        done = subprocess.run(
            buildx.inspect_argv(names), capture_output=True, text=True, timeout=_ENGINE_PATIENCE, check=False
        )
    except FileNotFoundError:
        raise BuildError("docker is not installed on this machine", hint="install Docker, or Docker Desktop") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"the Docker engine says nothing for {_ENGINE_PATIENCE:.0f} s", hint="restart it") from None
    unknown = [row for row in done.stderr.splitlines() if row.strip() and "no such image" not in row.lower()]
    if done.returncode and unknown:
        raise BuildError(f"no Docker engine answers: {unknown[-1]}", hint=buildx.advise(done.stderr))
    return buildx.parse_inspect(done.stdout, names)


def build(step: Build, sources: Sources) -> None:
    """Runs one build, its progress on stderr as Docker shows it.

    Raises BuildError with the failing step, its last lines and, where it can be told, what to do.
    """
    secrets, secret_env = [], {}
    if step.target != "image":
        secret_env["ORCH_PIP_CONFIG"] = sources.pip.config(wheels="/mnt/wheels" if sources.packages else "")
        secrets.append(BuildSecret(buildx.SECRET_PIP, env="ORCH_PIP_CONFIG"))
        if sources.ca_bundle is not None:
            secrets.append(BuildSecret(buildx.SECRET_CA, src=str(sources.ca_bundle)))
    parts = step.entries + (sources.packages if step.target == "deps" else ())
    env = {**os.environ, **secret_env, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    env.setdefault("BUILDX_BUILDER", _builder(os.environ))

    def feed(stream: BinaryIO) -> None:
        context.write_tar(parts, stream)

    code, output = run_tee(step.argv(secrets), env=env, feed=feed)
    if code:
        raise _failure(step, code, output)


def _builder(environ: Mapping[str, str]) -> str:
    """The engine's own builder: only that one sees the engine's images, and needs no `--load` copy."""
    if environ.get("DOCKER_HOST"):
        return "default"
    if environ.get("DOCKER_CONTEXT"):
        return environ["DOCKER_CONTEXT"]
    folder = Path(environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        return str(json.loads((folder / "config.json").read_text()).get("currentContext") or "default")
    except (OSError, ValueError):
        return "default"


def _failure(step: Build, code: int, output: str) -> BuildError:
    if buildx.lacks_plugin(output):
        return BuildError("docker has no buildx plugin on this machine", hint=buildx.advise(output))
    found = buildx.parse_failure(output)
    where = f" at [{found.step}]" if found.step else ""
    reason = found.reason or f"docker buildx ended with exit code {code}"
    return BuildError(f"the build of {step.tag} failed{where}: {reason}", hint=buildx.advise(output), lines=found.lines)
