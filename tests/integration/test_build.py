"""Images built by a real engine with the shipped Dockerfile and pushed to a real registry."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import image
from orchestrator.config import Config, Image
from orchestrator.errors import BuildError, RegistryError, UsageError
from orchestrator.sim.base import JOB, ensure_base
from orchestrator.sim.engine import ensure_engine
from orchestrator.sim.image import ensure_node_image
from orchestrator.sim.plugins import ensure_plugins
from orchestrator.workflows.build import build_image, content_ref

pytestmark = pytest.mark.integration

SMALL = "iniconfig==2.1.0\n"
"""In place of torch: what is tested is the way, not the gigabytes."""


def docker(*words: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    """A registry of this test's own on a free port of 127.0.0.1: `localhost:PORT`."""
    ensure_engine()
    ensure_plugins()
    ensure_base(JOB)
    container = docker("run", "-d", "--rm", "--publish", "127.0.0.1::5000", ensure_node_image(), "registry").strip()
    try:
        port = docker("port", container, "5000/tcp").split()[0].rpartition(":")[2]
        _wait_for(f"http://127.0.0.1:{port}/v2/")
        yield f"localhost:{port}"
    finally:
        docker("rm", "-f", "--volumes", container, check=False)


def _wait_for(url: str) -> None:
    import time

    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"no answer from {url} in 20 s"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def made_tags() -> Iterator[set[str]]:
    """Tags and repositories that tests have made in the engine; removed at the end."""
    tags: set[str] = set()
    yield tags
    named = {name for name in tags if ":" in name.rpartition("/")[2]}
    ids = {one for name in tags - named for one in docker("image", "ls", "-q", name).split()}
    if named | ids:
        docker("image", "rm", "-f", *named, *ids, check=False)


class Project:
    """A user's project with a trainer and requirements of its own beside it."""

    def __init__(self, root: Path, repository: str, tags: set[str]) -> None:
        self.root, self.repository, self._tags = root / "project", repository, tags
        self.home = root / "installed"
        tags.add(repository)
        self.root.mkdir()
        shutil.copytree(Path(image.__file__).parent.parent / "images", self.home / "images")
        (self.home / "images/requirements-cpu.txt").write_text(SMALL)
        (self.home / "images/requirements-cpu.no-deps.txt").unlink(missing_ok=True)
        (self.home / "trainer").mkdir()
        (self.home / "trainer/__init__.py").write_text("VERSION = 1\n")
        (self.root / "train.py").write_text("import trainer, iniconfig; print('trained', trainer.VERSION)\n")

    def config(self, **rest: object) -> Config:
        settings = {"repository": self.repository, "context": self.root, "variant": "cpu", **rest}
        return Config(name="t", image=Image(**settings))  # type: ignore[arg-type]

    def build(self, *, push: bool = True, build: bool = True, force: bool = False, **rest: object):
        config = self.config(**rest)
        if config.image.ref is None:
            plan = image.plan(repository=self.repository, root=self.root) if not rest else None
            self._tags.add(content_ref(config).tagged)
            if plan and plan.deps:
                self._tags.add(plan.deps.tag)
        self.said: list[str] = []
        return build_image(config, push=push, build=build, force=force, report=self.said.append)


@pytest.fixture
def project(tmp_path: Path, registry: str, made_tags: set[str], monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path, f"{registry}/team/t{uuid.uuid4().hex[:8]}", made_tags)
    monkeypatch.setattr(image, "package_folder", lambda name: made.home / name)
    monkeypatch.setenv("ORCH_STATE", str(tmp_path / "state"))
    return made


def layers(ref: str) -> list[str]:
    return json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", ref))


def run(ref: str, *command: str) -> str:
    return docker("run", "--rm", "--user", "4321:4321", "--network", "none", ref, *command)


def test_build_push_run_and_an_edit(project: Project, capfd: pytest.CaptureFixture[str]):
    first = project.build()
    assert first.built and first.pushed
    assert first.image.digest and first.image.digest.startswith("sha256:")
    assert content_ref(project.config()).tag == first.image.tag
    # Any user may read all of it; the code is importable from wherever the job stands.
    assert run(first.image.pinned, "python3", "train.py") == "trained 1\n"
    assert run(first.image.pinned, "sh", "-c", "cd / && python3 /workspace/train.py") == "trained 1\n"
    assert run(first.image.pinned, "find", "/opt", "/workspace", "!", "-readable") == ""
    assert not json.loads(docker("image", "inspect", "--format", "{{json .Config.Entrypoint}}", first.image.tagged))

    warm = project.build()
    assert (warm.built, warm.pushed, warm.image) == (False, False, first.image)
    assert warm.seconds < 0.5

    docker("image", "rm", first.image.tagged)
    assert project.build().image == first.image, "the registry has it: that is enough"

    (project.home / "trainer/__init__.py").write_text("VERSION = 2\n")
    second = project.build()
    assert second.built and second.image.tag != first.image.tag
    assert run(second.image.pinned, "python3", "train.py") == "trained 2\n"
    docker("pull", "-q", first.image.pinned)
    changed = set(layers(second.image.tagged)) - set(layers(first.image.pinned))
    assert len(changed) == 1
    pushed = capfd.readouterr().err.rpartition("The push refers to repository")[2]
    assert pushed.count(": Pushed") == 1


