"""This rank's place in the layout, and the DeviceMesh that torch's parallelisms work on."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.distributed.layout import Layout
from trainer.distributed.process_group import Communicator


class Mesh:
    """Dimensions, outermost first: `pp`, `replicate`, `shard`, `tp`; all are there, also those of size 1."""

    def __init__(self, layout: Layout, comm: Communicator) -> None:
        rank = comm.env.rank
        self.layout = layout
        self.comm = comm
        self.data_rank = layout.data_rank(rank)
        self.tensor_rank = layout.tensor_rank(rank)
        self.pipeline_rank = layout.pipeline_rank(rank)
        self.device_mesh: DeviceMesh | None = None
        """None for one process: nothing is distributed then."""
        if comm.active:
            self.device_mesh = init_device_mesh(
                comm.device.type,
                (layout.pipeline, layout.replicate, layout.shard, layout.tensor),
                mesh_dim_names=("pp", "replicate", "shard", "tp"),
            )

    def __getitem__(self, names: str | tuple[str, ...]) -> DeviceMesh:
        """The sub-mesh of these dimensions that this rank is in."""
        assert self.device_mesh is not None, "one process has no mesh"
        return self.device_mesh[names]

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts for its data-parallel share, so that each row counts once in a world-wide sum."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0
