from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.connect.known_hosts import HostKey, check, host_name, lookup, pin, pinned_types
from orchestrator.errors import HostKeyError

ED = HostKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB")
OTHER = HostKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAC")
RSA = HostKey("ssh-rsa", "AAAAB3NzaC1yc2EAAAADAQABAAAAAQD=")


def line(names: str, key: HostKey = ED, marker: str = "") -> str:
    return f"{marker}{names} {key.type} {key.base64} a comment\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ssh" / "known_hosts"


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))
    return file


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("node1", "node1", True),
        ("node1,10.0.0.1", "10.0.0.1", True),
        ("Node1", "node1", True),
        ("node1", "node11", False),
        ("node?", "node1", True),
        ("*.example.com", "a.example.com", True),
        ("*.example.com,!a.example.com", "a.example.com", False),
        ("!a.example.com,*.example.com", "b.example.com", True),
        ("[node1]:2222", "[node1]:2222", True),
        ("[node1]:2222", "node1", False),
        ("[node1]:*", "[node1]:2222", True),
        ("node1", "[node1]:2222", False),
        ("n[oa]de1", "node1", False),  # [ is no pattern in OpenSSH
    ],
)
def test_names_and_patterns(file: Path, pattern: str, name: str, matches: bool) -> None:
    write(file, line(pattern))
    assert bool(lookup(name, [file])) == matches


def test_comments_broken_lines_and_missing_files_are_passed_over(file: Path, tmp_path: Path) -> None:
    write(
        file, "# node1 ssh-ed25519 AAAA\n", "\n", "node1 ssh-ed25519\n", "node1 ssh-ed25519 n@t-base64\n", line("node1")
    )
    assert [entry.line for entry in lookup("node1", [tmp_path / "none", file])] == [5]


def test_the_name_holds_the_port_unless_it_is_22() -> None:
    assert host_name("Node1") == "node1"
    assert host_name("node1", 2222) == "[node1]:2222"


def test_a_pinned_key_passes_and_its_types_are_known(file: Path) -> None:
    write(file, line("node1", RSA), line("node1"), line("node1", OTHER, "@cert-authority "))
    check("node1", ED, [file], node="n1")
    assert pinned_types("node1", [file]) == ["ssh-rsa", "ssh-ed25519"]


def test_unknown_changed_and_revoked_keys_are_refused(file: Path) -> None:
    write(file, "# first\n", line("node1"), line("node2"), line("*", OTHER, "@revoked "))
    with pytest.raises(HostKeyError, match="unknown") as caught:
        check("node3", ED, [file], node="n3")
    assert ED.fingerprint in caught.value.message
    assert "orch nodes trust n3" in caught.value.hint
    with pytest.raises(HostKeyError, match="has changed") as caught:
        check("node1", RSA, [file], node="n1")
    assert f"{file}:2" in caught.value.message
    assert "orch nodes trust n1 --replace" in caught.value.hint
    with pytest.raises(HostKeyError, match="revoked"):
        check("node1", OTHER, [file], node="n1")


def test_pin_adds_once_and_keeps_what_is_there(file: Path) -> None:
    assert pin("node1", [ED, RSA], file, node="n1") == [ED, RSA]
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_text()
    assert pin("node1", [ED, RSA], file, node="n1") == []
    assert file.read_text() == before
    assert pin("node2", [OTHER], file, node="n2") == [OTHER]
    assert file.read_text().startswith(before)
    check("node1", RSA, [file], node="n1")


def test_pin_refuses_a_change_unless_told_to_replace(file: Path) -> None:
    write(file, "# mine\n", line("node1,10.0.0.1"), line("node2", RSA))
    with pytest.raises(HostKeyError, match="has changed"):
        pin("node1", [OTHER], file, node="n1")
    assert pin("node1", [OTHER], file, node="n1", replace=True) == [OTHER]
    check("node1", OTHER, [file], node="n1")
    check("10.0.0.1", ED, [file], node="n1")  # the line's other name is not ours to drop
    check("node2", RSA, [file], node="n2")
    assert file.read_text().startswith("# mine\n")


def test_a_revoked_key_is_never_pinned(file: Path) -> None:
    write(file, line("*", ED, "@revoked "))
    with pytest.raises(HostKeyError, match="revoked"):
        pin("node1", [ED], file, node="n1", replace=True)


def test_hashed_names_are_found_and_written(file: Path) -> None:
    pin("[node1]:2222", [ED], file, node="n1", hashed=True)
    assert "node1" not in file.read_text()
    check("[node1]:2222", ED, [file], node="n1")
    assert not lookup("node1", [file])


def test_ssh_keygen_reads_what_we_write_and_we_read_what_it_hashes(file: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", str(key)], check=True)
    kind, blob = (tmp_path / "key.pub").read_text().split()[:2]
    mine = HostKey(kind, blob)
    listed = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], capture_output=True, text=True, check=True).stdout
    assert mine.fingerprint in listed
    pin("[node1]:2222", [mine], file, node="n1", hashed=True)
    pin("node2", [mine], file, node="n2")
    for name in ("[node1]:2222", "node2"):
        subprocess.run(["ssh-keygen", "-F", name, "-f", str(file)], capture_output=True, check=True)
    subprocess.run(["ssh-keygen", "-H", "-f", str(file)], capture_output=True, check=True)
    assert "node2" not in file.read_text()
    check("node2", mine, [file], node="n2")
