"""The registry as seen from here: a tiny one on 127.0.0.1, a scripted engine for the rest."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from orchestrator import registry
from orchestrator.errors import BuildError, RegistryError
from orchestrator.progress import PushProgress
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
        with pytest.raises(RegistryError, match=f"localhost:{closed_port} does not answer: Connection refused") as caught:
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
    """A scripted engine: `push` gives these messages, `get_registry_data` raises or returns."""

    def __init__(self, messages: list[Any] = (), data: Any = None) -> None:  # type: ignore[assignment]
        self.api = SimpleNamespace(push=self._push)
        self.images = SimpleNamespace(get_registry_data=self._data)
        self._messages, self._answer = messages, data
        self.closed = False

    def _push(self, repository: str, tag: str, stream: bool, decode: bool) -> Iterator[dict[str, Any]]:
        assert (repository, tag, stream, decode) == ("reg.example/team/x", "t1", True, True)
        for message in self._messages:
            if isinstance(message, Exception):
                raise message
            yield message

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


def test_push_gives_the_digest_and_passes_progress(monkeypatch: pytest.MonkeyPatch):
    messages = [{"status": "Pushed", "id": "a"}, {"aux": {"Tag": "t1", "Digest": DIGEST, "Size": 1}}, {"status": "t1: ok"}]
    made = engine_of(monkeypatch, messages=messages)
    seen: list[dict[str, Any]] = []
    assert registry.push(REMOTE, seen.append) == DIGEST
    assert seen == messages and made.closed


@pytest.mark.parametrize(
    ("message", "says", "hint"),
    [
        ({"error": "denied: requested access to the resource is denied"}, "refuses reg.example/team/x", "docker login"),
        ({"error": "Get https://reg.example: dial tcp 1.2.3.4:443: connect: connection refused"}, "does not answer", "network"),
        ({"error": "unknown: write /data: no space left on device"}, "no space left", "disk"),
        ({"error": "something odd"}, "something odd", None),
        (requests.ConnectionError("connection aborted"), "push of reg.example/team/x:t1 failed", None),
    ],
)
def test_a_push_that_fails(message: Any, says: str, hint: str | None, monkeypatch: pytest.MonkeyPatch):
    engine_of(monkeypatch, messages=[message])
    with pytest.raises(RegistryError, match=says.replace(".", r"\.")) as caught:
        registry.push(REMOTE)
    assert (hint or "") in (caught.value.hint or "")


def test_a_push_without_a_digest_is_no_success(monkeypatch: pytest.MonkeyPatch):
    engine_of(monkeypatch, messages=[{"status": "x"}])
    with pytest.raises(RegistryError, match="without a digest"):
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
    with pytest.raises(RegistryError, match="credentials for reg.example"):
        registry.auth_config_json("reg.example")


def test_push_progress_without_a_terminal():
    said: list[str] = []
    with PushProgress(said.append) as progress:
        for message in (
            {"status": "The push refers to repository"},
            {"id": "aa", "status": "Pushing", "progressDetail": {"current": 512, "total": 2_500_000}},
            {"id": "aa", "status": "Pushing", "progressDetail": {"current": 2_500_000, "total": 2_500_000}},
            {"id": "aa", "status": "Pushed"},
            {"id": "bb", "status": "Layer already exists"},
        ):
            progress(message)
    assert said == ["layer aa pushed, 2.5 MB"]
