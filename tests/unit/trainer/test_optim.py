from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from trainer.config import OptimConfig
from trainer.distributed.parallel_model import ParallelModel
from trainer.errors import ConfigError, NonFiniteError
from trainer.optimize import AdamWBf16, LossScaler, Schedule, build_optimizer, rates


class Plain(ParallelModel):
    """One module in one process."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [module]

    def forward_backward(self, batches, scale):
        raise AssertionError

    def evaluate(self, batch):
        raise AssertionError


def _small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3, bias=False))


def _fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of a regression with noise, so that gradients neither vanish nor agree."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(6, 3, generator=generator)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator)
        y = torch.tanh(x @ target) + 0.3 * torch.randn(32, 3, generator=generator)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_only_matrices_decay():
    model = Plain(_small())
    decay, plain = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert [tuple(p.shape) for p in decay["params"]] == [(16, 6), (3, 16)] and decay["weight_decay"] == 0.3
    assert [p.ndim for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0.0
    assert decay["fused"] is True


def test_patterns_without_decay_and_groups_without_parameters():
    module = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    decay, plain = build_optimizer(Plain(module), OptimConfig(no_decay=["*embed_tokens*"])).param_groups
    assert decay["params"] == [module["head"].weight] and plain["params"] == [module["embed_tokens"].weight]
    (only,) = build_optimizer(Plain(module), OptimConfig()).param_groups
    assert len(only["params"]) == 2 and only["weight_decay"] == 0.1


def test_tied_and_frozen_parameters():
    model = nn.Linear(3, 3)
    model.twin = nn.Linear(3, 3)
    model.twin.weight = model.weight
    model.bias.requires_grad_(False)
    groups = build_optimizer(Plain(model), OptimConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == 2
    with pytest.raises(ConfigError, match="trainable"):
        build_optimizer(Plain(model.requires_grad_(False)), OptimConfig())


def test_fused_is_refused_where_it_does_not_exist():
    with pytest.raises(ConfigError, match=r"optim\.fused=true.*state_dtype=bf16"):
        build_optimizer(Plain(_small()), OptimConfig(fused=True, state_dtype="bf16"))
    assert build_optimizer(Plain(_small()), OptimConfig(fused=False)).param_groups[0]["fused"] is False


@pytest.mark.parametrize("fused", [True, False])
def test_equals_torch(fused):
    mine, reference = _small(), _small()
    config = OptimConfig(lr=0.01, weight_decay=0.1, fused=fused)
    _fit(mine, build_optimizer(Plain(mine), config), 20)
    matrices = [p for p in reference.parameters() if p.ndim == 2]
    vectors = [p for p in reference.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "foreach": False}
    _fit(reference, torch.optim.AdamW(groups, **options), 20)
    for a, b in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bf16_moments_learn_as_fp32_ones():
    losses = {}
    for dtype in ("fp32", "bf16"):
        model = _small()
        optimizer = build_optimizer(Plain(model), OptimConfig(lr=3e-3, state_dtype=dtype))
        losses[dtype] = _fit(model, optimizer, 400)
        bytes_ = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
        assert bytes_ == sum(p.numel() for p in model.parameters()) * (8 if dtype == "fp32" else 4)
    ends = {dtype: sum(values[-50:]) / 50 for dtype, values in losses.items()}
    assert ends["fp32"] < 0.4 * losses["fp32"][0]
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=0.01)


def test_bf16_single_step_is_adams():
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(300, generator=torch.Generator().manual_seed(1))
    results = []
    for kind in (AdamWBf16, torch.optim.AdamW):
        parameter = nn.Parameter(weight.clone())
        optimizer = kind([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
        parameter.grad = gradient.clone()
        optimizer.step()
        results.append((parameter, optimizer.state[parameter]))
    (mine, state), (reference, exact) = results
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)  # the first step uses unrounded moments
    torch.testing.assert_close(state["exp_avg"].float(), exact["exp_avg"], rtol=2**-8, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"].float(), exact["exp_avg_sq"], rtol=2**-7, atol=0)


def test_bf16_parameters_that_miss_steps_have_their_own_count(monkeypatch):
    monkeypatch.setattr("trainer.optimize.adamw.BUCKET", 1)
    results = []
    for kind in (AdamWBf16, torch.optim.AdamW):
        often, seldom = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        optimizer = kind([often, seldom], lr=0.1, weight_decay=0.0)
        for step in range(4):
            often.grad = torch.ones(2)
            seldom.grad = torch.ones(2) if step == 3 else None
            optimizer.step()
        results.append(torch.cat([often, seldom]))
    torch.testing.assert_close(*results, rtol=0.01, atol=0)
    assert results[0][2:].tolist() == pytest.approx([-0.1, -0.1])  # a first step is lr · sign


def test_second_moment_decays_although_each_change_is_too_small_for_bf16():
    """β₂ = 0.999 moves it by 0.1 % a step; bf16 to nearest would keep it for ever."""
    parameter = nn.Parameter(torch.zeros(4000))
    optimizer = AdamWBf16([parameter], lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    parameter.grad = torch.ones(4000)
    optimizer.step()
    start = optimizer.state[parameter]["exp_avg_sq"].float().mean()
    assert (start.bfloat16() * 0.999).bfloat16() == start.bfloat16()
    parameter.grad = torch.zeros(4000)
    for _ in range(1000):
        optimizer.step()
    left = optimizer.state[parameter]["exp_avg_sq"].float().mean() / start
    assert left.item() == pytest.approx(0.999**1000, rel=0.01)


def test_bf16_state_survives_saving_and_repeats_its_noise():
    whole = _small()
    optimizer = build_optimizer(Plain(whole), OptimConfig(state_dtype="bf16"))
    _fit(whole, optimizer, 5)
    resumed = _small()
    resumed.load_state_dict(whole.state_dict())
    again = build_optimizer(Plain(resumed), OptimConfig(state_dtype="bf16"))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in again.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    torch.manual_seed(99)  # another state of the global generator must not matter
    _fit(resumed, again, 3)
    _fit(whole, optimizer, 3)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_warm_up_then_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    factors = [rates(step, 15, config)[0] for step in range(16)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.55) and factors[14] == pytest.approx(0.1) == factors[15]
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.3)))


def test_linear_constant_and_wsd():
    linear = OptimConfig(lr=2.0, schedule="linear", warmup_steps=1, min_lr_ratio=0.0)
    assert [rates(s, 6, linear)[0] for s in range(6)] == pytest.approx([2.0, 2.0, 1.5, 1.0, 0.5, 0.0])
    constant = OptimConfig(lr=2.0, schedule="constant", warmup_steps=2)
    assert [rates(s, 6, constant)[0] for s in range(8)] == [1.0] + [2.0] * 7
    wsd = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, min_lr_ratio=0.2, decay_steps=4)
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [rates(s, 10, wsd)[0] for s in range(11)] == pytest.approx(expected)
    fifth = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=0, min_lr_ratio=0.0)
    assert [rates(s, 10, fifth)[0] for s in range(10)] == pytest.approx([1.0] * 8 + [0.5, 0.0])


def test_two_phases_and_their_weight_decay():
    config = OptimConfig(lr=1.0, schedule="two_phase", lr_mid=0.4, min_lr_ratio=0.0, warmup_steps=1, weight_decay=0.1)
    optimizer = build_optimizer(Plain(_small()), config)
    schedule = Schedule(optimizer, 10, config)
    seen = []
    for _ in range(10):
        decay, plain = optimizer.param_groups
        assert decay["lr"] == plain["lr"] == schedule.lr and plain["weight_decay"] == 0
        assert decay["weight_decay"] == schedule.weight_decay
        seen.append((decay["lr"], decay["weight_decay"]))
        schedule.step()
    expected = [1, 1, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1, 0]
    assert [lr for lr, _ in seen] == pytest.approx(expected)
    assert [decay for _, decay in seen] == [0.1] * 5 + [0.0] * 5
    with pytest.raises(ConfigError, match="half time") as error:
        Schedule(optimizer, 10, OptimConfig(schedule="two_phase"))
    assert "optim.lr_mid" in error.value.hint


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "two_phase"])
@pytest.mark.parametrize("warmup, total", [(0, 1), (5, 3), (0, 0), (3, 3)])
def test_degenerate_lengths(warmup, total, name):
    config = OptimConfig(lr=1.0, schedule=name, lr_mid=0.5, warmup_steps=warmup)
    assert all(0 < rates(step, total, config)[0] <= 1 for step in range(6))


def test_schedule_continues_from_its_state():
    config = OptimConfig(lr=0.5, warmup_steps=2)

    def fresh():
        return Schedule(build_optimizer(Plain(_small()), config), 8, config)

    def run(schedule, count):
        seen = []
        for _ in range(count):
            seen.append(schedule.get_last_lr()[0])
            schedule.step()
        return seen

    whole = run(fresh(), 8)
    half = fresh()
    assert run(half, 3) == whole[:3]
    resumed = fresh()
    resumed.load_state_dict(half.state_dict())
    assert run(resumed, 5) == whole[3:]


def test_loss_scale():
    scaler = LossScaler(True)
    assert scaler.scale == 2**16
    for _ in range(1999):
        scaler.update(True)
    twin = LossScaler(True)
    twin.load_state_dict(scaler.state_dict())
    for one in (scaler, twin):
        assert one.scale == 2**16
        one.update(True)
        assert one.scale == 2**17
    scaler.update(False)
    assert scaler.scale == 2**16
    for _ in range(16):
        scaler.update(False)
    assert scaler.scale == 1
    with pytest.raises(NonFiniteError, match="fp16") as error:
        scaler.update(False)
    assert "train.precision" in error.value.hint


def test_loss_scale_without_fp16():
    off = LossScaler(False)
    off.update(False)
    assert off.scale == 1
    on = LossScaler(True)
    on.load_state_dict(off.state_dict())
    assert on.scale == 2**16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_shards_and_plain_tensors_together(dtype, ranks, tmp_path):
    """Two ranks, FSDP2 shards beside replicated plain tensors, global generators that differ."""
    out = tmp_path / "out"
    result = ranks("optimizer", 2, argv=[str(out), dtype])
    assert result.exit_codes == [0, 0], result.output
    first, second = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 1, bias=False)])
    optimizer = build_optimizer(Plain(model), OptimConfig(lr=0.05, state_dtype=dtype))
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1) * (step + 1) * parameter.detach().sign()
        optimizer.step()
    for (name, mine), other, reference in zip(
        first["parameters"].items(), second["parameters"].values(), model.parameters(), strict=True
    ):
        assert torch.equal(mine, other), name
        torch.testing.assert_close(mine, reference.detach(), rtol=0, atol=1e-6 if dtype == "fp32" else 1e-3)
    assert sorted(first["kinds"]) == ["DTensor", "DTensor", "Tensor"] and first["groups"] == second["groups"] == [2, 1]
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert first["loaded_dtypes"] == [wanted] * 6
    assert first["dcp_equal"] and second["dcp_equal"]
