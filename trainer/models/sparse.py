"""Sparse linear transform: linear layers with masked or ternary weights, trained through straight-through estimators.

`apply_sparse` replaces nn.Linear modules by subclasses with the same parameter names, so sharding plans and
checkpoints find what they expect. Everything but the parameters is a function of the step (`SparseController`) or
of the weights, so there are no buffers to initialise, shard or save. FSDP2 shows a layer its whole weight, so
thresholds are global over the layer in any layout.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from trainer.config import Config, SparseConfig
from trainer.errors import ConfigError, nearest


class MaskedLinear(nn.Linear):
    """Keeps the `density` share of the weights whose magnitudes are largest; the others count as zero.

    All weights get the gradient of the masked one (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432),
    so what is masked can come back. At density 1 it is nn.Linear, bit for bit. The masked weight is one more tensor
    of the weight's size that autograd keeps until backward, unless the layer is recomputed.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.density = 1.0
        self.temperature = 1.0
        self._threshold: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None  # weights that are not zero, once a forward pass has counted them

    def set(self, density: float, temperature: float) -> None:
        """For the forward passes to come; the threshold is found anew in the next one."""
        self.density, self.temperature = density, temperature
        self._threshold = self._kept = None

    def train(self, mode: bool = True) -> MaskedLinear:
        self._threshold = None  # the weights may have changed since the last step began
        super().train(mode)
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.effective_weight(), self.bias)

    def effective_weight(self) -> torch.Tensor:
        """The weight that multiplies; needs the whole weight. Passes gradients."""
        if self.density >= 1:
            return self.weight
        return _Masked.apply(self.weight, self._mask())

    def plain_weight(self, weight: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """`weight` (and a learned mask's `logits`), both whole, as a plain linear layer is to have it."""
        if self.density >= 1:
            return weight
        scores = self._scores(weight, logits)
        return weight * (scores >= _kth_largest(scores, self._keep(weight)))

    def _scores(self, weight: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        return weight.detach().abs()

    @staticmethod
    def _logits() -> torch.Tensor | None:
        return None

    def _keep(self, weight: torch.Tensor) -> int:
        return round(self.density * weight.numel())

    @torch.no_grad()
    def _mask(self) -> torch.Tensor:
        """Which weights count. The threshold holds for all micro-batches of a step, and for recomputation."""
        scores = self._scores(self.weight, self._logits())
        if self._threshold is None:
            self._threshold = _kth_largest(scores, self._keep(self.weight))
            self._kept = (scores >= self._threshold).sum()
        return scores >= self._threshold


class LearnedMaskLinear(MaskedLinear):
    """Keeps the weights whose `mask_logits`, trained with them, are largest.

    Forward the mask is hard: the threshold on sigmoid(logit / temperature) that meets the density. Backward the
    logits get the gradient as if the mask were that sigmoid, the weights get it as if there were none. All logits
    start equal: then, as wherever two are, the larger weight wins.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, init_logit: float = 3.0, **factory: Any
    ) -> None:
        self.init_logit = init_logit
        super().__init__(in_features, out_features, bias, **factory)
        self.mask_logits = nn.Parameter(torch.full_like(self.weight, init_logit))

    def effective_weight(self) -> torch.Tensor:
        # also where nothing is masked: the logits learn from the first step, and get a gradient in each
        mask = torch.ones_like(self.weight, dtype=torch.bool) if self.density >= 1 else self._mask()
        return _LearnedMasked.apply(self.weight, self.mask_logits, mask, self.temperature)

    def _logits(self) -> torch.Tensor | None:
        return self.mask_logits

    def _scores(self, weight: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        assert logits is not None
        return logits.detach().double() + weight.detach().abs().double() * 1e-9  # fp64 holds both


class BitLinear(MaskedLinear):
    """Ternary weights and 8-bit activations: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764).

    Weights are γ·{−1, 0, 1}, γ the mean magnitude of the layer's; activations are rounded to int8 by each token's
    largest magnitude; both pass gradients straight through. The paper's norm inside the layer is left to the model:
    Llama's blocks have one before q, k, v, gate and up, and one more before o and down would be parameters that no
    plain checkpoint has. The same decision as transformers' AutoBitLinear. Density 1 means: not yet quantised.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.density >= 1:
            return F.linear(input, self.weight, self.bias)
        return F.linear(_Rounded.apply(input, _int8), self.effective_weight(), self.bias)

    def effective_weight(self) -> torch.Tensor:
        if self.density >= 1:
            return self.weight
        weight: torch.Tensor = _Rounded.apply(self.weight, _ternary)
        if self._kept is None:
            self._kept = weight.detach().count_nonzero()
        return weight

    def plain_weight(self, weight: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        return weight if self.density >= 1 else _ternary(weight)


class SparseController:
    """Tells every sparse layer its density and temperature, by the step alone.

    It knows the modules it was made with: where these are copied (pipeline stages), make another of the copies.
    """

    def __init__(self, models: nn.Module | Sequence[nn.Module], config: SparseConfig) -> None:
        self._config = resolve(config)
        parts = [models] if isinstance(models, nn.Module) else models
        self.layers = [module for part in parts for module in part.modules() if isinstance(module, MaskedLinear)]
        self.step(0)

    def step(self, step: int) -> None:
        """Before the forward passes of optimizer step `step`, counted from 0; after a resume, of the next one.

        Density (Zhu & Gupta 2017, arXiv:1710.01878): 1 − (1 − final)·(1 − (1 − t)³) with t from 0 at start_step to
        1 at end_step; the temperature falls geometrically. Ternary layers are quantised from start_step on.
        """
        config = self._config
        passed, span = step - config.start_step, config.end_step - config.start_step
        t = 1.0 if passed >= span else max(passed / max(span, 1), 0.0)
        density = 1 - (1 - config.final_density) * (1 - (1 - t) ** 3)
        if config.mask == "bitnet":
            density = 0.0 if step >= config.start_step else 1.0
        temperature = config.temperature * (config.final_temperature / config.temperature) ** t
        for layer in self.layers:
            layer.set(density, temperature)


def resolve(config: SparseConfig) -> SparseConfig:
    """The configuration in `config.file` if it names one; raises ConfigError that names the file and the key."""
    if config.file is None:
        return config
    where = f"model.sparse.file={config.file}"
    try:
        values = yaml.safe_load(Path(config.file).read_text(encoding="utf-8"))  # JSON is YAML too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    valid = [name for name in SparseConfig.model_fields if name != "file"]
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: not a mapping of keys", hint=f"Valid keys: {', '.join(valid)}.")
    for key in values:
        if key not in valid:
            near = nearest(str(key), valid)
            raise ConfigError(
                f"{where}: unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""),
                hint=f"Valid keys: {', '.join(valid)}.",
            )
    try:
        return SparseConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def check(config: Config) -> None:
    """Raises ConfigError if the recipe's masks cannot work in its layout or with its other choices."""
    sparse = resolve(config.model.sparse)
    if sparse.mask == "none":
        return
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"model.sparse.mask={sparse.mask} needs whole weights, parallel.tensor={config.parallel.tensor} cuts them",
            hint="Set parallel.tensor=1 (parallel.strategy=full_shard saves memory), or model.sparse.mask=none.",
        )
    if config.model.lora.rank:
        raise ConfigError(
            f"model.sparse.mask={sparse.mask} cannot be combined with model.lora.rank={config.model.lora.rank}",
            hint="Set model.lora.rank=0, or model.sparse.mask=none.",
        )
    if sparse.mask != "bitnet" and sparse.end_step < sparse.start_step:
        raise ConfigError(
            f"model.sparse.end_step={sparse.end_step} is before model.sparse.start_step={sparse.start_step}",
            hint=f"Set model.sparse.end_step to at least {sparse.start_step}.",
        )


def apply_sparse(model: nn.Module, config: SparseConfig) -> SparseController:
    """Replaces the matching nn.Linear modules of `model` (it may be on the meta device), in place.

    Call it before sharding and wrapping. On the meta device, `initialize_masks` is due after to_empty.
    Raises ConfigError if no layer matches.
    """
    config = resolve(config)
    if config.mask != "none":
        names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        chosen = [name for name in names if _matches(name, config.include) and not _matches(name, config.exclude)]
        if not chosen:
            raise ConfigError(
                f"model.sparse.include={config.include} matches none of the model's {len(names)} linear layers",
                hint=f"They are named like {', '.join(names[:3])}."
                if names
                else "The model has no nn.Linear (GPT-2 has Conv1D instead).",
            )
        for name in chosen:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _converted(model.get_submodule(name), config))
    return SparseController(model, config)


