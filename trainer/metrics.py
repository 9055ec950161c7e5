"""What rank 0 reports of each step: event, TensorBoard, Weights & Biases, console line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.events import Events
from trainer.models.flops import peak_flops


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. `loss` is the mean over the valid tokens of the whole global batch."""

    loss: float
    lr: float
    grad_norm: float
    tokens: int
    """Valid target tokens of the step, over all ranks."""
    step_s: float
    data_s: float
    """Seconds spent on getting the batch, part of `step_s`."""
    wait_s: float = 0.0
    """Seconds in the step's first collective, part of `step_s`: waiting for the slowest rank."""
    weight_decay: float | None = None
    loss_scale: float | None = None
    """fp16 only."""
    sparsity: float | None = None
    """Measured share of zeros in sparse layers; None without them."""

    @property
    def compute_s(self) -> float:
        """What is left of `step_s`: forward, backward, reductions and the update."""
        return max(self.step_s - self.data_s - self.wait_s, 0.0)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s if self.step_s else 0.0


class StepTimer:
    """Splits a step's wall clock. On a GPU the work is asynchronous: the loop reads one number of each step back
    (the gradient norm), which waits for it, so whole steps are true without any further synchronisation."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.data_s = 0.0
        self.wait_s = 0.0

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - began

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.wait_s += time.perf_counter() - began

    @property
    def step_s(self) -> float:
        return time.perf_counter() - self._began


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident size on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Rank 0's voice. On other ranks every method does nothing."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        events: Events,
        device: torch.device,
        *,
        main: bool,
        world_size: int,
    ) -> None:
        """Raises ConfigError on every rank if `log.wandb` is set and the package is not there."""
        self._config = config
        self._events = events
        self._device = device
        self._main = main
        self._world_size = world_size
        self._flops_per_token: float | None = None
        self._peak = peak_flops(device)
        self._board = None
        self._wandb: Any = None
        if config.log.wandb and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"log.wandb={config.log.wandb}: the package wandb is not installed",
                hint="Add wandb to your requirements.txt (pip install wandb), or leave log.wandb unset.",
            )
        if main and config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 0.4 s that only rank 0 pays

            self._board = SummaryWriter(log_dir=str(run_dir / "tensorboard"))
        if main and config.log.wandb:
            self._wandb = _start_wandb(config, run_dir)

    def set_flops(self, flops: float | None) -> None:
        """FLOPs per token by the strict count (models/flops.py); None: unknown, and no MFU."""
        self._flops_per_token = flops

    def say(self, text: str) -> None:
        if self._main:
            print(text, flush=True)

    def step(self, step: int, metrics: StepMetrics) -> None:
        if not self._main:
            return
        mfu, memory = self.mfu(metrics.tokens_per_s), peak_memory(self._device)
        per_device = metrics.tokens_per_s / self._world_size
        optional = {
            "weight_decay": metrics.weight_decay,
            "loss_scale": metrics.loss_scale,
            "sparsity": metrics.sparsity,
        }
        optional = {name: value for name, value in optional.items() if value is not None}
        times = {name: getattr(metrics, name) for name in ("step_s", "data_s", "wait_s", "compute_s")}
        self._events.emit(
            "step",
            loss=metrics.loss,
            lr=metrics.lr,
            grad_norm=metrics.grad_norm,
            tokens=metrics.tokens,
            tokens_per_s=round(metrics.tokens_per_s, 1),
            tokens_per_s_device=round(per_device, 1),
            **{name: round(value, 6) for name, value in times.items()},
            mfu=mfu,
            memory=memory,
            **optional,
        )
        speed = {"tokens_per_s": metrics.tokens_per_s, "tokens_per_s_device": per_device, "mfu": mfu, **times}
        train = {"loss": metrics.loss, "lr": metrics.lr, "grad_norm": metrics.grad_norm, **optional}
        scalars: dict[str, float] = {f"train/{name}": value for name, value in train.items()}
        scalars |= {f"speed/{name}": value for name, value in speed.items() if value is not None}
        self._scalars(step, {**scalars, "memory/peak_gb": memory / 1e9})
        total = self._config.train.steps
        if step == 1 or step == total or step % self._config.log.every == 0:
            self.say(self._line(step, metrics, mfu, memory))

    def evaluation(self, step: int, loss: float, perplexity: float, tokens: int, seconds: float) -> None:
        if not self._main:
            return
        self._events.emit("eval", loss=loss, perplexity=perplexity, tokens=tokens, seconds=round(seconds, 6))
        self._scalars(step, {"eval/loss": loss, "eval/perplexity": perplexity})
        self.say(f"held-out loss {loss:.4f}, perplexity {perplexity:.2f} ({tokens:,} tokens) at step {step}")

    def checkpoint(self, path: Path, size: int, seconds: float, blocked: float) -> None:
        if not self._main:
            return
        self._events.emit(
            "checkpoint", path=str(path), bytes=size, seconds=round(seconds, 6), blocked_s=round(blocked, 6)
        )
        self.say(f"checkpoint {path} ({size / 1e6:.1f} MB in {seconds:.2f} s)")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilisation: tokens/s × strict FLOPs per token / (devices × dense bf16 peak of one).

        Chowdhery et al. 2022 (PaLM), appendix B. None where the peak or the model's count is not known.
        """
        if self._peak is None or self._flops_per_token is None:
            return None
        return round(tokens_per_s * self._flops_per_token / (self._peak * self._world_size), 4)

    def _line(self, step: int, metrics: StepMetrics, mfu: float | None, memory: int) -> str:
        total = self._config.train.steps
        parts = [
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {metrics.loss:.4f}",
            f"lr {metrics.lr:.2e}",
            f"grad norm {metrics.grad_norm:.3f}",
            f"{metrics.tokens_per_s:,.0f} tokens/s"
            + (f" ({metrics.tokens_per_s / self._world_size:,.0f} each)" if self._world_size > 1 else ""),
        ]
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        if metrics.sparsity is not None:
            parts.append(f"sparsity {metrics.sparsity:.1%}")
        lost = {"data": metrics.data_s, "waiting": metrics.wait_s}
        # what costs little is not worth a word
        parts += [f"{k} {v / metrics.step_s:.0%}" for k, v in lost.items() if v > 0.05 * metrics.step_s]
        return "  ".join([*parts, f"{memory / 1e9:.1f} GB"])

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def _start_wandb(config: Config, run_dir: Path) -> Any:
    """The W&B run. Its id is that of our run, so that a later attempt of the same run continues it."""
    wandb = importlib.import_module("wandb")
    return wandb.init(
        project=config.log.wandb,
        id=os.environ.get("ORCH_RUN_ID"),
        name=os.environ.get("ORCH_RUN_ID") or config.name,
        resume="allow",
        dir=str(run_dir),
        config=config.model_dump(mode="json"),
    )
