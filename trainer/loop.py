"""The training loop: one `step` as docs/architecture.md tells it, and what comes after each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.checkpoints import Checkpointer, TrainingState
from trainer.config import Config
from trainer.data.packing import IGNORE
from trainer.distributed import gradients
from trainer.distributed.mesh import Mesh
from trainer.errors import NonFiniteError
from trainer.events import Events
from trainer.metrics import Reporter, StepMetrics, StepTimer
from trainer.models.sparse import SparseController, sparsity
from trainer.profiling import Profiler
from trainer.stop import StopRequest
from trainer.watchdog import Watchdog


@dataclass
class Loop:
    """Takes `state` from its step to `train.steps`."""

    config: Config
    state: TrainingState
    mesh: Mesh
    checkpointer: Checkpointer
    reporter: Reporter
    events: Events
    stop: StopRequest
    evaluate: Callable[[int], object]
    watchdog: Watchdog
    profiler: Profiler
    sparse: SparseController | None = None
    _bad_steps: int = field(default=0, init=False)

    def run(self) -> str:
        """`succeeded` after the last step, or `preempted` after the checkpoint that a stop asked for."""
        total, state = self.config.train.steps, self.state
        while state.step < total:
            self.profiler.before(state.step + 1)
            metrics = self.step()
            if metrics is None:
                self.reporter.say(f"stop requested ({self.stop.reason}): saving at step {state.step}")
                self._save_and_wait()
                return "preempted"
            self.profiler.after(state.step)
            self.watchdog.step(metrics.step_s)
            self.reporter.step(state.step, metrics)
            if state.step < total:
                self._between_steps()
        if self.config.checkpoint.at_end:
            self._save_and_wait()
        else:
            self.checkpointer.finish()
        return "succeeded"

    def _between_steps(self) -> None:
        step = self.state.step
        if _due(self.config.eval.every, step):
            with self.watchdog.pause():
                self.evaluate(step)
        if _due(self.config.checkpoint.every, step):
            with self.watchdog.pause():
                self.checkpointer.save(self.state)

    def _save_and_wait(self) -> None:
        with self.watchdog.pause():
            self.checkpointer.save(self.state)
            self.checkpointer.finish()

    def step(self) -> StepMetrics | None:
        """One optimizer step, or None if any rank was asked to stop (nothing has moved then).

        Raises NonFiniteError after `train.max_bad_steps` steps in a row with a non-finite gradient, or
        at the first with `train.non_finite: stop`.
        """
        state, comm, timer = self.state, self.mesh.comm, StepTimer()
        with timer.data():
            batches = state.stream.peek()
            valid = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
        with timer.wait():
            # one small all-reduce answers both: how many tokens has the global batch, and does anyone stop
            tokens, stops = comm.sum([valid if self.mesh.counts_rows else 0, float(self.stop.requested)])
        if stops:
            return None
        if self.sparse is not None:
            self.sparse.step(state.step)
        loss_sum = state.model.forward_backward(batches, state.scaler.scale / max(tokens, 1))
        self.checkpointer.poll()  # what is being saved must be copied before the optimizer changes it
        lr, decay, scale = state.schedule.lr, state.schedule.weight_decay, state.scaler.scale
        norm = self._update()
        loss_here = loss_sum.item()
        (loss_all,) = comm.sum([loss_here])
        state.schedule.step()
        state.step += 1
        self.events.step = state.step
        if not math.isfinite(norm):
            self._record_bad_step(norm, loss_here)
        state.stream.advance()
        self._check_finite(norm)
        return StepMetrics(
            loss=loss_all / max(tokens, 1),
            lr=lr,
            grad_norm=norm,
            tokens=int(tokens),
            step_s=timer.step_s,
            data_s=timer.data_s,
            wait_s=timer.wait_s,
            weight_decay=decay,
            loss_scale=scale if state.scaler.enabled else None,
            sparsity=sparsity(*state.model.parts) if self._tells_sparsity() else None,
        )

    def _tells_sparsity(self) -> bool:
        return self.sparse is not None and _due(self.config.log.every, self.state.step)

    def settle(self) -> None:
        """Before a resume: lets the layout reach the state that a model has which trained already."""
        batches = self.state.stream.peek()
        self.state.model.settle(lambda: self.state.model.forward_backward(batches, 1.0))

    def _update(self) -> float:
        """Clips and takes the optimizer step; → the gradient norm before clipping.

        The norm is the same on every rank of every layout, so all ranks skip a non-finite one together.
        """
        state, clip = self.state, self.config.optim.clip
        norm = gradients.global_norm(state.model) / state.scaler.scale
        finite = math.isfinite(norm)
        if finite:
            factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            if factor != 1.0 or state.scaler.scale != 1.0:
                gradients.multiply_(state.model, factor / state.scaler.scale)
            state.optimizer.step()
        state.model.zero_grad()
        state.scaler.update(finite)
        return norm

    def _record_bad_step(self, norm: float, loss_here: float) -> None:
        """Rank 0's event names the rows of the batch, and the data-parallel ranks whose own loss was not finite."""
        rows = self.state.stream.sources() if self.mesh.counts_rows else []
        everyone = self.mesh.comm.gather((self.mesh.data_rank, math.isfinite(loss_here), rows))
        guilty = {data_rank for data_rank, finite, _ in everyone if not finite}
        named = [row for data_rank, _, rows in everyone if data_rank in guilty or not guilty for row in rows]
        if self.mesh.comm.env.is_main:
            self.events.emit("bad_step", grad_norm=str(norm), rows=named, data_ranks=sorted(guilty))

    def _check_finite(self, norm: float) -> None:
        if math.isfinite(norm):
            self._bad_steps = 0
            return
        overflow = self.state.scaler.enabled  # fp16: an expected way of finding the loss scale
        self._bad_steps += 1
        self.reporter.say(f"warning: step {self.state.step} skipped, its gradient norm is {norm}")
        train = self.config.train
        allowed = train.max_bad_steps if train.non_finite == "skip" else 0
        if self._bad_steps > (max(allowed, 20) if overflow else allowed):
            raise NonFiniteError(
                f"the gradient was not finite in {self._bad_steps} steps in a row, up to step {self.state.step}",
                hint="Lower optim.lr, lengthen optim.warmup_steps, or look at the rows that the event bad_step names.",
            )


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0

