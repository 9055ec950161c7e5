"""The sections of orch.yaml, typed. Paths are resolved by `load`; nothing here touches a file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from orchestrator.errors import ConfigError, UsageError, unknown
from orchestrator.files import is_env_name
from orchestrator.specs import Secret, Storage

BACKENDS = ("ssh", "local", "slurm")
BUILT_IN = ("local",)
"""Targets that exist without being written down."""

_REPOSITORY = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*\Z"
)


def _text(value: Any) -> Any:
    """Numbers are taken as the text they were written as; booleans and nothing are a trap of YAML: refused."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is not text; put it in quotes")
    if isinstance(value, int | float):
        return str(value)
    return value


def _env_name(value: Any) -> Any:
    if isinstance(value, str) and not is_env_name(value):
        raise ValueError(f"{value!r} cannot be the name of an environment variable")
    if isinstance(value, str) and value.startswith("ORCH_"):
        raise ValueError(f"{value!r} belongs to orch; choose another name")
    return value


def _node_path(value: Any) -> Any:
    """A path on the nodes: absolute, or below the home of the node's user. `$NAME` is for Slurm's shell."""
    if isinstance(value, str) and not re.match(r"(/|~(/|\Z)|\$\{?[A-Za-z_])", value):
        raise ValueError(f"{value!r} must be absolute or begin with ~/")
    if isinstance(value, str) and ("\0" in value or "\n" in value):
        raise ValueError("a path cannot hold a line break")
    return value


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float | bool):
        raise ValueError("expected text, a number, true or false")
    return value


