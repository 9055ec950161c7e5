"""Pipeline parallelism without ranks: how layers are cut, where stages lie, what is refused; and its evaluation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trainer import config as configuration
from trainer.config import Config
from trainer.distributed import pipeline_parallel
from trainer.distributed.pipeline_parallel import check_model, split_layers, stage_owner, stages_per_rank
from trainer.errors import ConfigError
from trainer.models.loss import install_loss, summed_loss


def config_of(*overrides: str) -> Config:
    return configuration.load("demo", ["model.tie_word_embeddings=false", "parallel.pipeline=2", *overrides])


def model_of(
    kind: Any = Qwen3ForCausalLM, settings: Any = Qwen3Config, layers: int = 5, tied: bool = False
) -> nn.Module:
    torch.manual_seed(0)
    return kind(
        settings(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
            use_cache=False,
            initializer_range=0.3,
        )
    ).double()


@pytest.mark.parametrize("head", [0.0, 0.4, 1.0, 2.4, 7.0])
@pytest.mark.parametrize(("layers", "stages"), [(4, 4), (5, 4), (8, 2), (9, 4), (11, 3)])
def test_no_other_split_has_a_faster_slowest_stage(layers: int, stages: int, head: float) -> None:
    parts = split_layers(layers, stages, head)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert all(len(part) for part in parts)

    def slowest(counts: tuple[int, ...]) -> float:
        return max(*counts[:-1], counts[-1] + head)

    every = [counts for counts in itertools.product(range(1, layers + 1), repeat=stages) if sum(counts) == layers]
    assert slowest(tuple(map(len, parts))) == pytest.approx(min(map(slowest, every)))


def test_the_first_stages_get_fewer_layers_where_it_makes_no_difference() -> None:
    assert list(map(len, split_layers(32, 4, 2.4))) == [8, 9, 9, 6]  # Llama 3.1 8B
    assert list(map(len, split_layers(6, 4, 0.0))) == [1, 1, 2, 2]


@pytest.mark.parametrize(("schedule", "style"), [("1f1b", "loop"), ("interleaved", "loop"), ("zero_bubble", "v")])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_lie_where_torch_expects_them(schedule: str, style: str, ranks: int) -> None:
    count = ranks * stages_per_rank(config_of(f"parallel.schedule={schedule}", "parallel.stages_per_rank=3"))
    mapping = generate_stage_to_rank_mapping(ranks, count, style=style)
    assert {stage: stage_owner(stage, ranks, schedule) for stage in range(count)} == mapping


@pytest.mark.parametrize(("kind", "settings"), [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)])
def test_stages_have_the_whole_model_s_names_and_give_its_loss_one_after_the_other(kind: Any, settings: Any) -> None:
    model = model_of(kind, settings)
    whole = dict(model.named_parameters())
    install_loss(model, "plain")
    parts = [
        pipeline_parallel._cut(model, config_of(), kept, first=kept.start == 0, last=kept.stop == 5)
        for kept in (range(0, 2), range(2, 3), range(3, 5))
    ]
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(whole)
    assert len(set(names)) == len(names)
    tokens, labels = torch.randint(0, 40, (2, 2, 8))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]])
    hidden: Any = parts[0].model(input_ids=tokens, position_ids=positions).last_hidden_state
    hidden = parts[1].model(inputs_embeds=hidden, position_ids=positions).last_hidden_state
    loss = parts[2](inputs_embeds=hidden, position_ids=positions, labels=labels)
    expected = summed_loss(model(input_ids=tokens, position_ids=positions).logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)


def test_models_that_cannot_be_cut_are_refused_with_the_key_to_change() -> None:
    small = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=16))
    for model, overrides, stages, said, hint in (
        (small, [], 2, "'gpt2'", "parallel.pipeline=1"),
        (model_of(tied=True), [], 2, "tied embeddings", "parallel.pipeline=1"),
        (model_of(layers=3), ["parallel.schedule=interleaved"], 4, "3 layers", "parallel.pipeline to at most 1"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            check_model(model, config_of(*overrides), stages)
        assert hint in (refused.value.hint or "")


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_evaluation_takes_batches_of_any_size(schedule: str, ranks: Callable[..., Any], tmp_path: Path) -> None:
    argv = [str(tmp_path / "out"), "parallel.pipeline=2", f"parallel.schedule={schedule}", "train.precision=fp64"]
    done = ranks("pipeline_evaluate", 2, argv=argv)
    assert done.exit_codes == [0, 0], done.output
    reports = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    counting = 1 if schedule == "1f1b" else 0  # the rank with the last stage
    for rank, report in enumerate(reports):
        assert report["unchanged"]
        for rows, expected in report["expected"].items():
            wanted = expected if rank == counting else 0.0
            assert report["found"][rows] == pytest.approx([wanted] * len(report["found"][rows]), rel=1e-12)
