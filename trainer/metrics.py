"""What rank 0 reports of each step: event, TensorBoard, console line."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config
from trainer.events import Events

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 peaks from the vendors' data sheets; MFU is given against these only."""


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

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s if self.step_s else 0.0


def flops_per_token(model_config: Any, parameters: int, seq_len: int) -> float:
    """Training FLOPs per token, strict count: no input embedding, causal attention (half the square).

    6 per parameter that multiplies (Kaplan et al., 2020, appendix B) plus 12·layers·hidden·seq_len/2.
    """
    embedding = model_config.vocab_size * model_config.hidden_size
    multiplying = parameters if model_config.tie_word_embeddings else parameters - embedding
    attention = 6 * model_config.num_hidden_layers * model_config.hidden_size * seq_len
    return 6.0 * multiplying + attention


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
        self._config = config
        self._events = events
        self._device = device
        self._main = main
        self._world_size = world_size
        self._flops_per_token = 0.0
        self._board = None
        if main and config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 0.4 s that only rank 0 pays

            self._board = SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def set_flops(self, flops: float) -> None:
        self._flops_per_token = flops

    def say(self, text: str) -> None:
        if self._main:
            print(text, flush=True)

    def step(self, step: int, metrics: StepMetrics) -> None:
        if not self._main:
            return
        self._events.emit(
            "step",
            loss=metrics.loss,
            lr=metrics.lr,
            grad_norm=metrics.grad_norm,
            tokens=metrics.tokens,
            tokens_per_s=round(metrics.tokens_per_s, 1),
            step_s=round(metrics.step_s, 6),
            data_s=round(metrics.data_s, 6),
            mfu=self._mfu(metrics),
            memory=peak_memory(self._device),
        )
        self._scalars(
            step,
            {
                "train/loss": metrics.loss,
                "train/lr": metrics.lr,
                "train/grad_norm": metrics.grad_norm,
                "speed/tokens_per_s": metrics.tokens_per_s,
                "speed/step_s": metrics.step_s,
            },
        )
        total = self._config.train.steps
        if step == 1 or step == total or step % self._config.log.every == 0:
            self.say(
                f"step {step:>{len(str(total))}}/{total}  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}"
                f"  grad norm {metrics.grad_norm:.3f}  {metrics.tokens_per_s:,.0f} tokens/s"
            )

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

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _mfu(self, metrics: StepMetrics) -> float | None:
        """Model FLOPs utilisation against the bf16 peak; None where no peak is known (any CPU)."""
        if self._device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self._device)
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        if peak is None:
            return None
        return round(metrics.tokens_per_s * self._flops_per_token / (peak * self._world_size), 4)
