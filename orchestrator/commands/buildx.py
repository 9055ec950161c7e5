"""`docker buildx build`: its arguments, pip's settings inside it, and what its output says of a failure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.commands import shell

SECRET_PIP = "pip"
"""Build secret with a pip.conf: index URLs (they may hold passwords), wheel folder."""

SECRET_CA = "ca"
"""Build secret with the CA bundle of an intercepting proxy."""

SECRET_LIMIT = 500_000
"""BuildKit refuses a secret of more bytes than this."""

PROXY_ARGS = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "FTP_PROXY", "ALL_PROXY")
"""Build arguments that BuildKit keeps out of history and cache keys by itself."""


@dataclass(frozen=True)
class BuildSecret:
    """A file or a variable of our own environment that a step may mount; its content is never on argv."""

    id: str
    src: str = ""
    env: str = ""

    @property
    def flag(self) -> str:
        key, value = ("src", self.src) if self.src else ("env", self.env)
        return f"id={self.id}," + _csv(f"{key}={value}")


def build_argv(
    tag: str,
    *,
    dockerfile: str,
    target: str = "",
    build_args: Mapping[str, str | None] | None = None,
    labels: Mapping[str, str] | None = None,
    secrets: Sequence[BuildSecret] = (),
    platform: str = "",
    progress: str = "auto",
) -> list[str]:
    """The build of a context that comes as a tar on stdin, loaded into the engine as `tag`.

    A build argument whose value is None is taken from the environment, so that it stays off argv.
    """
    argv = ["docker", "buildx", "build", "--load", f"--progress={progress}", "-f", dockerfile, "-t", tag]
    if target:
        argv += ["--target", target]
    if platform:
        argv += ["--platform", platform]
    for name, value in (build_args or {}).items():
        argv += ["--build-arg", name if value is None else f"{name}={value}"]
    for name, value in (labels or {}).items():
        argv += ["--label", f"{name}={value}"]
    for secret in secrets:
        argv += ["--secret", secret.flag]
    return [*argv, "-"]


def inspect_argv(names: Sequence[str]) -> list[str]:
    """Prints the tags and digests of those of `names` that the engine has; ends with 1 if one is missing."""
    return ["docker", "image", "inspect", "--format", "{{json .RepoTags}}{{json .RepoDigests}}", *names]


def parse_inspect(output: str, names: Sequence[str]) -> set[str]:
    """Those of `names` that stand in the output of `inspect_argv`."""
    # The engine shows names of the default registry in their short form.
    return {name for name in names if f'"{name.removeprefix("docker.io/").removeprefix("library/")}"' in output}


def render(argv: Sequence[str]) -> str:
    """The command as one line of shell, for the dry run."""
    return shell.join(argv)


@dataclass(frozen=True)
class PipSettings:
    """Where packages come from. None of it ever lies in a layer."""

    index_url: str = ""
    extra_index_urls: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    timeout: str = ""

    def config(self, *, wheels: str = "") -> str:
        """pip.conf; `wheels` is the folder inside the build step, empty for none."""
        rows = ["[global]"]
        if self.index_url:
            rows.append(f"index-url = {_percent(self.index_url)}")
        links = ([wheels] if wheels else []) + [link for link in self.find_links if "://" in link]
        for key, values in (
            ("extra-index-url", self.extra_index_urls),
            ("trusted-host", self.trusted_hosts),
            ("find-links", links),
        ):
            if values:
                rows.append(f"{key} =" + "".join(f"\n    {_percent(value)}" for value in values))
        if self.timeout:
            rows.append(f"timeout = {self.timeout}")
        return "\n".join(rows) + "\n"


@dataclass(frozen=True)
class Failure:
    """What a failed build says: the step that failed, the reason, and that step's last lines."""

    step: str = ""
    reason: str = ""
    lines: tuple[str, ...] = field(default=())


_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_STEP = re.compile(r"^ > \[(?P<step>[^\]]+)\](?: (?P<command>.*?))?:?\s*$")
_TIMED = re.compile(r"^(?:#\d+ )?\d+\.\d+ ")
_LAST_LINES = 15


def parse_failure(output: str) -> Failure:
    """Reads the closing report of buildx: the block between two rulers, and the `ERROR:` line after it."""
    rows = [row.rstrip() for row in _ANSI.sub("", output).split("\n")]
    reason = ""
    for row in reversed(rows):
        if row.startswith(("ERROR: ", "error: ")):
            reason = row.partition(": ")[2].removeprefix("failed to solve: ")
            break
    start = max((at for at, row in enumerate(rows) if _STEP.match(row)), default=None)
    if start is None:
        last = [row for row in rows if row.strip()][-_LAST_LINES:]
        return Failure("", reason or (last[-1].strip() if last else ""), tuple(last))
    match = _STEP.match(rows[start])
    assert match is not None
    lines = []
    for row in rows[start + 1 :]:
        if row.startswith("------"):
            break
        lines.append(_TIMED.sub("", row))
    step = match["step"] + (f" {match['command']}" if match["command"] else "")
    return Failure(step, reason, tuple(line for line in lines if line.strip())[-_LAST_LINES:])


_NO_PLUGIN = r"(?i)is not a docker command|unknown command: docker buildx|unknown [a-z ]*flag: ('f'|--load)"
_ADVICE = (
    (
        r"no space left on device",
        "free some disk: `docker system df` shows Docker's part, `docker builder prune` frees build cache",
    ),
    (
        r"(?i)cannot connect to the docker daemon|error during connect|docker daemon is not running",
        "start Docker (Docker Desktop, `systemctl start docker`, or `orch sim up` where it may start one)",
    ),
    (
        _NO_PLUGIN,
        "install the package docker-buildx-plugin (or docker-buildx); `orch sim up` gets it too",
    ),
    (
        r"(?i)certificate verify failed|unable to get local issuer|x509:",
        "set image.ca_bundle in orch.yaml to the CA bundle of your proxy (or PIP_CERT in your environment)",
    ),
    (
        r"No matching distribution found|Could not find a version that satisfies",
        "set image.index_url or image.wheels in orch.yaml to where these packages are",
    ),
    (
        r"(?i)permission denied.*docker\.sock|docker\.sock.*permission denied",
        "let your user use Docker: add it to the group docker and log in again",
    ),
    (
        r"(?i)failed to resolve source metadata|failed to do request|pull access denied|manifest unknown",
        "check image.base in orch.yaml; without a registry `orch sim up` makes a base from Debian packages",
    ),
)


def lacks_plugin(output: str) -> bool:
    """Whether it was the `docker` command itself that did not know what `buildx` is."""
    return re.search(_NO_PLUGIN, output) is not None


def advise(output: str) -> str | None:
    """What to do about a failed build, where its output lets one tell."""
    return next((advice for pattern, advice in _ADVICE if re.search(pattern, output)), None)


def _csv(field_text: str) -> str:
    """A field of the comma-separated value that `--secret` takes."""
    if any(char in field_text for char in ',"\n'):
        return '"' + field_text.replace('"', '""') + '"'
    return field_text


def _percent(value: str) -> str:
    """pip's reader interpolates nothing (RawConfigParser), so a value only has to stay on its line."""
    return " ".join(value.split())
