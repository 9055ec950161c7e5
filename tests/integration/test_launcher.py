"""The launcher for real: one process without torchrun, then two nodes with torchrun and Gloo.

As root the two nodes are two network namespaces joined by a veth pair; else both are 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.torchrun import torchrun_args
from orchestrator.node import launch
from orchestrator.specs import JobSpec, Node

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("ORCH_TRAINER_PYTHON", str(ROOT / ".venv-trainer" / "bin" / "python"))
SECRET = "hf_s3cret'\"$(id)\n-value"
RUN = "demo-20260131-120000-ab12"


class OneNode:
    """One node's launcher in a run folder of its own."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = (), **job: Any) -> None:
        self.folder, self.prefix = folder, prefix
        folder.mkdir(parents=True)
        base = {
            **{"schema": 1, "run": RUN, "name": "demo", "attempt": 1, "node": "n1", "index": 0, "nodes": 1},
            **{"procs": 1, "gpus": 0, "address": "", "port": 29400, "launcher": "none", "torchrun": []},
            **{"stop": "signal", "grace": 5, "stop_grace": 60, "rendezvous_timeout": 120},
        }
        env = {"ORCH_RUN_DIR": str(folder), "ORCH_RUN_ID": RUN}
        (folder / "job.json").write_text(json.dumps({**base, "env": env, **job}))
        (folder / "secrets.env").write_text(f"HF_TOKEN={json.dumps(SECRET)}\n")
        (folder / "code").mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> OneNode:
        argv = [*self.prefix, PYTHON, launch.__file__, str(self.folder)]
        self.process = subprocess.Popen(argv, cwd=self.folder / "code", start_new_session=True)
        return self

    def wait(self, timeout: float = 120) -> int:
        assert self.process
        return self.process.wait(timeout)

    def run(self) -> int:
        return self.start().wait()

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    def log(self) -> bytes:
        path = self.folder / "log"
        return path.read_bytes() if path.exists() else b""

    def lines(self, rank: int | str) -> list[str]:
        head = f"{rank}\t".encode()
        rows = self.log().split(b"\n")
        return [row[len(head) :].decode("utf-8", "replace") for row in rows if row.startswith(head)]

    def await_line(self, rank: int | str, text: str, timeout: float = 120) -> None:
        until(lambda: any(text in line for line in self.lines(rank)), f"{text!r} of rank {rank}", timeout)


def until(condition: Callable[[], Any], what: str, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


Make = Callable[..., OneNode]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Make]:
    """Makes a node that runs Python code, or a command, once; ends what is left of it."""
    made: list[OneNode] = []

    def make(code: str | None = None, command: list[str] | None = None, **job: Any) -> OneNode:
        it = OneNode(tmp_path / f"node{len(made)}", command=command or ["main.py"], **job)
        if code is not None:
            (it.folder / "code" / "main.py").write_text(code)
        made.append(it)
        return it

    yield make
    end(made)


def end(nodes: list[OneNode]) -> None:
    for each in nodes:
        if each.process and each.process.poll() is None:
            launch_tree = launch.descendants(each.pid)
            for pid in [each.pid, *launch_tree]:
                os.kill(pid, signal.SIGKILL)
            each.process.wait()


# ---- one process -------------------------------------------------------------------------------


def test_a_command_runs_with_its_environment_and_its_result_is_written(node: Make) -> None:
    it = node("import os; print(*(os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'ORCH_RUN_ID')))")
    assert it.run() == 0
    assert it.lines(0) == [f"0 1 {RUN}"]
    assert it.lines("-")[0] == f"run {RUN} attempt 1 on n1 (node 1 of 1): 1 ranks here, 1 in all, one node"
    assert it.lines("-")[-1] == "finished: succeeded"
    result = it.result
    assert (result["state"], result["exit_code"], result["host"]) == ("succeeded", 0, socket.gethostname())
    (rank,) = result["ranks"]
    assert (rank["rank"], rank["exit_code"], rank["error"]) == (0, 0, None)
    assert result["started_ns"] < rank["started_ns"] < rank["ended_ns"] < result["ended_ns"]


