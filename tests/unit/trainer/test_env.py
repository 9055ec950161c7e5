from __future__ import annotations

import pytest

from trainer.distributed.env import RankEnv, expand_tasks, first_host
from trainer.errors import RankEnvironmentError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
SRUN = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[03-05],cpu1",
}


def test_alone():
    env = RankEnv.read({})
    assert (env.rank, env.world_size, env.launcher, env.is_main, env.is_node_main) == (
        0,
        1,
        "none",
        True,
        True,
    )


def test_torchrun():
    env = RankEnv.read(TORCHRUN)
    assert env == RankEnv(5, 1, 8, 4, 1, "10.0.0.1", 29400, "torchrun")
    assert not env.is_main and not env.is_node_main


def test_torchrun_inside_srun_wins():
    assert RankEnv.read(SRUN | TORCHRUN).launcher == "torchrun"


def test_deepspeed_with_its_flag():
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "h"}
    assert RankEnv.read(environ, 1) == RankEnv(1, 1, 2, 2, 0, "h", 29500, "torchrun")


def test_flag_stands_in_for_a_missing_local_rank():
    assert RankEnv.read({"RANK": "3", "WORLD_SIZE": "4"}, 1).local_rank == 1


def test_srun():
    assert RankEnv.read(SRUN) == RankEnv(4, 0, 6, 2, 2, "gpu03", 15042, "slurm")


def test_batch_script_without_srun_is_one_process():
    batch = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert RankEnv.read(batch).world_size == 1


def test_open_mpi_on_one_node():
    environ = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("RANK", "LOCAL_RANK")}
    environ |= {f"OMPI_COMM_WORLD_{name}": "4" for name in ("SIZE", "LOCAL_SIZE")}
    assert RankEnv.read(environ) == RankEnv(2, 2, 4, 4, launcher="mpi")


def test_mpich_on_two_nodes_needs_an_address():
    environ = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(RankEnvironmentError, match="MASTER_ADDR"):
        RankEnv.read(environ)
    assert RankEnv.read(environ | {"MASTER_ADDR": "a"}).rank == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"RANK": "x"}, "RANK is 'x', not a number"),
        ({"RANK": "8"}, "rank 8 is not within its world of 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 is not within its world of 4"),
    ],
)
def test_wrong_environment(change, message):
    with pytest.raises(RankEnvironmentError, match=message):
        RankEnv.read(TORCHRUN | change)


def test_contradicting_flag():
    with pytest.raises(RankEnvironmentError, match="contradicts"):
        RankEnv.read(TORCHRUN, 0)


@pytest.mark.parametrize(
    "text, host",
    [
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("n1,n2", "n1"),
        ("host-1", "host-1"),
        ("", ""),
        ("a[1-2]b", "a1b"),
    ],
)
def test_first_host(text, host):
    assert first_host(text) == host


def test_expand_tasks():
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
