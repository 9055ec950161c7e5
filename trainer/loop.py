"""The training loop: one `step` as docs/architecture.md tells it, and what comes after each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from trainer.checkpoint import Checkpointer
from trainer.config import Config
from trainer.data.loader import Batch
from trainer.data.packing import IGNORE
from trainer.distributed.data_parallel import DataParallel
from trainer.distributed.process_group import Communicator
from trainer.errors import NonFiniteError
from trainer.evaluate import summed_loss
from trainer.events import Events
from trainer.metrics import Reporter, StepMetrics
from trainer.stop import StopRequest
from trainer.training_state import TrainingState


class Loop:
    """Takes `state` from its step to `train.steps`."""

    def __init__(
        self,
        config: Config,
        state: TrainingState,
        model: DataParallel,
        comm: Communicator,
        *,
        checkpointer: Checkpointer,
        reporter: Reporter,
        events: Events,
        stop: StopRequest,
        evaluate: Callable[[int], None],
    ) -> None:
        self._config = config
        self._state = state
        self._model = model
        self._comm = comm
        self._checkpointer = checkpointer
        self._reporter = reporter
        self._events = events
        self._stop = stop
        self._evaluate = evaluate
        self._bad_steps = 0

    def run(self) -> str:
        """`succeeded` after the last step, or `preempted` after the checkpoint that a stop asked for."""
        total, state = self._config.train.steps, self._state
        while state.step < total:
            metrics = self.step()
            if metrics is None:
                self._reporter.say(f"stop requested ({self._stop.reason}): saving at step {state.step}")
                self._checkpointer.save(state)
                return "preempted"
            self._reporter.step(state.step, metrics)
            if state.step < total:
                if _due(self._config.eval.every, state.step):
                    self._evaluate(state.step)
                if _due(self._config.checkpoint.every, state.step):
                    self._checkpointer.save(state)
        self._checkpointer.save(state)
        return "succeeded"

    def step(self) -> StepMetrics | None:
        """One optimizer step, or None if any rank was asked to stop (nothing has moved then).

        Raises NonFiniteError after `train.max_bad_steps` steps in a row with a non-finite gradient.
        """
        state, device = self._state, self._comm.device
        began = time.perf_counter()
        batches = state.stream.peek()
        valid = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
        data_s = time.perf_counter() - began
        # one small all-reduce answers both: how many tokens has the global batch, and does anyone stop
        tokens, stops = self._comm.sum([valid, float(self._stop.requested)])
        if stops:
            return None
        loss_sum = self._backward(batches, tokens)
        grad_norm = self._update()
        (loss_sum_all,) = self._comm.sum([loss_sum.item()])
        lr = state.schedule.get_last_lr()[0]
        state.schedule.step()
        state.stream.advance()
        state.step += 1
        self._events.step = state.step
        self._check_finite(grad_norm)
        step_s = time.perf_counter() - began
        loss = loss_sum_all / max(tokens, 1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return StepMetrics(loss, lr, grad_norm, int(tokens), step_s, data_s)

    def settle(self) -> None:
        """Before a resume: lets DDP arrange its buckets as the uninterrupted run has them."""
        batches = self._state.stream.peek()[:1]
        self._model.settle(lambda: self._backward(batches, 1.0))

    def _backward(self, batches: list[Batch], tokens: float) -> torch.Tensor:
        """Accumulates the gradient of (summed loss of all ranks / `tokens`); → this rank's summed loss."""
        device = self._comm.device
        scale = self._model.gradient_scale / max(tokens, 1)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for index, batch in enumerate(batches):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with self._model.accumulate(last=index == len(batches) - 1):
                with self._autocast():
                    loss = summed_loss(self._model.wrapped, batch)
                (loss * scale).backward()
            loss_sum += loss.detach().double()
        return loss_sum

    def _update(self) -> float:
        """Clips and takes the optimizer step; → the gradient norm before clipping.

        After DDP's all-reduce the gradients, so also their norm, are the same on every rank: all ranks
        skip a non-finite one together.
        """
        clip = self._config.optim.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._model.module.parameters(), clip).item()
        if math.isfinite(norm):
            self._state.optimizer.step()
        self._state.optimizer.zero_grad(set_to_none=True)
        return norm

    def _check_finite(self, norm: float) -> None:
        if math.isfinite(norm):
            self._bad_steps = 0
            return
        self._bad_steps += 1
        self._reporter.say(f"warning: step {self._state.step} skipped, its gradient norm is {norm}")
        if self._bad_steps > self._config.train.max_bad_steps:
            raise NonFiniteError(
                f"the gradient was not finite in {self._bad_steps} steps in a row,"
                f" up to step {self._state.step}",
                hint="Lower optim.lr, lengthen optim.warmup_steps, or look at the data of these steps.",
            )

    def _autocast(self) -> AbstractContextManager[object]:
        if self._config.train.precision == "bf16":
            return torch.autocast(self._comm.device.type, dtype=torch.bfloat16)
        return nullcontext()


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
