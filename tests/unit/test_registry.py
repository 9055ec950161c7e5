"""The registry as seen from here: a tiny one on 127.0.0.1, a scripted engine for the rest."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from orchestrator import registry
from orchestrator.errors import BuildError, RegistryError
from orchestrator.specs import ImageRef

DIGEST = "sha256:" + "ab" * 32


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        known = self.path == "/v2/team/x/manifests/t1" and "oci.image.index" in self.headers["Accept"]
        self.send_response(200 if known else 404)
        if known:
            self.send_header("Docker-Content-Digest", DIGEST)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_digest_of_a_local_registry(port: int):
    assert registry.digest(ImageRef(f"localhost:{port}/team/x", "t1")) == DIGEST
    assert registry.digest(ImageRef(f"127.0.0.1:{port}/team/x", "t2")) is None
    registry.ping(ImageRef(f"localhost:{port}/team/x"))


def test_a_registry_that_is_down_is_named_with_a_hint(closed_port: int):
    for call in (registry.digest, registry.ping):
        says = f"localhost:{closed_port} does not answer: Connection refused"
        with pytest.raises(RegistryError, match=says) as caught:
            call(ImageRef(f"localhost:{closed_port}/team/x", "t1"))
        assert "orch registry up" in (caught.value.hint or "")
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a/b", ImageRef("a/b", "latest")),
        ("host:5000/a/b", ImageRef("host:5000/a/b", "latest")),
        ("host:5000/a/b:1.0", ImageRef("host:5000/a/b", "1.0")),
        (f"a@{DIGEST}", ImageRef("a", "latest", DIGEST)),
        (f"host:5000/a:t@{DIGEST}", ImageRef("host:5000/a", "t", DIGEST)),
    ],
)
def test_parse_ref(text: str, wanted: ImageRef):
    assert registry.parse_ref(text) == wanted


class Engine:
    """A scripted engine: `get_registry_data` raises or returns `data`."""

    def __init__(self, data: Any) -> None:
        self.images = SimpleNamespace(get_registry_data=self._data)
        self._answer = data
        self.closed = False

    def _data(self, name: str) -> Any:
        assert name == "reg.example/team/x:t1"
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def close(self) -> None:
        self.closed = True


REMOTE = ImageRef("reg.example/team/x", "t1")


def engine_of(monkeypatch: pytest.MonkeyPatch, **rest: Any) -> Engine:
    made = Engine(**rest)
    monkeypatch.setattr(registry, "engine", lambda **_: made)
    return made


def api_error(status: int, text: str) -> Exception:
    from docker.errors import APIError, NotFound

    response = requests.Response()
    response.status_code = status
    return (NotFound if status == 404 else APIError)("failed", response, text)


def test_digest_of_a_remote_registry(monkeypatch: pytest.MonkeyPatch):
    made = engine_of(monkeypatch, data=SimpleNamespace(id=DIGEST))
    assert registry.digest(REMOTE) == DIGEST
    assert made.closed
    for absent in (api_error(404, "manifest unknown"), api_error(403, "denied"), api_error(500, "name unknown")):
        engine_of(monkeypatch, data=absent)
        assert registry.digest(REMOTE) is None
    engine_of(monkeypatch, data=api_error(500, "Get https://reg.example/v2/: dial tcp: lookup: no such host"))
    with pytest.raises(RegistryError, match=r"reg\.example does not answer.*no such host"):
        registry.digest(REMOTE)


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a `docker` first on PATH that runs the given script."""

    def install(script: str) -> None:
        (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def test_push_gives_the_digest(docker: Callable[[str], None], capfd: pytest.CaptureFixture[str]):
    docker(
        '[ "$*" = "push reg.example/team/x:t1" ] || exit 9\n'
        f"echo 'The push refers to repository [reg.example/team/x]'; echo 't1: digest: {DIGEST} size: 1996'"
    )
    assert registry.push(REMOTE) == DIGEST
    shown = capfd.readouterr()
    assert "The push refers" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("last", "error", "says", "hint"),
    [
        (
            "denied: requested access to the resource is denied",
            RegistryError,
            "refuses reg.example/team/x",
            "docker login",
        ),
        ("Get https://reg.example: dial tcp 1.2.3.4:443: connect: refused", RegistryError, "not answer", "network"),
        ("unknown: write /data: no space left on device", RegistryError, "no space left", "disk"),
        ("something odd", RegistryError, "something odd", ""),
        ("Cannot connect to the Docker daemon at unix:///x.", BuildError, "no Docker engine", "start Docker"),
    ],
)
def test_a_push_that_fails(last: str, error: type[Exception], says: str, hint: str, docker: Callable[[str], None]):
    docker(f"echo 'The push refers to x'; echo '{last}' >&2; exit 1")
    with pytest.raises(error, match=says) as caught:
        registry.push(REMOTE)
    assert hint in (caught.value.hint or "")  # type: ignore[attr-defined]


def test_a_push_without_a_digest_is_no_success(docker: Callable[[str], None]):
    docker("echo done")
    with pytest.raises(RegistryError, match=r"push of reg\.example/team/x:t1 failed: done"):
        registry.push(REMOTE)


def test_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(BuildError, match="no Docker engine answers: No such file") as caught:
        registry.engine()
    assert "start Docker" in (caught.value.hint or "")


def test_the_engine_of_the_current_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert registry._endpoint() == {}
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    assert registry._endpoint()["base_url"] == "tcp://10.0.0.1:2375"


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def test_credentials_of_one_registry_only(docker_config: Path):
    coded = base64.b64encode(b"me:pass:word").decode()
    docker_config.write_text(json.dumps({"auths": {"reg.example": {"auth": coded}, "other.example": {"auth": coded}}}))
    found = registry.auth_config_json("reg.example")
    assert found is not None and "pass" not in repr(found)
    assert json.loads(found.reveal()) == {"auths": {"reg.example": {"auth": coded}}}
    assert registry.auth_config_json("third.example") is None


def test_no_docker_config_is_no_credentials(docker_config: Path):
    assert registry.auth_config_json("reg.example") is None


def test_credentials_of_a_helper(docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\ncat >/dev/null\necho \'{"ServerURL":"reg.example","Username":"me","Secret":"s3"}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    docker_config.write_text(json.dumps({"credHelpers": {"reg.example": "test"}}))
    found = registry.auth_config_json("reg.example")
    assert found is not None
    entry = json.loads(found.reveal())["auths"]["reg.example"]
    assert base64.b64decode(entry["auth"]) == b"me:s3"
    helper.write_text("#!/bin/sh\necho broken >&2\nexit 2\n")
    with pytest.raises(RegistryError, match=r"credentials for reg\.example"):
        registry.auth_config_json("reg.example")
