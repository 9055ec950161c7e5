"""A registry as the operator's machine sees it: is it there, which digest has a tag, push, credentials."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BuildError, RegistryError
from orchestrator.specs import ImageRef, Secret
from orchestrator.tee import run_tee

if TYPE_CHECKING:
    from docker import DockerClient

MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
)
LOCAL_HINT = "`orch registry up` starts one there; for the simulated cluster `orch sim up`"
NO_ENGINE_HINT = "start Docker (Docker Desktop, or `systemctl start docker`); `docker info` must answer"

_TIMEOUT = 10.0
_NETWORK = re.compile(r"(?i)dial tcp|connection refused|no such host|i/o timeout|timeout|tls|x509|no route|EOF")


def parse_ref(text: str) -> ImageRef:
    """`repository[:tag][@digest]` as an ImageRef; `latest` where there is no tag."""
    name, _, digest = text.partition("@")
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        head, tag = name, "latest"
    return ImageRef(head, tag, digest or None)


def engine(*, timeout: float = 60.0) -> DockerClient:
    """The Docker engine that the `docker` command would use, its context included.

    Raises BuildError when none answers.
    """
    import docker
    from docker.errors import DockerException

    try:
        return docker.DockerClient(timeout=timeout, version="auto", **_endpoint())
    except (DockerException, OSError) as error:
        raise BuildError(f"no Docker engine answers: {_reason(error)}", hint=NO_ENGINE_HINT) from None


def _endpoint() -> dict[str, Any]:
    """Address and TLS of the engine: DOCKER_HOST, else the current `docker context`, else the usual."""
    from docker.utils import kwargs_from_env

    if os.environ.get("DOCKER_HOST"):
        return kwargs_from_env()
    from docker.context import ContextAPI

    context = ContextAPI.get_current_context()
    if context is None or context.name == "default" or not context.Host:
        return {}
    tls = context.TLSConfig
    return {"base_url": context.Host, **({"tls": tls} if tls else {})}


def digest(ref: ImageRef) -> str | None:
    """The digest that `ref`'s tag has in its registry, None where there is no such tag.

    A registry on this machine is asked directly and needs no engine; any other is asked by the engine, with
    the operator's credentials. Raises RegistryError when it does not answer, BuildError without an engine.
    """
    if ref.local_port is not None:
        response = _local(ref, "HEAD", f"/v2/{_path(ref)}/manifests/{ref.tag}")
        if response is not None and response[0] in (200, 404):
            status, found = response
            return found or None if status == 200 else None
    return _digest_by_engine(ref)


def ping(ref: ImageRef) -> None:
    """Sees that `ref`'s registry answers at all. Raises RegistryError."""
    if ref.local_port is not None:
        _local(ref, "GET", "/v2/")
    else:
        _digest_by_engine(ref)


def _path(ref: ImageRef) -> str:
    """The repository's name inside its registry."""
    return ref.repository.removeprefix(ref.registry + "/")


def _local(ref: ImageRef, method: str, path: str) -> tuple[int, str] | None:
    """(status, digest) of a request to a registry on this machine; None if what answers speaks no HTTP."""
    host, _, _ = ref.registry.partition(":")
    # The name may resolve to ::1 first, where the port of an SSH forward or a container is not open.
    address = "127.0.0.1" if host == "localhost" else host
    connection = http.client.HTTPConnection(address, ref.local_port, timeout=_TIMEOUT)
    try:
        connection.request(method, path, headers={"Accept": MANIFESTS})
        response = connection.getresponse()
        response.read()
        return response.status, response.getheader("Docker-Content-Digest", "")
    except http.client.HTTPException:
        return None
    except OSError as error:
        raise unreachable(ref, _reason(error)) from None
    finally:
        connection.close()


def unreachable(ref: ImageRef, reason: str) -> RegistryError:
    elsewhere = f"check the name, your network and `docker login {ref.registry}`"
    hint = LOCAL_HINT if ref.local_port is not None else elsewhere
    return RegistryError(f"the registry {ref.registry} does not answer: {reason}", hint=hint)