def initialize_masks(model: nn.Module) -> None:
    """Gives learned masks their first logits, also on shards; after to_empty, before a checkpoint is loaded."""
    for module in model.modules():
        if isinstance(module, LearnedMaskLinear):
            with torch.no_grad():
                module.mask_logits.fill_(module.init_logit)


def sparsity(*models: nn.Module) -> float | None:
    """Measured share of zeros in the sparse layers' weights at their last forward pass; None if there are none.

    Waits for the device: call it where a step is logged.
    """
    layers = [module for model in models for module in model.modules() if isinstance(module, MaskedLinear)]
    if not layers:
        return None
    counted = [layer for layer in layers if layer._kept is not None]
    kept = int(torch.stack([layer._kept for layer in counted]).sum()) if counted else 0
    return (sum(layer.weight.numel() for layer in counted) - kept) / sum(layer.weight.numel() for layer in layers)


@torch.no_grad()
def bake_state(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state`, the whole unsharded weights of `model` by name, as plain linear layers have them.

    Masked weights are zeros, ternary ones three values; logits of masks are left out. `model` itself, which may
    be sharded, only tells which layers are sparse, and their density.
    """
    baked = {name: tensor for name, tensor in state.items() if not name.endswith("mask_logits")}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear) and f"{name}.weight" in state:
            weight, logits = state[f"{name}.weight"], state.get(f"{name}.mask_logits")
            baked[f"{name}.weight"] = module.plain_weight(weight, logits)
    return baked


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Turns the sparse layers of an unsharded `model` into nn.Linear with their masked weights, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MaskedLinear):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            weight = module.plain_weight(module.weight, module._logits())
            plain.weight, plain.bias = nn.Parameter(weight.clone()), module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _LearnedMasked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, logits)
        ctx.temperature = temperature
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        weight, logits = ctx.saved_tensors
        soft = torch.sigmoid(logits / ctx.temperature)
        return gradient, gradient * weight * soft * (1 - soft) / ctx.temperature, None, None


class _Rounded(torch.autograd.Function):
    """Forward function(real), backward the identity."""

    @staticmethod
    def forward(ctx: Any, real: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return function(real)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _ternary(weight: torch.Tensor) -> torch.Tensor:
    wide = weight if weight.dtype == torch.float64 else weight.float()
    scale = wide.abs().mean().clamp(min=1e-5)
    return ((wide / scale).round().clamp(-1, 1) * scale).to(weight.dtype)


def _int8(tokens: torch.Tensor) -> torch.Tensor:
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    scale = 127 / wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return ((wide * scale).round().clamp(-128, 127) / scale).to(tokens.dtype)


def _kth_largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """A scalar; infinity for k = 0. kthvalue is one block of threads on a GPU, where sorting is far quicker."""
    flat = scores.flatten()
    if k < 1:
        return torch.full((), torch.inf, dtype=flat.dtype, device=flat.device)
    at = flat.numel() - k
    return flat.kthvalue(at + 1).values if flat.device.type == "cpu" else flat.sort().values[at]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _converted(linear: nn.Module, config: SparseConfig) -> MaskedLinear:
    assert isinstance(linear, nn.Linear)
    kinds = {"threshold": MaskedLinear, "learned": LearnedMaskLinear, "bitnet": BitLinear}
    options = {"init_logit": config.init_logit} if config.mask == "learned" else {}
    with torch.device("meta"):
        new = kinds[config.mask](linear.in_features, linear.out_features, linear.bias is not None, **options)
    new.weight, new.bias = linear.weight, linear.bias
    if isinstance(new, LearnedMaskLinear):
        new.mask_logits = nn.Parameter(torch.full_like(linear.weight, config.init_logit))
    new.training = linear.training
    return new
