from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from orchestrator.connect.local import LocalConnector, LocalHost
from orchestrator.errors import DeadlineError
from orchestrator.specs import Node

NODE = Node("here", "127.0.0.1")


@pytest.fixture
def host() -> LocalHost:
    return LocalConnector().connect(NODE)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_run(host: LocalHost) -> None:
    done = host.run("cat; echo e >&2; exit 3", stdin=b"in \xff")
    assert (done.stdout, done.stderr, done.returncode, done.ok) == ("in \ufffd", "e\n", 3, False)
    assert host.run("kill -9 $$").returncode == 137
    assert host.run("cat").stdout == ""  # no input is the end of input, never the terminal


def test_megabytes_both_ways(host: LocalHost) -> None:
    data = os.urandom(1_000_000).hex().encode()
    done = host.run("tee /dev/stderr", stdin=data)
    assert done.stdout.encode() == done.stderr.encode() == data


def test_a_missed_deadline_kills_the_whole_group(host: LocalHost) -> None:
    with pytest.raises(DeadlineError, match=r"here: the command did not end within 0.3 s") as caught:
        host.run("sleep 60 & echo $! >&2; sleep 60", timeout=0.3)
    assert gone(int(caught.value.lines[0]))


def test_stream(host: LocalHost) -> None:
    stream = host.stream("seq 20000; echo e >&2; exit 4")
    assert b"".join(iter(stream.read, b"")) == b"".join(b"%d\n" % n for n in range(1, 20001))
    assert (stream.returncode, stream.stderr) == (4, "e\n")
    assert stream.read() == b""


def test_a_silent_stream_gives_none_and_close_ends_it(host: LocalHost) -> None:
    stream = host.stream("sleep 60 & echo $!; sleep 60")
    pid = int(stream.read(5))
    assert stream.read(0.01) is None
    threading.Timer(0.05, stream.close).start()
    assert stream.read(10) == b""
    assert stream.returncode is None
    assert gone(pid)


def test_the_environment_given_is_all_there_is() -> None:
    host = LocalHost(NODE, {"PATH": os.environ["PATH"], "HOME": "/h"})
    assert host.run('printf %s "$HOME${USER-none}"').stdout == "/hnone"


def test_forward_to_itself_is_nothing_and_elsewhere_a_relay(host: LocalHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with host.forward(port, ("127.0.0.1", port)) as same:
            assert same == port
        with host.forward(port, ("localhost", port)) as other:
            assert other != port  # that one is taken
            with socket.create_connection(("127.0.0.1", other), timeout=5) as client:
                peer, _ = server.accept()
                with peer:
                    peer.settimeout(5)
                    client.sendall(b"ping")
                    assert peer.recv(4) == b"ping"
                    peer.sendall(b"pong")
                    assert client.recv(4) == b"pong"
