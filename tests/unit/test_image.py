"""What goes into an image, and the tag that follows from it. No engine is asked."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import context, image, packages
from orchestrator.context import Entry
from orchestrator.errors import BuildError, ConfigError
from orchestrator.tee import run_tee


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project outside git."""
    root = tmp_path / "project"
    (root / "pkg").mkdir(parents=True)
    (root / "train.py").write_text("print(1)\n")
    (root / "pkg/a.py").write_text("A = 1\n")
    return root


@pytest.fixture(autouse=True)
def own_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """images/ and trainer/ of the test's own, so that no edit of the real ones plays a part."""
    home = tmp_path / "installed"
    (home / "images").mkdir(parents=True)
    (home / "trainer/recipes").mkdir(parents=True)
    (home / "images/Dockerfile").write_text("FROM x\n")
    (home / "images/setup.sh").write_text("true\n")
    for variant in ("cpu", "cuda"):
        (home / f"images/requirements-{variant}.txt").write_text(f"torch=={variant}\n")
    (home / "trainer/__init__.py").write_text("")
    (home / "trainer/recipes/demo.yaml").write_text("task: pretrain\n")
    monkeypatch.setattr(image, "package_folder", lambda name: home / name)
    return home


def plan(root: Path, **rest) -> image.BuildPlan:
    return image.plan(repository="localhost:5001/team/x", root=root, **rest)


def paths(build: image.Build) -> list[str]:
    return sorted(entry.path for entry in build.entries if not entry.is_dir)


def read(entries: list[Entry]) -> dict[str, tarfile.TarInfo]:
    stream = io.BytesIO()
    context.write_tar(entries, stream)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        return {info.name: info for info in tar}


def test_the_plan_of_a_project(project: Path):
    made = plan(project)
    assert made.deps is not None
    assert paths(made.deps) == ["Dockerfile", "setup/requirements.txt", "setup/setup.sh"]
    assert paths(made.code) == [
        "Dockerfile",
        "orch/trainer/__init__.py",
        "orch/trainer/recipes/demo.yaml",
        "root/workspace/pkg/a.py",
        "root/workspace/train.py",
    ]
    assert made.code.args["DEPS"] == made.deps.tag
    assert made.image.tagged == f"localhost:5001/team/x:{made.image.tag}"
    assert len(made.image.tag) == 16
    first, second = made.commands()
    assert "--target deps" in first and "--target image" in second


def test_the_tag_does_not_depend_on_time_owner_place_or_mode_bits(project: Path, tmp_path: Path):
    before = plan(project)
    os.utime(project / "train.py", (1, 1))
    (project / "train.py").chmod(0o600)
    elsewhere = project.rename(tmp_path / "elsewhere")
    assert plan(elsewhere).image == before.image


