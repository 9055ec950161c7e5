from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from trainer.checkpoints import manifest
from trainer.errors import CheckpointError


def _fill(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "inner").mkdir()
    (folder / "inner/state.json").write_text("{}")


def _write(root: Path, step: int, timeline: int = 0, fill=_fill, save: str = "", part: int = 0, parts: int = 1) -> Path:
    """What the writer does, on one rank."""
    staging = manifest.stage(root, step)
    try:
        fill(staging)
        names = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
        head = {"step": step, "timeline": timeline, "world": 2, "layout": "full", "parallel": "dp2", "save": save}
        return manifest.seal(staging, head, manifest.digest(staging, names), part=part, parts=parts)
    except OSError:
        manifest.discard_staging(root, step)
        raise


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_written_checkpoint_verifies(tmp_path):
    path = _write(tmp_path / "new", 12, save="x")
    assert path.name == "step_00000012"
    head = manifest.verify(path)
    keys = ("schema", "step", "timeline", "world", "layout", "parallel", "save")
    assert [head[key] for key in keys] == [1, 12, 0, 2, "full", "dp2", "x"]
    data = (path / "weights.bin").read_bytes()
    assert head["files"]["weights.bin"] == {"bytes": 256 * 40, "sha256": hashlib.sha256(data).hexdigest()}
    assert set(head["files"]) == {"weights.bin", "inner/state.json"}
    assert manifest.scan(tmp_path / "new") == ([manifest.Found(0, 12, str(path), "full", "x")], [])


def _flip(path: Path) -> None:
    data = bytearray((path / "weights.bin").read_bytes())
    data[5000] ^= 0x10
    (path / "weights.bin").write_bytes(data)