def _digest_by_engine(ref: ImageRef) -> str | None:
    from docker.errors import APIError, NotFound

    client = engine()
    try:
        return client.images.get_registry_data(ref.tagged).id
    except NotFound:
        return None
    except APIError as error:
        reason = str(error.explanation or error)
        if _NETWORK.search(reason):
            raise unreachable(ref, reason) from None
        # "denied" is also said of a repository that does not exist yet; a push will tell the two apart.
        if error.status_code in (401, 403) or re.search(r"(?i)denied|unauthorized|unknown", reason):
            return None
        raise RegistryError(f"the registry {ref.registry} refuses: {reason}") from None
    finally:
        client.close()


_DIGEST = re.compile(r"\bdigest: (sha256:[0-9a-f]{64}) size:")


def push(ref: ImageRef) -> str:
    """Pushes `ref`'s tag as `docker push` does, its progress on stderr, and gives the digest.

    The command and not the SDK: it knows every credential helper and context, looks as people expect, and starts
    0.2 s sooner. Raises RegistryError when the registry does not answer or refuses, BuildError without an engine.
    """
    code, output = run_tee(["docker", "push", ref.tagged])
    found = _DIGEST.findall(output)
    if code == 0 and found:
        return str(found[-1])
    rows = [row.strip() for row in output.replace("\r", "\n").splitlines() if row.strip()]
    reason = rows[-1] if rows else f"docker push ended with exit code {code} and no word"
    if re.search(r"(?i)cannot connect to the docker daemon|docker daemon is not running", output):
        raise BuildError(f"no Docker engine answers: {reason}", hint=NO_ENGINE_HINT)
    raise _push_error(ref, reason)


def _push_error(ref: ImageRef, reason: str) -> RegistryError:
    if re.search(r"(?i)denied|unauthorized|authentication|no basic auth", reason):
        hint = f"`docker login {ref.registry}`, and check that you may push to {ref.repository}"
        return RegistryError(f"the registry {ref.registry} refuses {ref.repository}: {reason}", hint=hint)
    if re.search(r"(?i)no space left", reason):
        hint = "free some disk where the registry keeps its data"
        return RegistryError(f"the registry {ref.registry} has no space left: {reason}", hint=hint)
    if _NETWORK.search(reason):
        return unreachable(ref, reason)
    return RegistryError(f"push of {ref.tagged} failed: {reason}")


def auth_config_json(registry: str) -> Secret | None:
    """A docker `config.json` with the operator's credentials for `registry` alone; None where there are none.

    Credential helpers are asked. Nodes get it on stdin into a temporary DOCKER_CONFIG.
    Raises RegistryError when a helper fails.
    """
    from docker import auth
    from docker.errors import DockerException

    key = auth.INDEX_URL if registry == auth.INDEX_NAME else registry
    try:
        found = auth.load_config().resolve_authconfig(registry)
    except DockerException as error:
        raise RegistryError(
            f"cannot get the credentials for {registry}: {_reason(error)}", hint=f"`docker login {registry}`"
        ) from None
    if not found:
        return None
    token = found.get("IdentityToken") or found.get("identitytoken")
    name = found.get("username") or found.get("Username")
    password = found.get("password") or found.get("Password")
    if token:
        entry = {"auth": base64.b64encode(f"{name or '<token>'}:".encode()).decode(), "identitytoken": token}
    elif name and password:
        entry = {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}
    else:
        return None
    return Secret(json.dumps({"auths": {key: entry}}))


def _reason(error: BaseException) -> str:
    """The last word of an error whose text nests its causes, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    inner = re.search(r"(?:FileNotFoundError|ConnectionRefusedError|PermissionError)\(\d+, '([^']+)'\)", text)
    return inner[1] if inner else text[:300]