def test_the_same_files_give_the_same_layers(project: Project):
    first = project.build()
    docker("image", "rm", "-f", first.image.tagged)
    again = project.build(force=True)
    assert again.built and again.image.tag == first.image.tag
    assert layers(again.image.tagged)[-3:-1] == layers(first.image.pinned)[-3:-1]


def test_secrets_are_in_no_layer_and_no_history(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle, marker = tmp_path / "ca.pem", f"marker-{uuid.uuid4().hex}"
    named = next((os.environ[name] for name in ("PIP_CERT", "SSL_CERT_FILE") if os.environ.get(name)), None)
    text = Path(named).read_text() if named else subprocess.check_output(["python3", "-m", "certifi"], text=True)
    bundle.write_text(f"{text}\n# {marker}\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / f"{marker}.whl".replace("-", "_")).write_text("never installed")
    monkeypatch.setenv("PIP_TRUSTED_HOST", f"{marker}.example")
    # A requirement of its own, so that pip really runs in this build and nothing comes from the cache.
    (project.root / "requirements.txt").write_text(f"iniconfig!={uuid.uuid4().int % 10**9}\n")
    made = project.build(push=False, ca_bundle=bundle, wheels=wheels)
    assert made.built and made.image.digest is None and not made.pushed
    words = (marker, marker.replace("-", "_"))
    seen = docker("history", "--no-trunc", made.image.tagged) + docker("image", "inspect", made.image.tagged)
    assert not any(word in seen for word in words)
    archive = tmp_path / "image.tar"
    docker("save", "-o", str(archive), made.image.tagged)
    assert _found_in_layers(archive, ("trainer.VERSION",)), "the search itself works"
    assert not _found_in_layers(archive, words)
    assert run(made.image.tagged, "sh", "-c", "ls -A /run/secrets 2>/dev/null || true") == ""


def _found_in_layers(archive: Path, words: tuple[str, ...]) -> list[str]:
    """Names of members of any layer (and the layer files themselves) that hold one of `words`."""
    wanted = [word.encode() for word in words]
    found = []
    with tarfile.open(archive) as outer:
        for member in outer:
            stream = outer.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            if stream.peek(2)[:2] == b"\x1f\x8b":  # engines with the containerd store keep layers compressed
                stream = gzip.GzipFile(fileobj=stream)
            tail = b""
            while chunk := stream.read(1 << 22):
                if any(word in tail + chunk for word in wanted):
                    found.append(member.name)
                    break
                tail = chunk[-64:]
    return found


def test_a_step_that_fails_is_named_with_its_lines_and_advice(project: Project):
    (project.root / "requirements.txt").write_text("orch-no-such-package==9.9\n")
    with pytest.raises(BuildError, match=r"failed at \[deps 3/3 RUN .*exit code: 1") as caught:
        project.build()
    assert any("No matching distribution found for orch-no-such-package" in line for line in caught.value.lines)
    assert "image.index_url" in (caught.value.hint or "")


def test_a_base_that_cannot_be_had(project: Project):
    with pytest.raises(BuildError) as caught:
        project.build(base="localhost:1/no/such/base:1")
    assert caught.value.hint


def test_a_registry_that_is_down_is_said_before_anything_is_built(project: Project):
    with pytest.raises(RegistryError, match="localhost:1 does not answer") as caught:
        project.build(repository="localhost:1/team/x")
    assert caught.value.exit_code == 3 and "orch registry up" in (caught.value.hint or "")
    assert project.said == []


def test_no_build_refuses_what_is_not_there(project: Project):
    with pytest.raises(UsageError, match="has not been built"):
        project.build(build=False)


def test_an_own_dockerfile_and_a_reference_used_as_it_is(project: Project):
    base = image.LOCAL_BASE if image.present(image.LOCAL_BASE) else image.DEFAULT_BASE
    (project.root / "Own").write_text(f"ARG WORD\nFROM {base}\nARG WORD\nCOPY train.py /\nRUN echo $WORD >/word\n")
    made = project.build(dockerfile=project.root / "Own", build_args={"WORD": "hello world"})
    assert run(made.image.pinned, "cat", "/word") == "hello world\n"
    used = project.build(ref=made.image.tagged)
    assert used.image == made.image and not used.built and not used.pushed
    assert project.build(ref=made.image.pinned).image.pinned == made.image.pinned


def test_a_uv_lock_becomes_a_layer(project: Project):
    (project.root / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["pluggy==1.6.0"]\n'
    )
    (project.root / "uv.lock").write_text(
        'version = 1\nrevision = 1\nrequires-python = ">=3.11"\n\n'
        '[[package]]\nname = "p"\nversion = "1"\nsource = { virtual = "." }\n'
        'dependencies = [{ name = "pluggy" }]\n\n'
        '[package.metadata]\nrequires-dist = [{ name = "pluggy", specifier = "==1.6.0" }]\n\n'
        '[[package]]\nname = "pluggy"\nversion = "1.6.0"\nsource = { registry = "https://index.invalid/simple" }\n'
    )
    made = project.build(push=False)
    assert run(made.image.tagged, "python3", "-c", "import pluggy; print(pluggy.__version__)") == "1.6.0\n"
    assert run(made.image.tagged, "sh", "-c", "command -v uv; ls -A /tmp") == ""
