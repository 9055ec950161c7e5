"""AdamW with decay on matrices only; on shards of any layout; optionally with moments in bf16."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from trainer.config import OptimConfig
from trainer.distributed.parallel_model import ParallelModel
from trainer.errors import ConfigError

NO_DECAY = ("*mask_logits",)
"""Never decayed, besides vectors: the logits of learned masks are no weights."""

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
BUCKET = 1 << 25
"""Elements that AdamWBf16 updates together: bounds its fp32 copies to some 0.5 GB, or to the largest parameter's."""

_Item = tuple[int, torch.nn.Parameter, dict[str, Any]]
"""(index among all parameters, parameter, its group)."""


def build_optimizer(model: ParallelModel, config: OptimConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over the trainable parameters of this rank.

    Two groups, matrices with `weight_decay` and the rest without (vectors of the whole model, however a rank's
    shard looks, and `no_decay` patterns, matched with the parameter's full name); an empty one is left out. The
    order within a group is that of `named_parameters`, the same on all ranks that hold the same part of the model.

    Raises ConfigError if nothing is trainable, or `optim.fused=true` cannot be had.
    """
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    patterns = [*config.no_decay, *NO_DECAY]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim < 2 or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            (plain if vector else decay).append(parameter)
    devices = {parameter.device.type for parameter in (*decay, *plain)}
    if not devices:
        raise ConfigError("no parameter of the model is trainable", hint="Look at model.lora.targets.")
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = _fused(config, devices)
    kind = AdamWBf16 if config.state_dtype == "bf16" else AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _fused(config: OptimConfig, devices: set[str]) -> bool:
    exists = devices <= set(FUSED_DEVICES) and config.state_dtype == "fp32"
    if config.fused and not exists:
        why = "optim.state_dtype=bf16" if config.state_dtype == "bf16" else f"device {', '.join(sorted(devices))}"
        raise ConfigError(f"optim.fused=true: there is no fused AdamW for {why}", hint="Leave optim.fused unset.")
    return exists if config.fused is None else config.fused


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which computes on each rank's local tensors.

    The update is elementwise, so shards need nothing of each other. torch's kernels refuse a list with plain
    tensors and DTensors, or DTensors of two meshes, as FSDP with tensor parallelism gives; and they dispatch each
    DTensor one by one. The states stay DTensors where parameters are, so that DCP shards them.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> bool:
        is_complex = super()._init_group(group, *lists)
        parameters, gradients, *_ = lists
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if isinstance(parameter, DTensor):
                assert isinstance(gradient, DTensor) and gradient.placements == parameter.placements, (
                    f"a gradient lies as {getattr(gradient, 'placements', 'a plain tensor')},"
                    f" its parameter as {parameter.placements}"
                )
                for tensors in lists:
                    if tensors and isinstance(tensors[index], DTensor):
                        tensors[index] = cast(DTensor, tensors[index]).to_local()
        return bool(is_complex)


class AdamWBf16(AdamW):
    """AdamW whose two moments are kept in bf16: 4 bytes per parameter instead of 8. It computes in fp32.

    bf16 has 8 bits: to nearest, a change below 1/512 of the value is lost. The first moment moves by
    1 − β₁ = 10 % of the difference and stands that. The second moves by 5 % (0.1 % with β₂ = 0.999) of it: near its
    mean, or while gradients shrink, every change would be lost and it would stick. So it is rounded stochastically,
    up or down with the probability that makes the mean exact.

    The noise is drawn from (step, index of the parameter) alone: replicas of a parameter stay bit-identical, a
    resumed run repeats it, and no other generator moves.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{**options, "fused": False})
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        parameters = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        runs: dict[tuple[int, int], list[_Item]] = {}  # of one group and age: an expert may miss a step
        for index, (group, parameter) in enumerate(parameters):
            if parameter.grad is not None:
                state = self._state(parameter)
                state["step"] += 1
                runs.setdefault((id(group), int(state["step"])), []).append((index, parameter, group))
        for (_, step), items in runs.items():
            for bucket in _buckets(items):
                self._update(step, bucket)

    def _update(self, step: int, bucket: Sequence[_Item]) -> None:
        group = bucket[0][2]
        parameters = [_local(p) for _, p, _ in bucket]
        gradients = [_local(cast(torch.Tensor, p.grad)).float() for _, p, _ in bucket]
        states = [self.state[p] for _, p, _ in bucket]
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        means = [_local(state["exp_avg"]).float() for state in states]
        squares = [_local(state["exp_avg_sq"]).float() for state in states]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        del gradients
        for (index, _, _), state, mean, square in zip(bucket, states, means, squares, strict=True):
            _local(state["exp_avg"]).copy_(mean)
            _local(state["exp_avg_sq"]).copy_(self._round(square, step, index))
        torch._foreach_div_(squares, 1 - beta2**step)
        torch._foreach_sqrt_(squares)
        torch._foreach_add_(squares, eps)
        torch._foreach_div_(means, squares)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, means, alpha=-lr / (1 - beta1**step))

    def _state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state

    def _round(self, square: torch.Tensor, step: int, index: int) -> torch.Tensor:
        """fp32 ≥ 0 → bf16: adds noise of 16 bits to the 16 that are cut off."""
        device = square.device
        generator = self._generators.setdefault(device, torch.Generator(device=device))
        generator.manual_seed(step * 1_000_003 + index)
        noise = torch.randint(0, 1 << 16, square.shape, generator=generator, device=device, dtype=torch.int32)
        return noise.add_(square.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # makes the moments what the parameters are, fp32; bf16 → fp32 is exact
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """Consecutive parameters with at most BUCKET local elements together, but at least one."""
    bucket: list[_Item] = []
    size = 0
    for item in items:
        count = _local(item[1]).numel()
        if bucket and size + count > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += count
    if bucket:
        yield bucket
