"""Against independent references: one process, plain transformers, one document at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from trainer import config as configuration
from trainer.models.load import build_model

BOS, PAD = 0, 2


def _documents(row: torch.Tensor) -> list[torch.Tensor]:
    """A packed row cut where documents begin, padding removed; each piece stands alone."""
    row = row[row != PAD].long()
    starts = [0, *[i for i in range(1, len(row)) if row[i] == BOS], len(row)]
    return [row[a:b] for a, b in itertools.pairwise(starts) if b - a > 1]


@pytest.mark.parametrize("world", [1, 2])
def test_step_equals_one_plain_process(world, ranks, tiny, tmp_path):
    overrides = [*tiny, "train.precision=fp64", "optim.clip=0", "train.global_batch=8", "train.micro_batch=2"]
    out = tmp_path / "out"
    env = {"ORCH_RUN_DIR": str(tmp_path / "run")}
    result = ranks("gradients", world, argv=[str(out), *overrides], env=env)
    assert result.exit_codes == [0] * world, result.output
    saved = [torch.load(f"{out}.{rank}") for rank in range(world)]

    model = build_model(configuration.load("demo", overrides), 300, torch.device("cpu"))
    pieces = [piece for row in saved[0]["rows"] for piece in _documents(row)]
    assert any(len(_documents(row)) > 1 for row in saved[0]["rows"])
    tokens = sum(len(piece) - 1 for piece in pieces)
    loss = sum(
        -F.log_softmax(model(piece[None, :-1]).logits[0], dim=-1).gather(1, piece[1:, None]).sum()
        for piece in pieces
    )
    (loss / tokens).backward()
    for mine in saved:
        assert mine["tokens"] == tokens
        assert mine["loss"] == pytest.approx(loss.item() / tokens, rel=1e-12)
        for name, parameter in model.named_parameters():
            error = (mine["gradients"][name] - parameter.grad).norm() / parameter.grad.norm()
            assert error <= 1e-10, (name, error)

    with torch.no_grad():
        total = count = 0.0
        for piece in (piece for row in saved[0]["held_out_rows"] for piece in _documents(row)):
            mean = model(piece[None], labels=piece[None]).loss  # transformers' own shift and loss
            total, count = total + mean.item() * (len(piece) - 1), count + len(piece) - 1
    assert {mine["held_out_tokens"] for mine in saved} == {count}
    # a model in fp64, but transformers' loss function computes in fp32
    assert math.exp(saved[0]["held_out_loss"]) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_documents_do_not_attend_to_each_other():
    from trainer.data.packing import collate

    model = build_model(configuration.load("demo"), 300, torch.device("cpu")).eval()
    row = torch.randint(3, 300, (129,), generator=torch.Generator().manual_seed(0))
    row[0] = row[60] = BOS
    other = row.clone()
    other[1:60] = torch.randint(3, 300, (59,), generator=torch.Generator().manual_seed(1))

    def logits(tokens: torch.Tensor, together: bool) -> torch.Tensor:
        batch = collate([tokens.numpy()], together)
        with torch.no_grad():
            return model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[
                0, 60:
            ]

    assert (logits(row, False) - logits(other, False)).abs().max() == 0.0
    assert (logits(row, True) - logits(other, True)).abs().max() > 0.0
