from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from trainer.config import OptimConfig
from trainer.optim import build_optimizer, build_schedule, lr_factor


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decay, plain = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert [p.ndim for p in decay["params"]] == [2] and decay["weight_decay"] == 0.3
    assert [p.ndim for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0.0


def test_tied_and_frozen_parameters():
    model = nn.Linear(3, 3)
    model.twin = nn.Linear(3, 3)
    model.twin.weight = model.weight
    model.bias.requires_grad_(False)
    groups = build_optimizer(model, OptimConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == 2


def test_warm_up_then_cosine():
    config = OptimConfig(warmup_steps=4, min_lr_ratio=0.1)
    factors = [lr_factor(step, 15, config) for step in range(16)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.55) and factors[14] == pytest.approx(0.1) == factors[15]
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))


@pytest.mark.parametrize("warmup, total", [(0, 1), (5, 3), (0, 0), (3, 3)])
def test_degenerate_lengths(warmup, total):
    config = OptimConfig(warmup_steps=warmup)
    assert all(0 < lr_factor(step, total, config) <= 1 for step in range(6))


def test_schedule_continues_from_its_state():
    def rates(schedule, count):
        seen = []
        for _ in range(count):
            seen.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return seen

    def fresh():
        optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(lr=0.5, warmup_steps=2))
        return build_schedule(optimizer, 8, OptimConfig(lr=0.5, warmup_steps=2))

    whole = rates(fresh(), 8)
    half = fresh()
    assert rates(half, 3) == whole[:3]
    resumed = fresh()
    resumed.optimizer.load_state_dict(half.optimizer.state_dict())
    resumed.load_state_dict(half.state_dict())
    assert rates(resumed, 5) == whole[3:]
    assert torch.isfinite(torch.tensor(whole)).all()
