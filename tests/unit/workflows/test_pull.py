"""Files come home whole or not at all."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from orchestrator.errors import ConnectionLost, OrchError, RemoteError, UsageError
from orchestrator.workflows import pull
from orchestrator.workflows.locate import Located


def archive(*entries: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def home(scripted, new_line, tmp_path: Path):
    """home(stream by node…) → a located run whose nodes send that; `wanted` are the paths asked for."""

    class Home:
        def __init__(self) -> None:
            self.backend = scripted()
            self.located = Located(self.backend.found, self.backend.nodes, self.backend, {})
            self.to = tmp_path / "home"
            self.steps: dict[str, list[str]] = {"n1": [], "n2": []}
            self.wanted: dict[str, list[str]] = {}
            self.streams: dict[str, object] = {}
            self.told: list[tuple[str, str]] = []
            self.backend.checkpoints = lambda found, node: self.steps[node.name]
            self.backend.fetch = self.fetch

        def fetch(self, found, node, paths):
            self.wanted[node.name] = list(paths)
            return self.streams[node.name]

        def sends(self, node: str, data: bytes, *, code: int = 0, stderr: str = "", cut: bool = False, size: int = 700):
            line = new_line(*(data[at : at + size] for at in range(0, len(data), size)))
            line.send(ConnectionLost("the connection broke", node=node) if cut else b"")
            line.stderr = stderr
            read = line.read

            def ending(timeout=None):
                chunk = read(timeout)
                if chunk == b"":
                    line.returncode = code
                return chunk

            line.read = ending
            self.streams[node] = line

        def pull(self, checkpoint: str | None = None):
            return pull.pull_run(self.located, self.to, checkpoint, notify=lambda *each: self.told.append(each))

        def files(self) -> dict[str, bytes]:
            return {str(each.relative_to(self.to)): each.read_bytes() for each in self.to.rglob("*") if each.is_file()}

    return Home()


GOOD = archive(("log", b"0\thello\n"), ("events/rank-0.jsonl", b"{}\n" * 500))


def test_both_nodes(home) -> None:
    home.sends("n1", GOOD)
    home.sends("n2", archive(("log", b"1\thi\n")))
    got = home.pull()
    assert (got.files, got.bytes) == (3, 8 + 1500 + 5)
    assert home.files()["n1/events/rank-0.jsonl"] == b"{}\n" * 500 and home.files()["n2/log"] == b"1\thi\n"
    assert home.wanted["n1"] == list(pull.RECORDS) and "secrets.env" not in pull.RECORDS
    assert ("n2", "1 files") in home.told
    assert sorted(each.name for each in home.to.iterdir()) == ["n1", "n2"]


@pytest.mark.parametrize("size", [1, 511, 10_000])
def test_chunks_of_any_size(home, size: int) -> None:
    home.sends("n1", GOOD, size=size)
    home.sends("n2", GOOD, size=size)
    assert home.pull().files == 4


def spoil(home, how: str) -> None:
    if how == "torn":
        home.sends("n1", GOOD[:1200], cut=True)
    elif how == "torn between files, command killed":
        home.sends("n1", GOOD[:1024], code=137)
    elif how == "no exit code":
        home.sends("n1", GOOD, code=None)
    elif how == "ended early":
        home.sends("n1", GOOD[:1700])
    elif how == "command failed":
        home.sends("n1", GOOD, code=1, stderr="tar: log: Cannot read\n")
    elif how == "nothing":
        home.sends("n1", b"", code=45)
    else:
        home.sends("n1", b"Welcome to this machine!\n" * 100)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("torn", ConnectionLost, "the connection broke"),
        ("torn between files, command killed", RemoteError, "fetching failed"),
        ("no exit code", RemoteError, "fetching failed"),
        ("ended early", RemoteError, "the archive broke off: unexpected end of data"),
        ("command failed", RemoteError, "fetching failed: tar: log: Cannot read"),
        ("nothing", RemoteError, "the archive broke off"),
        ("no archive", RemoteError, "the archive broke off"),
    ],
)
def test_a_bad_archive_never_replaces_a_good_one(home, how: str, kind: type[OrchError], message: str) -> None:
    home.sends("n1", GOOD)
    home.sends("n2", GOOD)
    home.pull()
    before = home.files()
    spoil(home, how)
    home.sends("n2", GOOD)
    with pytest.raises(kind) as caught:
        home.pull()
    assert message in caught.value.message and caught.value.node == "n1"
    assert home.files() == before
    assert sorted(each.name for each in home.to.iterdir()) == ["n1", "n2"]
    assert home.streams["n1"].closed


def test_a_new_pull_replaces_the_old_one_whole(home) -> None:
    home.sends("n1", GOOD)
    home.sends("n2", GOOD)
    home.pull()
    home.sends("n1", archive(("log", b"more")))
    home.sends("n2", GOOD)
    home.pull()
    assert {name: data for name, data in home.files().items() if name.startswith("n1/")} == {"n1/log": b"more"}


@pytest.mark.parametrize(
    "entry",
    [
        ("../outside", b"x"),
        ("a/../../outside", b"x"),
        ("../n2/log", b"x"),
        link("away", "/etc"),
        link("away", "../../x"),
        link("hard", "../../../etc/passwd", tarfile.LNKTYPE),
        link("device", "", tarfile.CHRTYPE),
    ],
)
def test_names_that_lead_outside_are_refused(home, tmp_path: Path, entry) -> None:
    home.sends("n1", archive(("log", b"fine"), entry))
    home.sends("n2", GOOD)
    with pytest.raises(RemoteError):
        home.pull()
    assert sorted(each.name for each in home.to.iterdir()) == ["n2"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["home"]


def test_an_absolute_name_stays_below_the_folder(home) -> None:
    home.sends("n1", archive(("/outside/x", b"x")))
    home.sends("n2", GOOD)
    home.pull()
    assert home.files()["n1/outside/x"] == b"x" and not Path("/outside").exists()


def test_silence_is_a_lost_connection(home, new_line) -> None:
    home.sends("n2", GOOD)
    home.streams["n1"] = new_line(GOOD[:600], None)
    with pytest.raises(ConnectionLost, match="no data for 60 s"):
        home.pull()


def test_a_disk_that_is_full_here(home, monkeypatch) -> None:
    home.sends("n1", GOOD)
    home.sends("n2", GOOD)

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(OrchError, match=r"cannot write to .*: No space left on device"):
        home.pull()
    assert list(home.to.iterdir()) == []


# -- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "n1", "n2"),
    [
        ("latest", ["step_00000100"], ["step_00000020"]),
        ("all", ["step_00000009", "step_00000100"], ["step_00000020"]),
        ("100", ["step_00000100"], []),
        ("step_00000020", [], ["step_00000020"]),
    ],
)
def test_which_checkpoint(home, asked: str, n1: list[str], n2: list[str]) -> None:
    home.steps = {"n1": ["step_00000100", "step_00000009"], "n2": ["step_00000020"]}
    home.sends("n1", GOOD)
    home.sends("n2", GOOD)
    home.pull(asked)
    assert home.wanted["n1"][len(pull.RECORDS) :] == [f"checkpoints/{step}" for step in n1]
    assert home.wanted["n2"][len(pull.RECORDS) :] == [f"checkpoints/{step}" for step in n2]


def test_a_checkpoint_that_nobody_has(home) -> None:
    with pytest.raises(UsageError, match="r-1 has no checkpoint on any of its nodes"):
        home.pull("latest")
    home.steps["n2"] = ["step_00000020"]
    with pytest.raises(UsageError, match=r"unknown checkpoint '7'.*valid: step_00000020"):
        home.pull("7")
    assert not home.to.exists()