def test_stdout_and_stderr_stay_in_order_and_whole(node: Make) -> None:
    code = """
import os, sys
for n in range(2000):
    (sys.stdout if n % 2 else sys.stderr).write(f"line {n} " + "x" * (n % 97) + "\\n")
os.write(1, b"bytes \\xff\\xfe\\n" + b"y" * 200000 + b"\\nunfinished")
"""
    it = node(code)
    assert it.run() == 0
    rows = [row[2:] for row in it.log().split(b"\n") if row.startswith(b"0\t")]
    assert rows[:2000] == [b"line %d " % n + b"x" * (n % 97) for n in range(2000)]
    assert rows[2000] == b"bytes \xff\xfe"
    assert [len(row) for row in rows[2001:-1]] == [65536, 65536, 65536, 200000 - 3 * 65536]
    assert rows[-1] == b"unfinished"


def test_progress_bars_are_thinned(node: Make) -> None:
    code = """
import sys, time
for n in range(101):
    sys.stderr.write(f"\\r{n}%"); time.sleep(0.015)
sys.stderr.write("\\n"); print("end")
"""
    it = node(code)
    assert it.run() == 0
    lines = it.lines(0)
    assert lines[-2:] == ["100%", "end"]
    assert 2 <= len(lines) <= 7


def test_secrets_reach_the_job_and_nothing_else(node: Make) -> None:
    code = """
import os, sys, time
token = os.environ["HF_TOKEN"]
print(len(token), "token", token.splitlines()[0], flush=True)
open("up", "w")
while not os.path.exists("go"): time.sleep(0.02)
raise RuntimeError(token)
"""
    it = node(code).start()
    it.await_line(0, "token")
    assert not (it.folder / "secrets.env").exists()
    for pid in [it.pid, *launch.descendants(it.pid)]:
        assert b"s3cret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    (it.folder / "code" / "go").touch()
    assert it.wait() == 1
    assert it.lines(0)[0] == f"{len(SECRET)} token ***"
    assert b"s3cret" not in it.log()
    assert "s3cret" not in (it.folder / "result.json").read_text()
    assert it.result["ranks"][0]["error"]["message"] == "***"