def test_the_tag_depends_on_all_that_goes_in(project: Path, own_packages: Path, tmp_path: Path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a-1.whl").write_text("x")
    tags = [plan(project).image.tag]
    for change in (
        {"variant": "cuda"},
        {"base": "other:1"},
        {"platform": "linux/arm64"},
        {"build_args": {"A": "1"}},
        {"wheels": wheels},
    ):
        tags.append(plan(project, **change).image.tag)
    for file in (
        project / "train.py",
        own_packages / "images/Dockerfile",
        own_packages / "images/setup.sh",
        own_packages / "images/requirements-cpu.txt",
        own_packages / "trainer/__init__.py",
    ):
        file.write_text(file.read_text() + "# edited\n")
        tags.append(plan(project).image.tag)
    (project / "train.py").chmod(0o755)
    tags.append(plan(project).image.tag)
    (project / "train.py").rename(project / "other.py")
    tags.append(plan(project).image.tag)
    assert len(set(tags)) == len(tags)


def test_an_edit_of_code_leaves_the_heavy_layers(project: Path, own_packages: Path):
    before = plan(project)
    (project / "train.py").write_text("print(2)\n")
    (own_packages / "trainer/new.py").write_text("")
    after = plan(project)
    assert after.deps == before.deps
    assert after.image != before.image


def test_another_base_keeps_the_tag(project: Path):
    before = plan(project)
    after = before.on_base("orch-base:bookworm")
    assert after.image == before.image
    assert after.deps is not None and after.deps.args["BASE_IMAGE"] == "orch-base:bookworm"
    assert before.on_base(before.base) is before


def test_what_never_goes_in(project: Path):
    for name in (
        ".git/config",
        ".venv/bin/python",
        ".venv-trainer/x",
        "env/pyvenv.cfg",
        "env/lib/x.py",
        "pkg/__pycache__/a.pyc",
        ".orch/sim/id_ed25519",
        ".env",
        "pkg/.env.local",
        "secrets.env",
        "id_rsa",
        ".ssh/config",
        "x.egg-info/PKG",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("secret")
    (project / ".env.example").write_text("A=")
    (project / "my.yaml").write_text("")
    names = context.list_files(project, exclude=[project / "my.yaml"])
    assert names == [".env.example", "pkg/a.py", "train.py"]


def test_dockerignore_holds_and_leaves_out_folders(project: Path):
    (project / ".dockerignore").write_text("pkg\n.dockerignore\n")
    assert context.list_files(project) == ["train.py"]


def git(root: Path, *words: str) -> None:
    subprocess.run(
        ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True
    )


def test_in_git_only_what_git_would_take(project: Path):
    git(project, "init", "-q")
    (project / ".gitignore").write_text("*.bin\n/out/\n")
    (project / "big.bin").write_text("x")
    (project / "out").mkdir()
    (project / "out/x").write_text("x")
    git(project, "add", "train.py", "pkg/a.py")
    (project / "new ü\n.py").write_text("untracked")
    (project / "pkg/a.py").unlink()
    assert context.list_files(project) == [".gitignore", "new ü\n.py", "train.py"]


def test_a_folder_that_git_ignores_is_walked(project: Path):
    git(project, "init", "-q")
    (project / ".gitignore").write_text("/sub/\n")
    (project / "sub").mkdir()
    (project / "sub/x.py").write_text("")
    assert context.list_files(project / "sub") == ["x.py"]


def test_an_embedded_repository_gives_its_files(project: Path):
    git(project, "init", "-q")
    (project / "lib").mkdir()
    git(project / "lib", "init", "-q")
    (project / "lib/b.py").write_text("")
    assert "lib/b.py" in context.list_files(project)
    assert not any(".git/" in name for name in context.list_files(project))


def test_a_context_that_is_no_folder():
    with pytest.raises(BuildError, match="not a folder"):
        context.list_files(Path("/nonexistent/x"))


def test_the_tar_is_the_same_bytes_each_time(project: Path):
    (project / "run.sh").write_text("#!/bin/sh\n")
    (project / "run.sh").chmod(0o700)
    os.symlink("train.py", project / "link")
    entries = context.entries(project, context.list_files(project), "workspace/")
    one, two = io.BytesIO(), io.BytesIO()
    context.write_tar(entries, one)
    os.utime(project / "run.sh", (5, 5))
    context.write_tar(list(reversed(context.entries(project, context.list_files(project), "workspace/"))), two)
    assert one.getvalue() == two.getvalue()
    members = read(entries)
    assert members["workspace/run.sh"].mode == 0o755
    assert members["workspace/train.py"].mode == 0o644
    assert members["workspace/link"].linkname == "train.py"
    assert members["workspace"].isdir() and members["workspace/pkg"].mode == 0o755
    assert {(info.mtime, info.uid, info.gid, info.uname) for info in members.values()} == {(0, 0, 0, "")}


def test_what_was_hashed_is_what_is_built(project: Path, monkeypatch: pytest.MonkeyPatch):
    made = plan(project)
    (project / "train.py").write_text("edited while the layers below are being built\n")
    stream = io.BytesIO()
    context.write_tar(made.code.entries, stream)
    assert b"print(1)" in stream.getvalue() and b"edited" not in stream.getvalue()
    monkeypatch.setattr(context, "_SMALL", 0)
    made = plan(project)
    (project / "train.py").write_text("edited once more\n")
    with pytest.raises(BuildError, match=r"train\.py changed while"):
        context.write_tar(made.code.entries, io.BytesIO())


def test_hashes_of_big_files_are_remembered(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(context, "_SMALL", 0)
    monkeypatch.setattr(context, "_BIG", 1)
    cache = context.HashCache(tmp_path / "state/hashes.json")
    names = context.list_files(project)
    first = context.entries(project, names, "", cache)
    cache.save()
    cache = context.HashCache(tmp_path / "state/hashes.json")
    monkeypatch.setattr(context.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert context.entries(project, names, "", cache) == first


def test_requirements_bring_what_they_include_and_leave_out_the_code_itself(project: Path):
    (project / "requirements.txt").write_text("numpy==2\n-r req/more.txt\n-e .\n./pkg\n-c https://x.example/c.txt\n")
    (project / "req").mkdir()
    (project / "req/more.txt").write_text("-c ../pins.txt\neinops\n")
    (project / "pins.txt").write_text("einops<1\n")
    made = plan(project)
    assert made.deps is not None
    user = {entry.path: entry.data for entry in made.deps.entries if entry.path.startswith("user/") and entry.data}
    assert user == {
        "user/requirements.txt": b"numpy==2\n-r req/more.txt\n-c https://x.example/c.txt\n",
        "user/req/more.txt": b"-c ../pins.txt\neinops\n",
        "user/pins.txt": b"einops<1\n",
    }
    assert len(made.notes) == 2


@pytest.mark.parametrize("include", ["missing.txt", "../outside.txt"])
def test_requirements_that_cannot_be_had(project: Path, include: str):
    (project.parent / "outside.txt").write_text("")
    (project / "requirements.txt").write_text(f"-r {include}\n")
    with pytest.raises(BuildError, match=r"requirements\.txt includes"):
        plan(project)


def test_a_lock_wins_over_requirements(project: Path):
    for name in ("requirements.txt", "pyproject.toml"):
        (project / name).write_text("")
    assert "user/requirements.txt" in paths(plan(project).deps)
    (project / "uv.lock").write_text("")
    found = paths(plan(project).deps)
    assert "user/uv.lock" in found and "user/pyproject.toml" in found and "user/requirements.txt" not in found


def test_an_own_dockerfile_gets_the_own_files_only(project: Path, tmp_path: Path):
    (project / "Dockerfile.gpu").write_text("FROM x\n")
    made = plan(project, dockerfile=Path("Dockerfile.gpu"), build_args={"A": "b"})
    assert made.deps is None and paths(made.code) == ["Dockerfile.gpu", "pkg/a.py", "train.py"]
    assert made.code.dockerfile == "Dockerfile.gpu" and made.code.target == ""
    outside = tmp_path / "Elsewhere"
    outside.write_text("FROM y\n")
    assert ".orch.Dockerfile" in paths(plan(project, dockerfile=outside).code)
    with pytest.raises(ConfigError, match="no Dockerfile"):
        plan(project, dockerfile=Path("missing"))


def test_sources_are_pips_own_with_orch_yaml_first(tmp_path: Path):
    wheels, other, bundle = tmp_path / "wheels", tmp_path / "other", tmp_path / "ca.pem"
    wheels.mkdir()
    other.mkdir()
    bundle.write_text("cert")
    (wheels / "b-1.whl").write_text("b")
    (wheels / "notes.txt").write_text("")
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text(
        "[global]\nindex-url = https://file.example/simple\nextra-index-url = file:///opt/x https://more.example/simple\n"
        f"cert = {tmp_path}/missing.pem\n"
    )
    environ = {
        "HOME": str(tmp_path),
        "PIP_FIND_LINKS": f"https://links.example/ {wheels}",
        "PIP_DEFAULT_TIMEOUT": "99",
        "SSL_CERT_FILE": str(bundle),
    }
    found = packages.discover_sources(environ)
    assert found.pip.index_url == "https://file.example/simple"
    assert found.pip.extra_index_urls == ("https://more.example/simple",)
    assert found.pip.find_links == ("https://links.example/",)
    assert found.pip.timeout == "99"
    assert found.ca_bundle is None, "pip's own setting names a file that is not there; nothing else is guessed"
    assert [entry.path for entry in found.packages] == ["wheels/b-1.whl"]
    found = packages.discover_sources({**environ, "PIP_CERT": str(bundle)}, index_url="https://given/", wheels=other)
    assert (found.pip.index_url, found.ca_bundle, found.wheels) == ("https://given/", bundle, other)
    nothing = packages.discover_sources({"PIP_CONFIG_FILE": os.devnull})
    assert nothing == packages.Sources() and nothing.default_only and not found.default_only


def test_bad_sources(tmp_path: Path):
    with pytest.raises(ConfigError, match="no CA bundle"):
        packages.discover_sources({}, ca_bundle=tmp_path / "missing")
    (tmp_path / "big").write_bytes(b"x" * 600_000)
    with pytest.raises(ConfigError, match="too large"):
        packages.discover_sources({}, ca_bundle=tmp_path / "big")
    with pytest.raises(ConfigError, match="no folder"):
        packages.wheel_facts(tmp_path / "missing")


def test_two_thousand_files_are_planned_quickly(project: Path):
    for at in range(2000):
        folder = project / f"d{at % 40}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{at}.py").write_text(f"x = {at}\n" * 50)
    started = time.process_time()
    assert len(context.list_files(project)) == 2002
    plan(project)
    # CPU seconds, generous: about 0.15 on a laptop; what is meant is that nothing is quadratic.
    assert time.process_time() - started < 3


@given(st.lists(st.text("ab/.*!?#[] \\", min_size=1, max_size=8), max_size=5), st.text("ab/.", min_size=1, max_size=6))
def test_any_dockerignore_can_be_read(rows: list[str], path: str):
    from orchestrator.commands.dockerignore import compile_ignore

    assert compile_ignore("\n".join(rows))(path) in (True, False)


def test_run_tee_shows_and_keeps_the_output(capfd: pytest.CaptureFixture[str]):
    def feed(stream) -> None:
        stream.write(b"from stdin\n" * 20_000)

    code, output = run_tee(["sh", "-c", "cat; echo oops >&2; exit 3"], feed=feed)
    assert code == 3
    assert output.endswith("oops\n") and len(output) <= 64 << 10
    assert capfd.readouterr().err.count("from stdin") == 20_000


def test_run_tee_an_early_end_is_the_commands_own_business(capfd: pytest.CaptureFixture[str]):
    code, output = run_tee(["sh", "-c", "echo no >&2; exit 1"], feed=lambda stream: stream.write(b"x" * (1 << 22)))
    assert (code, output) == (1, "no\n")


def test_run_tee_a_feed_that_fails_ends_the_command():
    def feed(_stream) -> None:
        raise BuildError("file changed")

    with pytest.raises(BuildError, match="file changed"):
        run_tee([sys.executable, "-c", "import time; time.sleep(60)"], feed=feed)


def test_run_tee_command_missing():
    with pytest.raises(BuildError, match="not installed"):
        run_tee(["/nonexistent/docker"])


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?' >&2; exit 1",
            "no Docker engine",
        ),
        ("echo '[\"a:1\"][]'; echo 'Error: No such image: b:1' >&2; exit 1", None),
    ],
)
def test_present(script: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if message is None:
        assert image.present("a:1", "b:1") == {"a:1"}
    else:
        with pytest.raises(BuildError, match=message) as caught:
            image.present("a:1")
        assert "start Docker" in (caught.value.hint or "")