@pytest.mark.parametrize(
    "damage, words",
    [
        (_flip, "hash of weights.bin does not match"),
        (lambda p: os.truncate(p / "weights.bin", 100), "weights.bin has 100 bytes, the manifest says 10240"),
        (lambda p: (p / "inner/state.json").unlink(), "inner/state.json: No such file"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: os.truncate(p / "manifest.json", 30), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"schema": 1, "files": {}}'), "manifest.json is incomplete"),
        (
            lambda p: (p / "manifest.json").write_text('{"schema": 9, "files": {}}'),
            "schema 9, this version reads 1",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, words):
    path = _write(tmp_path, 1)
    damage(path)
    with pytest.raises(CheckpointError, match=words):
        manifest.verify(path)


def test_scan_passes_over_what_is_no_checkpoint(tmp_path):
    good = _write(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "step_3").mkdir()
    (tmp_path / "step_00000004").write_text("a file")
    found, passed_over = manifest.scan(tmp_path)
    assert [item.path for item in found] == [str(good)]
    assert len(passed_over) == 1 and "step_00000002: no manifest.json" in passed_over[0]
    assert manifest.scan(tmp_path / "missing") == ([], [])


def test_failed_fill_touches_nothing(tmp_path):
    _write(tmp_path, 1)

    def fail(folder: Path) -> None:
        _fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        _write(tmp_path, 2, fill=fail)
    assert _names(tmp_path) == ["step_00000001"]


def _die(root: str, where: str) -> None:
    """Writes step 2 and is killed without warning at `where`."""

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fill(folder: Path) -> None:
        _fill(folder)
        if where == "fill":
            kill()

    if where == "rename":
        os.rename = kill  # type: ignore[assignment]
    if where == "hash":
        manifest._hash = kill  # type: ignore[assignment]
    if where == "retain":
        manifest._discard = kill  # type: ignore[assignment]
    _write(Path(root), 2, fill=fill)
    manifest.retain(Path(root), 1)


@pytest.mark.parametrize("where, newest", [("fill", 1), ("hash", 1), ("rename", 1), ("retain", 2)])
def test_kill_mid_save_leaves_the_newest_whole(tmp_path, where, newest):
    _write(tmp_path, 1)
    process = multiprocessing.get_context("fork").Process(target=_die, args=(str(tmp_path), where))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found, passed_over = manifest.scan(tmp_path)
    assert found[0].step == newest and not passed_over
    manifest.verify(Path(found[0].path))
    _write(tmp_path, 3)  # a stale staging folder never harms, and is swept
    assert all(name.startswith("step_") for name in _names(tmp_path))


def test_retention_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        _write(tmp_path, step)
    (tmp_path / "step_00000009").mkdir()  # not ours to judge
    manifest.retain(tmp_path, 2)
    assert _names(tmp_path) == ["step_00000002", "step_00000003", "step_00000009"]


def test_retention_keeps_milestones_of_the_newest_timeline(tmp_path):
    _write(tmp_path, 20)
    for step in (5, 10, 15, 17, 18):
        _write(tmp_path, step, timeline=1)
    manifest.retain(tmp_path, 2, 10)
    assert _names(tmp_path) == ["step_00000010", "step_00000017", "step_00000018"]


def _hold_and_wait(path: str, holding, done) -> None:
    with manifest.hold(Path(path)):
        holding.set()
        done.wait(20)


def test_retention_leaves_what_is_being_read_here_or_in_another_process(tmp_path):
    first, second = _write(tmp_path, 1), _write(tmp_path, 2)
    _write(tmp_path, 3)
    fork = multiprocessing.get_context("fork")
    holding, done = fork.Event(), fork.Event()
    process = fork.Process(target=_hold_and_wait, args=(str(first), holding, done))
    process.start()
    assert holding.wait(20)
    with manifest.hold(second):
        manifest.retain(tmp_path, 1)
        assert _names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    manifest.retain(tmp_path, 1)
    assert _names(tmp_path) == ["step_00000001", "step_00000003"]
    done.set()
    process.join()
    manifest.retain(tmp_path, 1)
    assert _names(tmp_path) == ["step_00000003"]


def test_parts_of_one_save_side_by_side_are_whole(tmp_path):
    def fill(name):
        return lambda folder: (folder / name).write_text(name)

    first = _write(tmp_path / "a", 1, fill=fill("x"), save="s", part=0, parts=2)
    second = _write(tmp_path / "b", 1, fill=fill("y"), save="s", part=1, parts=2)
    assert manifest.scan(tmp_path / "a")[0][0].parts == (0,) and manifest.scan(tmp_path / "b")[0][0].parts == (1,)
    assert set(manifest.verify(first)["files"]) == {"x"}
    shutil.copytree(second, first, dirs_exist_ok=True)
    assert set(manifest.verify(first)["files"]) == {"x", "y"}
    assert manifest.scan(tmp_path / "a")[0][0].parts == ()
    other = _write(tmp_path / "c", 1, fill=fill("y"), save="t", part=1, parts=2)
    shutil.copytree(other, first, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="parts of several saves"):
        manifest.read(first)


def test_ranks_share_the_hashing_and_together_see_all(tmp_path):
    def fill(folder: Path) -> None:
        for index in range(5):
            (folder / str(index)).write_bytes(bytes(100 + index))

    path = _write(tmp_path, 1, fill=fill)
    for index in range(5):
        data = (path / str(index)).read_bytes()
        (path / str(index)).write_bytes(b"!" + data[1:])
        failed = []
        for rank in range(2):
            try:
                manifest.verify(path, share=(rank, 2))
            except CheckpointError:
                failed.append(rank)
        assert len(failed) == 1
        (path / str(index)).write_bytes(data)


def test_a_new_timeline_outranks_higher_steps(tmp_path):
    _write(tmp_path, 50)
    _write(tmp_path, 60)
    _write(tmp_path, 10, timeline=1)
    assert [(item.timeline, item.step) for item in manifest.scan(tmp_path)[0]] == [(1, 10), (0, 60), (0, 50)]
    manifest.retain(tmp_path, 2)
    assert _names(tmp_path) == ["step_00000010", "step_00000060"]


def test_same_step_again_replaces(tmp_path):
    _flip(_write(tmp_path, 1))
    path = _write(tmp_path, 1, timeline=1)
    assert manifest.verify(path)["timeline"] == 1 and _names(tmp_path) == ["step_00000001"]


def test_manifest_is_written_last(tmp_path):
    path = _write(tmp_path, 1)
    head = json.loads((path / "manifest.json").read_text())
    assert "manifest.json" not in head["files"]
    last = max(path.rglob("*"), key=lambda item: item.stat().st_mtime_ns if item.is_file() else 0)
    assert last.name == "manifest.json"