@pytest.mark.parametrize(
    ("code", "exit_code", "kind", "message"),
    [
        ("def f():\n    raise ValueError('boom')\nf()", 1, "ValueError", "boom"),
        ("print('full'); raise SystemExit(3)", 3, "ExitCode", "exit code 3: full"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, "SIGSEGV", "killed by SIGSEGV"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", -9, "SIGKILL", "killed by SIGKILL"),
    ],
)
def test_why_a_rank_failed(node: Make, code: str, exit_code: int, kind: str, message: str) -> None:
    it = node(code)
    assert it.run() == 1
    (rank,) = it.result["ranks"]
    assert rank["exit_code"] == exit_code
    assert (rank["error"]["type"], rank["error"]["message"]) == (kind, message)
    assert it.result["started_ns"] < rank["error"]["time_ns"] < it.result["ended_ns"]
    assert it.lines("-")[-1] == f"finished: failed (rank 0: {kind}: {message})"


def test_the_trainers_own_word_on_an_error_wins(node: Make) -> None:
    event = {"kind": "error", "attempt": 1, "type": "NonFinite", "message": "loss is nan", "time": 1.5}
    it = node("raise ValueError('other')")
    (it.folder / "events").mkdir()
    (it.folder / "events" / "rank-0.jsonl").write_text(json.dumps(event) + "\n")
    assert it.run() == 1
    assert it.result["ranks"][0]["error"]["type"] == "NonFinite"


@pytest.mark.parametrize(
    ("command", "says"),
    [(["train.py"], r"train.py: not .*has: main.py\)"), (["nope", "x"], "nope: no such program")],
)
def test_a_command_that_is_not_there_is_127(node: Make, command: list[str], says: str) -> None:
    it = node("pass", command=command)
    assert it.run() == 127
    assert re.match(says, it.result["reason"])
    assert re.match(says, it.lines(0)[-1])
    assert it.result["ranks"][0]["exit_code"] == 127 and it.result["hint"]


def test_odd_arguments_arrive_as_they_are(node: Make) -> None:
    words = ["a b", "$(id)", "quote\"'", "new\nline", "", "--", "-x", "é"]
    it = node("import json, sys; print(json.dumps(sys.argv[1:]))", command=["main.py", *words])
    assert it.run() == 0
    assert json.loads(it.lines(0)[0]) == words


def test_output_of_a_grandchild_is_waited_for_and_then_it_is_ended(node: Make) -> None:
    code = """
import subprocess, sys
late = "import time; time.sleep(0.5); print('late', flush=True); time.sleep(600)"
print(subprocess.Popen([sys.executable, "-c", late], start_new_session=True).pid)
"""
    it = node(code)
    began = time.monotonic()
    assert it.run() == 0
    assert time.monotonic() - began < 20
    assert it.lines(0)[1] == "late"
    assert gone(int(it.lines(0)[0]))


# ---- stops -------------------------------------------------------------------------------------

PATIENT = """
import os, signal, sys, time
def on_term(*_):
    print("got SIGTERM", flush=True)
    {}
signal.signal(signal.SIGTERM, on_term)
print("up", flush=True)
while True: time.sleep(0.05)
"""
OBEYS, IGNORES, SAVES = PATIENT.format("sys.exit(3)"), PATIENT.format("pass"), PATIENT.format("sys.exit(75)")


def test_a_foreign_command_gets_sigterm_and_is_stopped(node: Make) -> None:
    it = node(OBEYS).start()
    it.await_line(0, "up")
    (it.folder / "stop").touch()
    assert it.wait() == 143
    assert it.lines(0) == ["up", "got SIGTERM"]
    assert it.result["state"] == "stopped" and it.result["ranks"][0]["error"] is None
    assert it.lines("-")[1:] == ["stop requested", "finished: stopped"]


def test_a_foreign_command_that_ignores_sigterm_is_killed_after_its_grace(node: Make) -> None:
    it = node(IGNORES, grace=1).start()
    it.await_line(0, "up")
    began = time.monotonic()
    (it.folder / "stop").touch()
    assert it.wait() == 143
    assert 1 <= time.monotonic() - began < 20
    assert it.lines(0) == ["up", "got SIGTERM"]
    assert it.result["ranks"][0]["exit_code"] == -9


def test_a_trainer_that_misses_the_stop_file_gets_sigterm_then_sigkill(node: Make) -> None:
    it = node(IGNORES, stop="file", stop_grace=1, grace=1).start()
    it.await_line(0, "up")
    (it.folder / "stop").touch()
    assert it.wait() == 143
    said = it.lines("-")
    assert said[2] == "1 s after the request the ranks still run: SIGTERM"
    assert said[3] == "1 s after the request the ranks still run: SIGKILL"


def test_the_word_kill_in_the_stop_file_kills_at_once(node: Make) -> None:
    it = node(IGNORES, stop="file", stop_grace=600, grace=600).start()
    it.await_line(0, "up")
    (it.folder / "stop").write_text("kill\n")
    assert it.wait(30) == 143
    assert it.lines(0) == ["up"]


def test_sigterm_to_the_launcher_asks_for_a_stop_and_the_second_kills(node: Make) -> None:
    it = node(IGNORES, grace=600).start()
    it.await_line(0, "up")
    os.kill(it.pid, signal.SIGTERM)
    it.await_line(0, "got SIGTERM")
    assert (it.folder / "stop").read_text() == ""
    os.kill(it.pid, signal.SIGTERM)
    assert it.wait(30) == 143
    assert it.result["ranks"][0]["exit_code"] == -9


def test_75_is_preempted_whoever_asked(node: Make) -> None:
    it = node(SAVES).start()
    it.await_line(0, "up")
    (it.folder / "stop").touch()
    assert it.wait() == 75
    assert it.result["state"] == "preempted"
    assert node("raise SystemExit(75)").run() == 75


def test_a_stop_that_was_there_before_starts_nothing(node: Make) -> None:
    it = node("print('ran')")
    (it.folder / "stop").touch()
    assert it.run() == 143
    assert it.lines(0) == [] and it.result["state"] == "stopped"
    assert it.lines("-") == ["stop requested", "finished: stopped"]
    assert not (it.folder / "secrets.env").exists()


# ---- what cannot start -------------------------------------------------------------------------


def test_a_taken_port_and_a_foreign_address_are_exit_4(node: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        it = node("pass", launcher="torchrun", nodes=2, address="127.0.0.1", port=port)
        assert it.run() == 4
    assert f"port {port} is taken" in it.result["reason"] and "run.port" in it.result["hint"]
    it = node("pass", launcher="torchrun", nodes=2, address="203.0.113.77")
    assert it.run() == 4
    assert "203.0.113.77" in it.result["reason"] and "private:" in it.result["hint"]
    assert it.result["state"] == "failed" and it.result["ranks"] == []


# ---- torchrun, two nodes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Iterator[list[tuple[str, tuple[str, ...]]]]:
    """(address, command prefix) of two nodes."""
    names = [f"orch{os.getpid()}{side}" for side in "ab"]
    addresses = [
        "10.231.77.10",
        "10.231.77.2",
    ]
    links = [f"ov{os.getpid() % 100000}{side}" for side in "ab"]

    def ip(*words: str, check: bool = True) -> bool:
        done = subprocess.run(["ip", *words], capture_output=True)
        return done.returncode == 0 or (check and pytest.fail(f"ip {words}: {done.stderr.decode()}"))

    if os.geteuid() != 0 or not shutil.which("ip") or not ip("netns", "add", names[0], check=False):
        yield [("127.0.0.1", ()), ("127.0.0.1", ())]
        return
    try:
        ip("netns", "add", names[1])
        ip(
            "link",
            "add",
            links[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            links[1],
            "netns",
            names[1],
        )
        for name, link, address in zip(names, links, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [(addresses[i], ("ip", "netns", "exec", names[i])) for i in range(2)]
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


Pair = Callable[..., list[OneNode]]


@pytest.fixture
def pair(tmp_path: Path, network: list[tuple[str, tuple[str, ...]]]) -> Iterator[Pair]:
    """Makes two nodes with two processes each, ready to start."""
    made: list[OneNode] = []

    def make(code: str, **job: Any) -> list[OneNode]:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        (tmp_path / "main.py").write_text(code)
        nodes = tuple(Node(f"n{i + 1}", network[i][0]) for i in range(2))
        spec = JobSpec(RUN, "demo", nodes, 2, (), port=port)
        for index, (address, prefix) in enumerate(network):
            shared: dict[str, Any] = {
                "launcher": "torchrun",
                "nodes": 2,
                "procs": 2,
                "port": port,
                "index": index,
            }
            shared |= {
                "address": address,
                "node": f"n{index + 1}",
                "torchrun": torchrun_args(spec, index),
                **job,
            }
            shared["command"] = [str(tmp_path / "main.py")]
            made.append(OneNode(tmp_path / f"n{index + 1}", prefix, **shared))
        return made

    yield make
    end(made)


GLOO = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
"""


def ranks_of(nodes: list[OneNode]) -> dict[int, OneNode]:
    return {rank["rank"]: it for it in nodes for rank in it.result["ranks"]}


def test_two_nodes_reduce_together_and_every_line_is_whole(pair: Pair) -> None:
    code = """
total = torch.tensor([float(rank)]); dist.all_reduce(total)
print("sum", total.item(), os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"], flush=True)
for n in range(20000):
    print(f"rank {rank} line {n} " + "z" * 80, file=sys.stderr if n % 3 else sys.stdout)
dist.destroy_process_group()
"""
    nodes = pair(GLOO + code)
    assert [it.wait(180) for it in [each.start() for each in nodes]] == [0, 0]
    by_rank = ranks_of(nodes)
    assert sorted(by_rank) == [0, 1, 2, 3]
    for rank, it in by_rank.items():
        # torch itself remarks on addresses that have no name
        first, *rest = [line for line in it.lines(rank) if "hostname of the client socket" not in line]
        interface = it.lines("-")[0].split("interface ")[1].split()[0]
        assert first == f"sum 6.0 {interface} ={interface}"
        assert rest == [f"rank {rank} line {n} " + "z" * 80 for n in range(20000)]
    assert all(it.lines("-")[-1] == "finished: succeeded" and len(it.lines("-")) <= 4 for it in nodes)


def test_the_first_failing_rank_is_told_from_those_it_took_along(pair: Pair) -> None:
    code = """
dist.barrier()
if rank == 3:
    raise ValueError("bad shard")
dist.all_reduce(torch.ones(1)); time.sleep(600)
"""
    nodes = pair(GLOO + code)
    began = time.monotonic()
    assert [it.wait(180) for it in [each.start() for each in nodes]] == [1, 1]
    results = {rank["rank"]: rank for it in nodes for rank in it.result["ranks"]}
    assert sorted(results) == [0, 1, 2, 3]
    error = results[3]["error"]
    assert (error["type"], error["message"]) == ("ValueError", "bad shard")
    assert "in <module>" in error["traceback"]
    there = ranks_of(nodes)[3]
    assert there.lines("-")[-1] == "finished: failed (rank 3: ValueError: bad shard)"
    for rank in (0, 1, 2):
        assert results[rank]["exit_code"] != 0
        assert results[rank]["error"] is None or "onnection closed" in results[rank]["error"]["message"]
    ends = [rank["ended_ns"] for rank in results.values()]
    assert max(ends) - min(ends) < 15e9 and time.monotonic() - began < 180


def test_a_stop_file_makes_all_nodes_save_and_return_75(pair: Pair) -> None:
    code = """
stop, flag = os.environ["ORCH_RUN_DIR"] + "/stop", torch.zeros(1)
print("up", flush=True)
while not flag[0]:
    flag[0] = os.path.exists(stop); dist.all_reduce(flag); time.sleep(0.02)
time.sleep((1.5, 0, 6, 0)[rank])  # longer than the head keeps the rendezvous
print("saved", flush=True); os._exit(75)
"""
    nodes = pair(GLOO + code, stop="file")
    for it in nodes:
        it.start()
    until(lambda: all(b"\tup\n" in it.log() for it in nodes), "both nodes to be up", 180)
    (nodes[1].folder / "stop").touch()
    assert [it.wait(60) for it in nodes] == [75, 75]
    assert [it.result["state"] for it in nodes] == ["preempted", "preempted"]
    assert all(it.lines(rank)[-1] == "saved" for rank, it in ranks_of(nodes).items())


def test_a_rendezvous_that_does_not_come_together_ends_with_words(pair: Pair) -> None:
    head, other = pair("pass", rendezvous_timeout=17)
    assert other.start().wait(90) == 1
    assert 17e9 <= other.result["ended_ns"] - other.result["started_ns"] < 30e9
    assert "did not come together within 17 s" in other.result["reason"]
    assert "it does not answer here" in other.result["reason"]
    assert any("waiting for the rendezvous at" in line and "since 15 s" in line for line in other.lines("-"))
    assert not (head.folder / "result.json").exists()


def alone(node: Make, code: str, **job: Any) -> OneNode:
    """One node with two ranks under torchrun."""
    args = torchrun_args(JobSpec(RUN, "demo", (Node("n1", "127.0.0.1"),), 2, ()), 0)
    return node(code, launcher="torchrun", procs=2, torchrun=args, **job)


def test_kill_9_of_the_launcher_leaves_no_process(node: Make) -> None:
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""
    it = alone(node, code).start()
    until(lambda: it.lines(0) and it.lines(1), "both ranks", 120)
    pids = launch.descendants(it.pid)
    assert len(pids) == 1 + 2 * 3  # torchrun; wrapper, command and its child for each rank
    commands = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in pids]
    sockets = {Path(words[words.index("--rank") + 1]) for words in commands if words[1] == "-I"}
    (path,) = sockets
    assert path.exists()
    os.kill(it.pid, signal.SIGKILL)
    assert it.wait() == -9
    until(lambda: all(gone(pid) for pid in pids), "the job's processes to be gone", 20)
    assert not path.parent.exists()


def test_torchrun_is_not_left_behind_and_ranks_that_ignore_sigterm_are_killed(node: Make) -> None:
    it = alone(node, IGNORES, grace=1).start()
    it.await_line(0, "up")
    it.await_line(1, "up")
    pids = launch.descendants(it.pid)
    (it.folder / "stop").touch()
    assert it.wait(60) == 143
    assert [rank["exit_code"] for rank in it.result["ranks"]] == [-9, -9]
    assert it.lines(0) == ["up", "got SIGTERM"]
    assert all(gone(pid) for pid in pids)


def test_when_a_rank_fails_those_that_hang_have_three_seconds(node: Make) -> None:
    code = """
import os, signal, time
if os.environ["RANK"] == "0":
    while not os.path.exists("up"): time.sleep(0.02)
    raise KeyError("first")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("up", "w")
while True: time.sleep(0.05)
"""
    it = alone(node, code)
    assert it.run() == 1
    failed, hung = it.result["ranks"]
    assert failed["error"]["type"] == "KeyError"
    assert (hung["exit_code"], hung["error"]) == (-9, None)
    assert 2e9 < hung["ended_ns"] - failed["ended_ns"] < 15e9
