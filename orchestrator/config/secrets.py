"""Values of the secrets that a job needs, and its public environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError
from orchestrator.files import is_env_name, parse_env, private, read_text
from orchestrator.specs import Secret

if TYPE_CHECKING:
    from orchestrator.config.schema import Config


def collect(config: Config, environ: Mapping[str, str] | None = None) -> dict[str, Secret]:
    """The value of each name in run.secrets, from `environ` (the operator's environment), else from run.secrets_file.

    Raises ConfigError for a name that neither has, and for a secrets file that others can read.
    """
    environ = os.environ if environ is None else environ
    stored: dict[str, str] = {}
    path = config.run.secrets_file
    if path is not None:
        stored = parse_env(read_text(private(path), "secrets file"), path)
    missing = [name for name in config.run.secrets if name not in environ and name not in stored]
    if missing:
        names = ", ".join(missing)
        raise ConfigError(
            f"run.secrets: {names} is in neither the environment nor run.secrets_file"
            if len(missing) == 1
            else f"run.secrets: {names} are in neither the environment nor run.secrets_file",
            hint=f"export {missing[0]}=…, or write it into run.secrets_file (mode 600)",
        )
    return {name: Secret(environ[name] if name in environ else stored[name]) for name in config.run.secrets}


def environment(config: Config, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The job's public environment: run.env_file, then run.env over it, then `extra`.

    Raises ConfigError for a name that is also a secret or that belongs to orch.
    """
    values: dict[str, str] = {}
    if config.run.env_file is not None:
        values.update(parse_env(read_text(config.run.env_file, "run.env_file"), config.run.env_file))
    values.update(config.run.env)
    values.update(extra or {})
    for name, value in values.items():
        if not is_env_name(name) or name.startswith("ORCH_"):
            raise ConfigError(f"environment: {name!r} cannot be set by a job")
        if name in config.run.secrets:
            raise ConfigError(f"environment: {name} is one of run.secrets and would be shown here")
        if "\0" in value:
            raise ConfigError(f"environment: the value of {name} holds a null byte")
    return values