Scalar = Annotated[Any, BeforeValidator(_scalar)]
Text = Annotated[str, BeforeValidator(_text)]
EnvName = Annotated[str, BeforeValidator(_env_name)]
NodePath = Annotated[str, BeforeValidator(_node_path)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Image(Section):
    """What is built and pushed, or (`ref`) used as it is."""

    repository: str | None = None
    context: Path = Path(".")
    dockerfile: Path | None = None
    ref: str | None = None
    variant: Literal["cpu", "cuda"] | None = None
    base: str | None = None
    platform: str | None = None
    build_args: dict[str, Text] = {}
    ca_bundle: Path | None = None
    index_url: str | None = None
    extra_index_url: str | None = None
    wheels: Path | None = None

    @field_validator("repository")
    @classmethod
    def _is_a_repository(cls, value: str | None) -> str | None:
        if value is not None and not _REPOSITORY.match(value):
            raise ValueError(f"{value!r} is not a repository (host[:port]/path in lower case, without tag or digest)")
        return value


class MountSection(Section):
    source: NodePath
    target: str
    readonly: bool = False

    @field_validator("target")
    @classmethod
    def _is_absolute(cls, value: str) -> str:
        if not value.startswith("/"):
            raise ValueError(f"{value!r} must be absolute")
        if value == "/orch" or value.startswith("/orch/"):
            raise ValueError("/orch in the container belongs to orch; choose another folder")
        return value.rstrip("/") or "/"


class RunSection(Section):
    """The job: a recipe of our trainer or a command, and what its processes get."""

    recipe: str | None = None
    command: tuple[str, ...] | None = None
    launcher: Literal["torchrun", "none"] = "torchrun"
    set: dict[str, Any] = {}
    env: dict[EnvName, Text] = {}
    env_file: Path | None = None
    secrets: tuple[EnvName, ...] = ()
    secrets_file: Path | None = None
    mounts: tuple[MountSection, ...] = ()
    port: int = Field(29400, ge=1, le=65535)
    shm: str = Field("8g", pattern=r"^[0-9]+[bkmgBKMG]?$")
    grace: int = Field(30, ge=0)

    @field_validator("command", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise ValueError(f"not a command line: {error}") from None

    @model_validator(mode="after")
    def _consistent(self) -> RunSection:
        if self.recipe is not None and self.command:
            raise ValueError("recipe and command cannot both be given")
        both = sorted({*self.env} & {*self.secrets})
        if both:
            raise ValueError(f"{both[0]} is in env and in secrets; a secret does not belong in the file")
        targets = [mount.target for mount in self.mounts]
        for target in targets:
            if targets.count(target) > 1:
                raise ValueError(f"two mounts have the target {target}")
        return self


class StorageSection(Section):
    kind: Literal["local", "shared"] = "local"
    runs: NodePath = "~/.orch/runs"
    checkpoints: NodePath | None = None
    cache: NodePath = "~/.orch/cache"


class LocalSection(Section):
    python: Path = Path(".venv-trainer/bin/python")


class Target(Section):
    """One place to run: a backend and what it needs. `name` is its key in `targets`."""

    name: str = Field("", exclude=True)
    backend: Literal["ssh", "local", "slurm"] = "ssh"
    inventory: Path | None = None
    gpus: int | None = Field(None, ge=0)
    procs: int | None = Field(None, ge=1)
    login: str | None = None
    container: str | None = None
    shared: str | None = None
    prologue: tuple[str, ...] = ()
    sbatch: dict[str, Scalar] = {}

    @model_validator(mode="after")
    def _keys_fit(self) -> Target:
        if self.backend != "slurm":
            for key in ("login", "container", "shared", "prologue", "sbatch"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key} is for backend slurm, this is backend {self.backend}")
        if self.backend == "local" and self.inventory is not None:
            raise ValueError("backend local runs on this machine and takes no inventory")
        return self


class Config(Section):
    """orch.yaml, validated, its paths absolute."""

    name: Text | None = None
    image: Image = Image()
    run: RunSection = RunSection()
    storage: StorageSection = StorageSection()
    local: LocalSection = LocalSection()
    targets: dict[str, Target] = {}
    default_target: str | None = None
    _path: Path | None = PrivateAttr(None)
    _root: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def path(self) -> Path | None:
        """The file, None where there is none and the defaults hold."""
        return self._path

    @property
    def root(self) -> Path:
        """The folder that relative paths start from: the file's, else the working folder."""
        return self._root

    @property
    def where(self) -> str:
        """The file's name for messages."""
        return str(self._path) if self._path else "orch.yaml (there is none)"

    def target(self, name: str | None = None) -> Target:
        """The target `name`, else the default one. Raises UsageError."""
        known = {**{name: Target(name=name, backend="local") for name in BUILT_IN}, **self.targets}
        if name is not None:
            if name not in known:
                raise UsageError(unknown("target", name, list(known)), hint=f"targets are written in {self.where}")
            return known[name]
        if self.default_target is not None:
            return known[self.default_target]
        if len(self.targets) == 1:
            return next(iter(self.targets.values()))
        if self.targets:
            raise UsageError(
                f"which target? ({', '.join(sorted(known))})", hint="choose with --on, or set targets.default"
            )
        return Target(name="ssh", backend="ssh")

    def inventory_path(self, target: Target) -> Path:
        """The target's inventory file. Raises ConfigError where it names none."""
        if target.inventory is None:
            if self._path is None:
                raise ConfigError(
                    f"there is no orch.yaml in {self._root} or above it, so no nodes are known",
                    hint="go to your project's folder, write an orch.yaml, or give --inventory FILE",
                )
            raise ConfigError(
                f"target {target.name!r} names no inventory",
                hint=f"give --inventory FILE, or set targets.{target.name}.inventory in orch.yaml",
            )
        return target.inventory

    def repository(self) -> str:
        """image.repository. Raises ConfigError where it is missing."""
        if self.image.repository is None:
            raise ConfigError(
                f"{self.where}: image.repository is missing, so there is nowhere to push the image",
                hint="set image.repository (HOST[:PORT]/PATH), or image.ref to use an image as it is",
            )
        return self.image.repository

    def storage_spec(self) -> Storage:
        """The storage section as the layers below know it."""
        return Storage(**self.storage.model_dump())

    def secrets(self, environ: Any = None) -> dict[str, Secret]:
        """The values of run.secrets. Raises ConfigError; see `orchestrator.config.secrets.collect`."""
        from orchestrator.config.secrets import collect

        return collect(self, environ)
