"""The rank environment, read once into a frozen object.

Understands torchrun and deepspeed (`RANK`, `WORLD_SIZE`, `LOCAL_RANK` …), `srun`, `mpirun` (Open MPI,
and the PMI variables of MPICH, Hydra and Intel MPI), and no launcher at all. Ranks are read, never
computed: torchrun's group rank is not the order of the nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import RankEnvironmentError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class RankEnv:
    """Who this process is among all processes of the job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    launcher: str = "none"
    """`torchrun` (and whatever sets the same variables), `slurm`, `mpi` or `none`."""

    def __post_init__(self) -> None:
        for name, value, size in (
            ("rank", self.rank, self.world_size),
            ("local rank", self.local_rank, self.local_world_size),
        ):
            if not 0 <= value < size:
                raise RankEnvironmentError(
                    f"{self.launcher} environment: {name} {value} is not within its world of {size}"
                )

    @property
    def is_main(self) -> bool:
        """Global rank 0: the only one that writes checkpoints and TensorBoard files."""
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """The one rank of each node that prepares what the node's ranks share."""
        return self.local_rank == 0

    @classmethod
    def read(cls, environ: Mapping[str, str], local_rank: int | None = None) -> RankEnv:
        """The environment of this process; `local_rank` is the `--local_rank` flag, if it was given.

        Raises RankEnvironmentError where variables are missing, not numbers, or contradict the flag.
        """
        if "RANK" in environ or "WORLD_SIZE" in environ:
            env = _torchrun(environ, local_rank)
        elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
            env = _slurm(environ)
        elif "OMPI_COMM_WORLD_RANK" in environ:
            env = _mpi(
                environ, "OMPI_COMM_WORLD_", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
            )
        elif "PMI_RANK" in environ:
            env = _mpi(environ, "PMI_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        else:
            env = cls()
        if local_rank is not None and local_rank != env.local_rank:
            raise RankEnvironmentError(
                f"--local_rank {local_rank} contradicts the environment, which says {env.local_rank}",
                hint="Start the ranks with torchrun, srun, mpirun or deepspeed, and leave --local_rank out.",
            )
        return env


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        what = f"is {text!r}, not a number" if text else "is not set"
        raise RankEnvironmentError(f"rank environment: {name} {what}") from None


def _torchrun(environ: Mapping[str, str], flag: int | None) -> RankEnv:
    world = _number(environ, "WORLD_SIZE")
    # deepspeed's launcher sets LOCAL_SIZE; old launchers pass the local rank only as a flag
    local_world = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", world))
    local_rank = _number(environ, "LOCAL_RANK", flag if flag is not None else _number(environ, "RANK"))
    return RankEnv(
        rank=_number(environ, "RANK"),
        local_rank=local_rank,
        world_size=world,
        local_world_size=local_world,
        node_rank=_number(environ, "GROUP_RANK", _number(environ, "CROSS_RANK", 0)),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT", DEFAULT_PORT),
        launcher="torchrun",
    )


def _slurm(environ: Mapping[str, str]) -> RankEnv:
    world = _number(environ, "SLURM_STEP_NUM_TASKS")
    node = _number(environ, "SLURM_NODEID", 0)
    tasks = expand_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    # one port per job, the same on all nodes, away from the ports that others like
    port = 15000 + _number(environ, "SLURM_JOB_ID", 0) % 20000
    return RankEnv(
        rank=_number(environ, "SLURM_PROCID"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        world_size=world,
        local_world_size=tasks[node] if node < len(tasks) else world,
        node_rank=node,
        master_addr=environ.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1",
        master_port=_number(environ, "MASTER_PORT", port),
        launcher="slurm",
    )


def _mpi(environ: Mapping[str, str], prefix: str, local_rank: str, local_size: str) -> RankEnv:
    world = _number(environ, prefix + "SIZE")
    local_world = _number(environ, local_size, world)
    if local_world != world and "MASTER_ADDR" not in environ:
        raise RankEnvironmentError(
            f"mpirun started {world} ranks on several nodes, but MASTER_ADDR is not set",
            hint="Export the address of rank 0's node: mpirun -x MASTER_ADDR=ADDRESS …",
        )
    return RankEnv(
        rank=_number(environ, prefix + "RANK"),
        local_rank=_number(environ, local_rank, _number(environ, prefix + "RANK")),
        world_size=world,
        local_world_size=local_world,
        node_rank=_number(environ, prefix + "NODE_RANK", 0),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT", DEFAULT_PORT),
        launcher="mpi",
    )


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],cpu1` → `gpu03`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,\[]*))?", nodelist)
    return "".join(part or "" for part in match.groups()) if match else ""


def expand_tasks(text: str) -> list[int]:
    """Slurm's short form of the tasks on each node: `2(x3),1` → [2, 2, 2, 1]."""
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(count)] * int(times or 1)
    return tasks
