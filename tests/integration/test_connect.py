"""The SSH layer against a real sshd, started here on a free port of 127.0.0.1."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.connect.fanout import fanout
from orchestrator.connect.ssh import SshConnector
from orchestrator.errors import (
    AuthError,
    ConfigError,
    ConnectError,
    ConnectionLost,
    DeadlineError,
    HostKeyError,
)
from orchestrator.specs import Node

pytestmark = pytest.mark.integration

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin:/usr/local/sbin") or "sshd"


class Sshd:
    """An sshd of our own: its own host keys, authorized_keys, port; stopped by pid."""

    def __init__(self, folder: Path, key_types: tuple[str, ...] = ("ed25519", "rsa"), **options: str) -> None:
        self.folder = folder
        folder.mkdir()
        self.port = free_port()
        for kind in key_types:
            keygen(folder / f"host_{kind}", kind)
        self.key = folder / "id"
        if not self.key.exists():
            keygen(self.key)
        shutil.copy(f"{self.key}.pub", folder / "authorized_keys")
        settings = {
            "Port": str(self.port),
            "ListenAddress": "127.0.0.1",
            "AuthorizedKeysFile": str(folder / "authorized_keys"),
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "MaxStartups": "200",
            **options,
        }
        lines = [f"{name} {value}" for name, value in settings.items()]
        lines += [f"HostKey {folder}/host_{kind}" for kind in key_types]
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")
        self.known_hosts = folder / "known_hosts"
        self.pin(*key_types[:1])
        self.start()

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = (self.folder / "log").open("ab")
        command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self.process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        until(lambda: answers(self.port), "sshd listens")

    def stop(self) -> None:
        """Ends the server and every session it has."""
        for child in reversed(children(self.process.pid)):  # sessions before their commands
            subprocess.run(["kill", "-9", str(child)], check=False, capture_output=True)
        self.process.kill()
        self.process.wait()

    def pin(self, *kinds: str) -> None:
        keys = [(self.folder / f"host_{kind}.pub").read_text().split()[:2] for kind in kinds]
        lines = [f"[127.0.0.1]:{self.port} {kind} {blob}\n" for kind, blob in keys]
        self.known_hosts.write_text("".join(lines))

    def node(self, name: str = "n1", **changes: object) -> Node:
        node = Node(
            name=name,
            address="127.0.0.1",
            port=self.port,
            user=getpass.getuser(),
            key=str(self.key),
            known_hosts=str(self.known_hosts),
        )
        return replace(node, **changes)


def keygen(path: Path, kind: str = "ed25519") -> None:
    size = ["-b", "2048"] if kind == "rsa" else []
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", kind, *size, "-f", str(path)], check=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], object], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in out.splitlines()]
    direct = [child for child, parent in pairs if parent == pid]
    return [each for child in direct for each in (*children(child), child)]


def running(marker: str) -> bool:
    out = subprocess.run(["ps", "-eo", "stat=,args="], capture_output=True, text=True, check=True).stdout
    return any(marker in line and not line.startswith("Z") for line in out.splitlines())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    sshd = Sshd(tmp_path_factory.mktemp("sshd") / "one")
    yield sshd
    sshd.stop()


@pytest.fixture
def connector(tmp_path: Path) -> Iterator[SshConnector]:
    made = SshConnector(home=tmp_path)  # nobody's ~/.ssh
    yield made
    made.close()


# ---- commands


def test_run_gives_output_error_and_code(server: Sshd, connector: SshConnector) -> None:
    host = connector.connect(server.node())
    done = host.run("printf 'a\\n'; echo \"it's!\" >&2; exit 3")
    assert (done.stdout, done.stderr, done.returncode) == ("a\n", "it's!\n", 3)


def test_a_signal_gives_128_plus_its_number(server: Sshd, connector: SshConnector) -> None:
    assert connector.connect(server.node()).run("kill -9 $$").returncode == 137


def test_five_megabytes_both_ways_at_once(server: Sshd, connector: SshConnector) -> None:
    data = os.urandom(2_500_000).hex().encode()
    done = connector.connect(server.node()).run("tee /dev/stderr", stdin=data, timeout=60)
    assert done.stdout.encode() == data
    assert done.stderr.encode() == data


def test_a_command_that_does_not_read_its_input_ends(server: Sshd, connector: SshConnector) -> None:
    assert connector.connect(server.node()).run("exit 4", stdin=b"x" * 5_000_000).returncode == 4


def test_a_late_command_misses_its_deadline_and_the_connection_lives(server: Sshd, connector: SshConnector) -> None:
    host = connector.connect(server.node())
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"n1: the command did not end within 0.5 s"):
        host.run("sleep 30.3 & sleep 30.4", timeout=0.5)
    assert time.monotonic() - began < 2
    if os.geteuid() != 0:  # sshd passes no signals on to a session of root
        until(lambda: not running("sleep 30."), "the late command is gone")
    assert host.run("echo ok").stdout == "ok\n"


def test_many_commands_at_once_on_one_connection(server: Sshd, connector: SshConnector) -> None:
    host = connector.connect(server.node())
    names = [str(number) for number in range(24)]  # more than MaxSessions (10)
    results = fanout(names, lambda n: host.run(f"sleep 0.1; echo {n}").stdout, deadline=30, what="echo")
    assert results == {name: f"{name}\n" for name in names}


def test_one_connection_per_node(server: Sshd, connector: SshConnector) -> None:
    assert connector.connect(server.node()) is connector.connect(server.node())


# ---- streams


def test_a_stream_gives_every_byte_the_code_and_stderr(server: Sshd, connector: SshConnector) -> None:
    stream = connector.connect(server.node()).stream("seq 300000; echo done >&2; exit 5")
    got = b"".join(iter(stream.read, b""))
    assert got == b"".join(b"%d\n" % n for n in range(1, 300001))
    assert (stream.returncode, stream.stderr) == (5, "done\n")


def test_a_silent_stream_gives_none_at_the_timeout(server: Sshd, connector: SshConnector) -> None:
    stream = connector.connect(server.node()).stream("echo a; sleep 60")
    assert stream.read(5) == b"a\n"
    assert stream.read(0.05) is None
    stream.close()
    assert stream.read(5) == b""
    assert stream.returncode is None


def test_close_from_another_thread_ends_a_read(server: Sshd, connector: SshConnector) -> None:
    stream = connector.connect(server.node()).stream("sleep 60")
    threading.Timer(0.3, stream.close).start()
    began = time.monotonic()
    assert stream.read(20) == b""
    assert time.monotonic() - began < 5


def test_a_closed_stream_leaves_no_process_behind(server: Sshd, connector: SshConnector) -> None:
    stream = connector.connect(server.node()).stream("sleep 61.61 & sleep 61.62")
    until(lambda: running("sleep 61.61") and running("sleep 61.62"), "both sleeps run")
    stream.close()
    until(lambda: not running("sleep 61.6"), "both sleeps are gone")


def test_a_connection_cut_during_a_stream_is_noticed_and_reopened(tmp_path: Path) -> None:
    sshd = Sshd(tmp_path / "cut")
    connector = SshConnector(home=tmp_path)
    try:
        host = connector.connect(sshd.node())
        stream = host.stream("while :; do echo line; sleep 0.01; done")
        assert stream.read(5)
        sshd.stop()
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match="n1: the SSH connection broke"):
            while stream.read(10):
                pass
        assert time.monotonic() - began < 5
        with pytest.raises(ConnectError, match="connection refused"):
            host.run("true")
        sshd.start()
        assert host.run("echo again").stdout == "again\n"
    finally:
        connector.close()
        sshd.stop()


def test_a_frozen_server_is_noticed_though_its_kernel_answers(tmp_path: Path) -> None:
    sshd = Sshd(tmp_path / "frozen")
    connector = SshConnector(home=tmp_path)
    frozen: list[int] = []
    try:
        stream = connector.connect(sshd.node()).stream("echo a; sleep 60")
        assert stream.read(5) == b"a\n"
        frozen = [pid for pid in children(sshd.process.pid) if "sshd" in Path(f"/proc/{pid}/comm").read_text()]
        for pid in frozen:
            subprocess.run(["kill", "-STOP", str(pid)], check=True)
        began = time.monotonic()
        with pytest.raises(ConnectionLost):
            while stream.read(20) is None:
                pass
        assert time.monotonic() - began < 16
    finally:
        connector.close()
        sshd.stop()


# ---- refusals, each in time and with its reason


def test_a_wrong_key_names_key_and_user(server: Sshd, connector: SshConnector, tmp_path: Path) -> None:
    keygen(tmp_path / "other")
    with pytest.raises(AuthError) as caught:
        connector.connect(server.node(key=str(tmp_path / "other")))
    assert str(tmp_path / "other") in str(caught.value)
    assert f"{getpass.getuser()}@127.0.0.1" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_missing_and_an_encrypted_key_are_told(server: Sshd, connector: SshConnector, tmp_path: Path) -> None:
    with pytest.raises(AuthError, match="does not exist"):
        connector.connect(server.node(key=str(tmp_path / "none")))
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-N", "secret", "-t", "ed25519", "-f", str(locked)], check=True)
    with pytest.raises(AuthError, match="is encrypted and not in the ssh-agent"):
        connector.connect(server.node(key=str(locked)))


def test_an_unknown_host_key_is_refused_with_its_fingerprint(
    server: Sshd, connector: SshConnector, tmp_path: Path
) -> None:
    with pytest.raises(HostKeyError) as caught:
        connector.connect(server.node(known_hosts=str(tmp_path / "empty")))
    listed = ["ssh-keygen", "-lf", str(server.folder / "host_ed25519.pub")]
    fingerprint = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[1]
    assert fingerprint in str(caught.value)
    assert "orch nodes trust n1" in caught.value.hint


def test_a_changed_host_key_is_refused_with_file_and_line(
    server: Sshd, connector: SshConnector, tmp_path: Path
) -> None:
    keygen(tmp_path / "imposter")
    kind, blob = (tmp_path / "imposter.pub").read_text().split()[:2]
    pinned = tmp_path / "known"
    pinned.write_text(f"# a comment\n[127.0.0.1]:{server.port} {kind} {blob}\n")
    with pytest.raises(HostKeyError, match="has changed") as caught:
        connector.connect(server.node(known_hosts=str(pinned)))
    assert f"{pinned}:2" in str(caught.value)


def test_only_the_pinned_key_type_is_asked_for(server: Sshd, connector: SshConnector, tmp_path: Path) -> None:
    kind, blob = (server.folder / "host_rsa.pub").read_text().split()[:2]
    pinned = tmp_path / "known"
    pinned.write_text(f"[127.0.0.1]:{server.port} {kind} {blob}\n")
    host = connector.connect(server.node(known_hosts=str(pinned)))
    assert host.run("echo ok").ok


def test_a_pinned_type_that_the_server_no_longer_has_is_refused(tmp_path: Path, server: Sshd) -> None:
    keygen(tmp_path / "ecdsa", "ecdsa")
    kind, blob = (tmp_path / "ecdsa.pub").read_text().split()[:2]
    pinned = tmp_path / "known"
    pinned.write_text(f"[127.0.0.1]:{server.port} {kind} {blob}\n")
    with pytest.raises(HostKeyError, match="no longer has a host key of the pinned type"):
        SshConnector(home=tmp_path).connect(server.node(known_hosts=str(pinned)))


def test_trust_pins_what_the_server_shows_and_refuses_a_change(
    server: Sshd, connector: SshConnector, tmp_path: Path
) -> None:
    node = server.node(known_hosts=str(tmp_path / "new" / "known_hosts"))
    assert {key.type for key in connector.trust(node)} == {"ssh-ed25519", "ssh-rsa"}
    assert connector.trust(node) == []
    assert connector.connect(node).run("echo ok").ok
    keygen(tmp_path / "imposter")
    kind, blob = (tmp_path / "imposter.pub").read_text().split()[:2]
    Path(node.known_hosts).write_text(f"[127.0.0.1]:{server.port} {kind} {blob}\n")
    with pytest.raises(HostKeyError):
        connector.trust(node)
    assert len(connector.trust(node, replace=True)) == 2
    assert blob not in Path(node.known_hosts).read_text()


def test_ssh_itself_accepts_what_trust_wrote(server: Sshd, connector: SshConnector, tmp_path: Path) -> None:
    node = server.node(known_hosts=str(tmp_path / "known_hosts"))
    connector.trust(node)
    options = [
        "-F",
        "none",
        "-o",
        "StrictHostKeyChecking=yes",
        "-o",
        f"UserKnownHostsFile={node.known_hosts}",
    ]
    options += ["-o", "BatchMode=yes", "-i", node.key, "-p", str(node.port)]
    subprocess.run(["ssh", *options, f"{node.user}@127.0.0.1", "true"], check=True, timeout=20)


def test_a_closed_port_is_refused_at_once(server: Sshd, connector: SshConnector) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectError, match="connection refused"):
        connector.connect(server.node(port=free_port()))
    assert time.monotonic() - began < 1


def test_a_server_that_never_speaks_is_given_up_in_time(server: Sshd, connector: SshConnector) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(ConnectError, match="no SSH server speaks"):
            connector.connect(server.node(port=listener.getsockname()[1]), timeout=1)
        assert time.monotonic() - began < 2


def test_an_unknown_name_and_an_unreachable_address(server: Sshd, connector: SshConnector) -> None:
    with pytest.raises(ConnectError, match=r"cannot be resolved|was not resolved"):
        connector.connect(server.node(address="no-such-host.invalid"), timeout=3)
    began = time.monotonic()
    with pytest.raises(ConnectError, match="cannot reach"):
        connector.connect(server.node(address="192.0.2.1"), timeout=1)
    assert time.monotonic() - began < 2


# ---- ~/.ssh/config, agent, jump hosts


def test_names_of_ssh_config_are_understood(server: Sshd, tmp_path: Path) -> None:
    (tmp_path / "more").write_text(f"  Port {server.port}\n  UserKnownHostsFile {server.known_hosts}\n")
    config = f"Host box\n  HostName 127.0.0.1\n  IdentityFile {server.key}\n  Include {tmp_path}/mo*\n"
    (tmp_path / "config").write_text(config)
    connector = SshConnector(config=tmp_path / "config", home=tmp_path)
    assert connector.connect(Node(name="box", address="box")).run("echo ok").ok
    connector.close()


def test_a_proxy_command_carries_the_connection(server: Sshd, tmp_path: Path) -> None:
    relay = "python3 -c 'import socket,sys,threading,os;" if not shutil.which("nc") else ""
    program = f"nc 127.0.0.1 {server.port}"
    if relay:
        script = tmp_path / "relay.py"
        script.write_text(
            "import os, socket, sys, threading\n"
            f"s = socket.create_connection(('127.0.0.1', {server.port}))\n"
            "def up():\n"
            "    while data := os.read(0, 65536): s.sendall(data)\n"
            "threading.Thread(target=up, daemon=True).start()\n"
            "while data := s.recv(65536): os.write(1, data)\n"
        )
        program = f"python3 {script}"
    (tmp_path / "config").write_text(f"Host 127.0.0.1\n  ProxyCommand {program}\n")
    connector = SshConnector(config=tmp_path / "config", home=tmp_path)
    assert connector.connect(server.node()).run("echo ok").ok
    connector.close()


def test_an_encrypted_key_is_used_through_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Sshd
) -> None:
    out = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
    variables = dict(line.split(";")[0].split("=") for line in out.splitlines()[:2])
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", variables["SSH_AUTH_SOCK"])
        subprocess.run(["ssh-add", "-q", str(server.key)], check=True)
        locked = tmp_path / "id"
        shutil.copy(server.key, locked)
        shutil.copy(f"{server.key}.pub", f"{locked}.pub")
        subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(locked)], check=True)
        connector = SshConnector(home=tmp_path)
        assert connector.connect(server.node(key=str(locked))).run("echo ok").ok
        connector.close()
    finally:
        subprocess.run(["kill", variables["SSH_AGENT_PID"]], check=True)


def test_a_jump_host_of_the_inventory_and_one_outside(tmp_path: Path, server: Sshd) -> None:
    bastion = Sshd(tmp_path / "bastion")
    try:
        inside = server.node("inside", jump="bastion")
        connector = SshConnector({"bastion": bastion.node("bastion"), "inside": inside}, home=tmp_path)
        assert connector.connect(inside).run("echo $SSH_CONNECTION").stdout
        assert len(children(bastion.process.pid)) > 0
        connector.close()

        shutil.copy(bastion.folder / "authorized_keys", tmp_path / "keys")
        both = tmp_path / "both"
        both.write_text(server.known_hosts.read_text() + bastion.known_hosts.read_text())
        with (bastion.folder / "authorized_keys").open("a") as keys:
            keys.write(Path(f"{server.key}.pub").read_text())
        outside = f"{getpass.getuser()}@127.0.0.1:{bastion.port}"
        connector = SshConnector(home=tmp_path)
        assert connector.connect(server.node(jump=outside, known_hosts=str(both))).run("echo ok").ok
        with pytest.raises(ConnectError, match=r"the jump host .* cannot reach"):
            connector.connect(server.node("off", jump=outside, known_hosts=str(both), port=free_port()))
        with pytest.raises(HostKeyError, match=r"its jump host .* cannot be used: the host key"):
            connector.connect(server.node("n", jump=outside))
        connector.close()
    finally:
        bastion.stop()


def test_jump_hosts_in_a_circle_are_refused(tmp_path: Path, server: Sshd) -> None:
    nodes = {"a": server.node("a", jump="b"), "b": server.node("b", jump="a")}
    with pytest.raises(ConfigError, match="a → b → a"):
        SshConnector(nodes, home=tmp_path).connect(nodes["a"])


# ---- forwards


class Echo:
    """A TCP target here: answers N bytes to each `N\\n`, `megabytes` in all per connection."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            size = int(lines.readline())
            block = b"x" * (1 << 20)
            for _ in range(size >> 20):
                connection.sendall(block)
            connection.sendall(lines.read())  # and then what came before the end of input


