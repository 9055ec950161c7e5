from __future__ import annotations

import pytest

from orchestrator.commands.torchrun import normalise, rendezvous_endpoint, torchrun_args
from orchestrator.errors import UsageError
from orchestrator.specs import JobSpec, Node


def spec(*private: str, **values: object) -> JobSpec:
    nodes = tuple(Node(f"n{i}", "203.0.113.9", private=address) for i, address in enumerate(private))
    return JobSpec("demo-20260131-120000-ab12", "demo", nodes, 8, ("train.py",), **values)  # type: ignore[arg-type]


def test_two_nodes_meet_at_the_heads_private_address() -> None:
    job = spec("10.0.0.10", "10.0.0.2", attempt=2, port=29500)
    common = ("--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.10:29500")
    timeouts = "join_timeout=90,read_timeout=90,last_call_timeout=1"
    assert torchrun_args(job, 0, timeout=90) == (
        *common,
        "--rdzv-id=demo-20260131-120000-ab12-2",
        f"--rdzv-conf=is_host=true,{timeouts}",
        "--local-addr=10.0.0.10",
        "--max-restarts=0",
    )
    second = torchrun_args(job, 1, timeout=90)
    assert f"--rdzv-conf=is_host=false,{timeouts}" in second
    assert "--local-addr=10.0.0.2" in second
    assert second[:4] == common


def test_one_node_meets_itself_on_any_free_port() -> None:
    args = torchrun_args(spec("10.0.0.1"), 0)
    assert "--rdzv-endpoint=127.0.0.1:0" in args
    assert "--local-addr=127.0.0.1" in args
    assert "--rdzv-backend=c10d" in args


def test_an_ipv6_head_is_bracketed() -> None:
    assert rendezvous_endpoint(spec("fd00::1", "fd00::2")) == "[fd00::1]:29400"
    assert "--local-addr=fd00::2" in torchrun_args(spec("fd00::1", "fd00::2"), 1)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("train.py --lr 1e-4", "train.py --lr 1e-4"),
        ("-m pkg.train x=1", "-m pkg.train x=1"),
        ("python train.py", "train.py"),
        ("python3 -u train.py --u", "train.py --u"),
        ("/usr/bin/python3.12 -m pkg", "-m pkg"),
        ("torchrun train.py", "train.py"),
        ("torchrun -m pkg", "-m pkg"),
        ("torchrun --no-python ./run.sh", "./run.sh"),
        ("python -m torch.distributed.run train.py", "train.py"),
        ("deepspeed train.py --deepspeed ds.json", "train.py --deepspeed ds.json"),
        ("accelerate launch train.py", "train.py"),
        ("bash run.sh --nproc-per-node 8", "bash run.sh --nproc-per-node 8"),
        ("train.py torchrun --x", "train.py torchrun --x"),
    ],
)
def test_a_leading_python_or_launcher_is_dropped(given: str, taken: str) -> None:
    assert normalise(given.split()) == tuple(taken.split())


def test_odd_words_stay_as_they_are() -> None:
    words = ("train.py", "a b", "$(x)", "new\nline", "", "'")
    assert normalise(words) == words


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["torchrun", "--nproc-per-node=8", "train.py"], "torchrun's own option '--nproc-per-node=8'"),
        (["python", "-m", "torch.distributed.launch", "--nnodes=2", "x.py"], "own option '--nnodes=2'"),
        (["deepspeed", "--num_gpus", "4", "x.py"], "deepspeed's own option"),
        (["accelerate", "launch", "--multi_gpu", "x.py"], "accelerate launch's own option"),
        (["python"], "`python` alone"),
        (["torchrun"], "`torchrun` alone"),
        (["-m"], "`-m` needs an argument"),
        (["mpirun", "-n", "4", "x"], "'mpirun' starts processes itself"),
        ([], "no command"),
        (["a\0b"], "NUL"),
    ],
)
def test_what_cannot_be_run_is_refused(given: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        normalise(given)
    assert "NUL" in says or caught.value.hint


def test_without_torchrun_the_command_stays_as_it_is() -> None:
    assert normalise(["python", "x.py"], "none") == ("python", "x.py")
    assert normalise(["mpirun", "-n", "4", "x"], "none") == ("mpirun", "-n", "4", "x")
    with pytest.raises(UsageError):
        normalise([], "none")
