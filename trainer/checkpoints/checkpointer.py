"""Saving and resuming, agreed by all ranks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from trainer.checkpoints import manifest
from trainer.checkpoints.choose import Chosen, choose
from trainer.checkpoints.formats import full, local, shard
from trainer.checkpoints.group import Group
from trainer.checkpoints.state import (
    TrainingState,
    allocate_moments,
    forget_moments,
    set_rng_state,
    tensors,
)
from trainer.checkpoints.storage import Storage, probe
from trainer.checkpoints.upload import Uploader, open_remote
from trainer.checkpoints.writer import RNG, STATE, Job, Writer
from trainer.config import CheckpointConfig
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError, ConfigError, DeadlineError

Source = full.Source | shard.Source | local.Source


class Reporter(Protocol):
    def say(self, text: str) -> None: ...

    def checkpoint(self, path: Path, size: int, seconds: float, blocked: float) -> None: ...


class Checkpointer:
    """All methods are collective: every rank calls them, in the same order, on its main thread."""

    def __init__(
        self, config: CheckpointConfig, root: Path, mesh: Mesh, reporter: Reporter, *, run: str, timeout: float = 3600
    ) -> None:
        """`root` is this node's folder of checkpoints, `run` the name of the run in `checkpoint.remote`. `timeout`:
        seconds in which a checkpoint must be written, or uploaded.

        Raises CheckpointError if a node cannot write to `root`, ConfigError if `checkpoint.type` cannot work there.
        """
        self._config, self._mesh, self._comm, self._reporter = config, mesh, mesh.comm, reporter
        self._timeout = timeout
        self._storage = probe(root, mesh.comm)
        self._remote = open_remote(config.remote, run) if config.remote else None
        layout = resolve_type(config, mesh, self._storage)
        self._uploader = (
            Uploader(self._remote) if self._remote and self._storage.rank in self._storage.sealers else None
        )
        self._group = Group(mesh.comm, timeout)  # patient: uploads and downloads take longer than a training step
        self._writer = Writer(config, layout, self._storage, mesh, self._group, self._uploader)
        self._timeline = 0
        self._saved: int | None = None
        self._job: Job | None = None

    def resume(self, state: TrainingState, before_load: Callable[[], object]) -> bool:
        """Loads the checkpoint that `checkpoint.resume` names into `state`; whether there was one.

        `before_load` is called on all ranks just before, if there is something to load. A rank beyond the
        checkpoint's world keeps its own random state. Raises CheckpointError as `choose.choose` does, or if the
        checkpoint is of another model or, of type `local`, of another layout; DataError if the data is not the same.
        """
        choice = choose(self._config.resume, self._storage, self._group, self._remote)
        self._timeline = choice.timeline
        for reason in choice.passed_over:
            self._reporter.say(f"passed over: {reason}")
        chosen = choice.chosen
        if chosen is None:
            return False
        before_load()
        self._load(state, chosen)
        same = self._timeline == chosen.found.timeline
        self._saved = state.step if same else None
        where = f" on {chosen.host}" if self._comm.active else ""
        self._reporter.say(f"resuming from step {state.step} ({chosen.found.path}{where})")
        if self._uploader and same and not chosen.uploaded and Path(chosen.found.path).parent == self._storage.root:
            self._uploader.submit(Path(chosen.found.path))  # killed before its upload was complete
        return True

    def save(self, state: TrainingState) -> None:
        """Begins to write a checkpoint of this step, unless it was the last one; waits for the one before.

        Nothing but buffers of the model may change before the next `poll` (or `finish`) returns. A failure leaves the
        older checkpoints; it is a warning, or with `on_failure: stop` a CheckpointError on every rank, from the
        first of `poll`, `save` and `finish` after it.
        """
        began = time.perf_counter()
        self._conclude(wait=True)
        if self._saved == state.step:
            return
        self._job = self._writer.start(state, self._timeline)
        self._job.blocked += time.perf_counter() - began
        if not self._config.asynchronous:
            self._conclude(wait=True)

    def poll(self) -> None:
        """Before each optimizer step: waits until its tensors are copied, and tells of a save that has ended."""
        self._conclude(wait=False)

    def finish(self) -> None:
        """Waits until all is written and uploaded."""
        self._conclude(wait=True)
        failure = None
        if self._uploader is not None:
            try:
                self._uploader.finish(self._timeout)
            except DeadlineError as error:
                failure = error.message
        notes = self._uploader.notes() if self._uploader else []
        for note in [one for some in self._group.gather([*notes, *([failure] if failure else [])]) for one in some]:
            self._reporter.say(f"warning: {note}")

    def export(self, state: TrainingState, name: str, form: full.Form) -> Path:
        """The model alone, as `form` says, in the folder `name` beside the checkpoints; → its path on rank 0.

        It is there as a whole or not at all, and replaces an older one. Waits for all that is being written or
        uploaded. Raises CheckpointError on every rank.
        """
        self.finish()
        folder = self._writer.export(state, name, form, self._timeline, self._saved == state.step)
        self.finish()
        return folder

    def _conclude(self, *, wait: bool) -> None:
        job = self._job
        if job is None:
            return
        began = time.perf_counter()
        event, what = (job.done, "written") if wait else (job.copied, "copied")
        if not event.wait(self._timeout):
            raise DeadlineError(
                f"checkpoint of step {job.step} is not {what} after {self._timeout:.0f} s in {self._storage.root}",
                hint="Look at the storage, or set checkpoint.type=shard to write from all ranks.",
            )
        # a rank's thread may end a step later than another's: all tell of it in the same step
        pending = 0.0 if wait else self._comm.sum([0.0 if job.done.is_set() else 1.0])[0]
        job.blocked += time.perf_counter() - began
        if not pending:
            self._job = None
            self._tell(job)

    def _tell(self, job: Job) -> None:
        root = self._storage.root
        for note in job.notes:
            self._reporter.say(f"warning: {note}")
        if job.failure is None:
            self._saved = job.step
            self._reporter.checkpoint(root / manifest.folder_name(job.step), job.size, job.seconds, job.blocked)
            return
        failure = f"checkpoint at step {job.step} could not be written to {root}: {job.failure} ({_free(root)})"
        if self._config.on_failure == "stop":
            raise CheckpointError(failure, hint="Free space, or set checkpoint.on_failure=warn to train on.")
        self._reporter.say(f"warning: {failure}; older checkpoints are kept, training goes on")

    def _load(self, state: TrainingState, chosen: Chosen) -> None:
        comm, folder, holder = self._comm, self._folder(chosen), chosen.holder
        mine = comm.env.rank == holder
        head = comm.broadcast(manifest.read(folder) if mine else None, holder)
        about = comm.broadcast(json.loads((folder / STATE).read_text()) if mine else None, holder)
        if head["layout"] == "local":
            self._check_layout(head, folder)
        self._check_base(head, folder, state)
        state.stream.load_state_dict(about["data"])
        source = self._open(head["layout"], folder, holder, state)
        moments = not self._config.skip_optimizer and any(name.startswith("optimizer.") for name in source.shapes)
        if moments:
            allocate_moments(state.optimizer)
            forget_moments(state, set(source.shapes))
        targets = tensors(state, optimizer=moments)
        self._check_model(source, targets)
        with torch.no_grad():
            source.load(targets)
        state.schedule.load_state_dict(about["schedule"])
        if state.scaler is not None and about["scaler"] is not None and not self._config.skip_optimizer:
            state.scaler.load_state_dict(about["scaler"])
        rngs = comm.broadcast(torch.load(folder / RNG, weights_only=True) if mine else None, holder)
        if comm.env.rank < len(rngs):
            set_rng_state(rngs[comm.env.rank], comm.device)
        state.step = int(about["step"])

    def _folder(self, chosen: Chosen) -> Path:
        """Each node's own path may differ from the holder's; one that was named by its path is the same on all."""
        path = Path(chosen.found.path)
        if self._storage.shared or chosen.found.layout == "full" or "/" in self._config.resume:
            return path
        return self._storage.root / path.name

    def _open(self, layout: str, folder: Path, holder: int, state: TrainingState) -> Source:
        if layout == "full":
            return full.Source(folder, self._comm, holder)
        if layout == "shard":
            return shard.Source(folder)
        return local.Source(folder, self._comm.env.rank, tensors(state, optimizer=False))

    def _check_layout(self, head: manifest.Manifest, folder: Path) -> None:
        here = (self._comm.world_size, self._mesh.layout.describe())
        there = (int(head["world"]), str(head["parallel"]))
        if here != there:
            raise CheckpointError(
                f"{folder} is of type local, written by {there[0]} ranks as {there[1]}:"
                f" it loads only there, not on {here[0]} ranks as {here[1]}",
                hint="Resume with the layout it was written in, once with checkpoint.type=shard or full to save it for"
                " any other; or name another checkpoint in checkpoint.resume.",
            )

    def _check_base(self, head: manifest.Manifest, folder: Path, state: TrainingState) -> None:
        """Adapters fit one base: the weights that are not in the checkpoint must be those it was trained on."""
        there = head.get("base")
        if state.adapter is not None and there not in (None, state.adapter.fingerprint):
            raise CheckpointError(
                f"the adapters in {folder} were trained on other base weights ({there}) than those of"
                f" {state.adapter.base or 'this recipe'} ({state.adapter.fingerprint})",
                hint="Set model.pretrained (and model.revision) to the base of that run, or checkpoint.resume=none.",
            )

    def _check_model(self, source: Source, targets: dict[str, torch.Tensor]) -> None:
        """Raises CheckpointError on all ranks if the checkpoint has other parameters than the model."""
        there = {name: shape for name, (shape, _) in source.shapes.items() if name.startswith("model.")}
        here = {name: tuple(tensor.shape) for name, tensor in targets.items() if name.startswith("model.")}
        wrong = {name: (there.get(name, "missing"), shape) for name, shape in here.items() if there.get(name) != shape}
        # the same for data and tensor peers: one of each pipeline rank tells which parameters it has
        tells = self._mesh.tensor_rank == 0 and self._mesh.data_rank == 0
        everyone = self._comm.gather((wrong, sorted(here) if tells else []))
        known = {name for _, names in everyone for name in names}
        for one, _ in everyone:
            wrong.update(one)
        wrong.update({name: (shape, "missing") for name, shape in there.items() if name not in known})
        if wrong:
            name, (old, new) = min(wrong.items())
            raise CheckpointError(
                f"the checkpoint is of another model: {name.removeprefix('model.')} is {old} there, {new} here",
                hint="Use the recipe's original model, or checkpoint.resume=none.",
            )


def resolve_type(config: CheckpointConfig, mesh: Mesh, storage: Storage) -> str:
    """`full`, `shard` or `local`; raises ConfigError for `shard` on several disks without a remote."""
    layout = mesh.layout
    sharded = layout.shard * layout.tensor * layout.pipeline > 1
    if config.type == "auto":
        return "shard" if sharded and storage.shared else "full"
    if config.type == "shard" and not storage.shared and not config.remote:
        raise ConfigError(
            f"checkpoint.type=shard needs storage that all nodes share; {storage.root} is on"
            f" {len(storage.sealers)} disks",
            hint="Set checkpoint.type=full, or checkpoint.remote to an s3://… or a path that is mounted on all nodes.",
        )
    return config.type


def _free(root: Path) -> str:
    try:
        return f"{shutil.disk_usage(root).free / 1e6:,.1f} MB free"
    except OSError:
        return "free space unknown"