def fetch(port: int, size: int, tail: bytes = b"tail") -> int:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"%d\n" % size + tail)
        sock.shutdown(socket.SHUT_WR)
        got = 0
        last = b""
        while data := sock.recv(1 << 20):
            got += len(data)
            last = (last + data)[-len(tail) :]
        assert last == tail
        return got - len(tail)


def test_a_forward_carries_many_connections_whole(server: Sshd, connector: SshConnector) -> None:
    echo = Echo()
    with connector.connect(server.node()).forward(0, echo.address) as port:
        names = [str(number) for number in range(12)]
        results = fanout(names, lambda n: fetch(port, 4 << 20), deadline=60, what="fetch")
        assert set(results.values()) == {4 << 20}
    until(lambda: not answers(port), "the port is closed again")


def test_a_forward_takes_the_port_asked_for_or_a_free_one(server: Sshd, connector: SshConnector) -> None:
    echo = Echo()
    host = connector.connect(server.node())
    wanted = free_port()
    with host.forward(wanted, echo.address) as got:
        assert got == wanted
        with host.forward(wanted, echo.address) as other:
            assert other != wanted
            assert fetch(other, 1 << 20) == fetch(got, 1 << 20) == 1 << 20


def test_a_forward_to_nowhere_closes_the_connection(server: Sshd, connector: SshConnector) -> None:
    with (
        connector.connect(server.node()).forward(0, ("127.0.0.1", free_port())) as port,
        socket.create_connection(("127.0.0.1", port), timeout=5) as sock,
    ):
        assert sock.recv(1) == b""


def test_a_refused_forward_says_what_to_allow(tmp_path: Path) -> None:
    sshd = Sshd(tmp_path / "strict", AllowTcpForwarding="no")
    connector = SshConnector(home=tmp_path)
    try:
        forward = connector.connect(sshd.node()).forward(5000, ("127.0.0.1", 9))
        with pytest.raises(ConnectError, match="refuses to forward") as caught, forward:
            pass
        assert "AllowTcpForwarding" in caught.value.hint
    finally:
        connector.close()
        sshd.stop()
