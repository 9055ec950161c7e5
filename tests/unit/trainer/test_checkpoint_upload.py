"""The second home of checkpoints: a mounted path, and S3 as boto3 speaks it to a small server."""

from __future__ import annotations

import http.server
import shutil
import threading
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from trainer.checkpoints import manifest, upload
from trainer.errors import CheckpointError, ConfigError


class _Bucket(http.server.BaseHTTPRequestHandler):
    """GET, PUT, DELETE and LIST of one bucket; `objects` in order of arrival."""

    objects: dict[str, bytes]
    log: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _key(self) -> str:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        return path.removeprefix("/bucket").lstrip("/")

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):  # SIZE;…\r\nDATA\r\n … 0\r\ntrailers
            plain = b""
            while (size := int(data.partition(b"\r\n")[0].partition(b";")[0], 16)) > 0:
                data = data.partition(b"\r\n")[2]
                plain, data = plain + data[:size], data[size + 2 :]
            data = plain
        self.objects[self._key()] = data
        self.log.append(f"put {self._key()}")
        self._answer(200)

    def do_DELETE(self) -> None:
        self.objects.pop(self._key(), None)
        self.log.append(f"delete {self._key()}")
        self._answer(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        if "list-type" not in query:
            found = self.objects.get(self._key())
            self._answer(404 if found is None else 200, found or b"")
            return
        prefix = query["prefix"][0]
        keys = [key for key in self.objects if key.startswith(prefix)]
        if "delimiter" in query:
            folders = {prefix + key[len(prefix) :].partition("/")[0] + "/" for key in keys}
            rows = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in folders)
        else:
            rows = "".join(f"<Contents><Key>{escape(key)}</Key></Contents>" for key in keys)
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        self._answer(200, text.encode())


@pytest.fixture(params=["mounted", "s3"])
def remote(request, tmp_path, monkeypatch):
    if request.param == "mounted":
        yield upload.open_remote(str(tmp_path / "remote"), "run")
        return
    handler = type("Handler", (_Bucket,), {"objects": {}, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_DEFAULT_REGION", "c")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield upload.open_remote("s3://bucket/some", "run")
    server.shutdown()
    server.server_close()


def _checkpoint(root: Path, step: int, text: str = "weights", save: str = "s", timeline: int = 0) -> Path:
    staging = manifest.stage(root, step)
    (staging / "inner").mkdir()
    (staging / "inner/a").write_text(text)
    (staging / "b").write_bytes(b"")
    head = {"step": step, "timeline": timeline, "world": 1, "layout": "full", "parallel": "one process", "save": save}
    return manifest.seal(staging, head, manifest.digest(staging, ["inner/a", "b"]))


def test_there_and_back(remote, tmp_path):
    assert upload.scan(remote) == ([], [])
    for step in (3, 12):
        upload.upload(remote, _checkpoint(tmp_path / "here", step, f"weights {step}"))
    found, passed_over = upload.scan(remote)
    assert sorted(one.step for one in found) == [3, 12] and not passed_over
    assert [one.step for one in upload.scan(remote, "step_00000003")[0]] == [3]
    path = upload.fetch(remote, "step_00000012", tmp_path / "there")
    assert path == tmp_path / "there/step_00000012"
    assert manifest.verify(path) == manifest.read(tmp_path / "here/step_00000012")
    assert (path / "inner/a").read_text() == "weights 12"


def test_the_manifest_comes_last_and_an_older_one_goes_first(remote, tmp_path, monkeypatch):
    upload.upload(remote, _checkpoint(tmp_path / "a", 3, "old", save="old"))
    done = []
    kind = type(remote)
    put, delete = kind.put, kind.delete
    monkeypatch.setattr(kind, "put", lambda self, *given: (done.append(("put", given[2])), put(self, *given)))
    monkeypatch.setattr(kind, "delete", lambda self, *given: (done.append(("delete", given[1])), delete(self, *given)))
    upload.upload(remote, _checkpoint(tmp_path / "b", 3, "new", save="new"))
    files = [("put", "b"), ("put", "inner/a")]
    assert done[0] == ("delete", "manifest.json") and sorted(done[1:3]) == files and done[3] == ("put", "manifest.json")
    assert (upload.fetch(remote, "step_00000003", tmp_path / "c") / "inner/a").read_text() == "new"


def test_a_broken_upload_is_not_there(remote, tmp_path, monkeypatch):
    path = _checkpoint(tmp_path / "a", 3)
    (path / "b").unlink()
    with pytest.raises(OSError):
        upload.upload(remote, path)
    assert upload.scan(remote)[0] == []


def test_what_arrives_damaged_gets_no_name(remote, tmp_path):
    path = _checkpoint(tmp_path / "a", 3)
    (path / "inner/a").write_text("Weights")
    upload.upload(remote, path)
    with pytest.raises(CheckpointError, match="hash of inner/a does not match"):
        upload.fetch(remote, "step_00000003", tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_the_uploader_takes_the_newest_and_tells_of_what_it_left_out(tmp_path, monkeypatch):
    remote = upload.open_remote(str(tmp_path / "remote"), "run")
    first, second, third = (_checkpoint(tmp_path / "here", step) for step in (1, 2, 3))
    started, go = threading.Event(), threading.Event()
    put = upload.Mounted.put

    def slow(self, *given):
        started.set()
        assert go.wait(20)
        put(self, *given)

    monkeypatch.setattr(upload.Mounted, "put", slow)
    uploader = upload.Uploader(remote)
    uploader.submit(first)
    assert started.wait(20)
    manifest.retain(tmp_path / "here", 1)
    assert first.exists() and not second.exists()  # it is being read
    uploader.submit(second)
    uploader.submit(third)
    go.set()
    uploader.finish(20)
    assert sorted(path.name for path in (tmp_path / "remote/run").iterdir()) == ["step_00000001", "step_00000003"]
    (note,) = uploader.notes()
    assert "step_00000002 was not uploaded" in note
    shutil.rmtree(first)
    uploader.submit(first)
    uploader.finish(20)
    (note,) = uploader.notes()
    assert "step_00000001 could not be uploaded" in note and "No such file" in note


def test_unknown_schemes_are_refused():
    with pytest.raises(ConfigError, match="ftp://x"):
        upload.open_remote("ftp://x", "run")
