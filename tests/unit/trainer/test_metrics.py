from __future__ import annotations

import gzip
import json
import sys
import threading
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MptConfig, Qwen2Config, Qwen3Config

from trainer import config as configuration
from trainer.errors import ConfigError
from trainer.events import Events
from trainer.metrics import Reporter, StepMetrics, StepTimer
from trainer.models.flops import flops_per_token, peak_flops
from trainer.profiling import Profiler

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
FAMILIES = [
    LlamaConfig(**SIZES),
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=16),
    GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96),
]


def _reporter(tmp_path, *overrides, main=True, world=1):
    config = configuration.load("demo", ["log.every=1", "log.tensorboard=false", *overrides])
    events = Events(tmp_path, 0, 1)
    return Reporter(config, tmp_path, events, CPU, main=main, world_size=world), events


def _rows(events):
    return [json.loads(line) for line in events.path.read_text().splitlines()]


STEP = StepMetrics(2.5, 1e-3, 0.7, 1000, 0.5, 0.05, 0.1, weight_decay=0.1)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_flops_against_torchs_own_count(config):
    """torch counts what runs: eager attention over the whole square, and the rotary angles by a product."""
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    batch, length = 2, 24
    ids = torch.randint(0, 96, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    rotary = 0 if config.model_type == "gpt2" else length * getattr(config, "head_dim", 8)
    whole_square = flops_per_token(config, length, context=length)
    assert counter.get_total_flops() - rotary == batch * length * whole_square
    assert flops_per_token(config, length) == flops_per_token(config, length, context=length / 2) < whole_square


def test_flops_of_frozen_weights_and_of_unknown_families():
    full, frozen = (flops_per_token(FAMILIES[0], 10, context=0, frozen=frozen) for frozen in (False, True))
    assert frozen == full * 4 / 6
    assert flops_per_token(MptConfig(), 10) is None


def test_known_peaks():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("Something") is None and peak_flops(CPU) is None


def test_event_of_a_step(tmp_path, capsys):
    reporter, events = _reporter(tmp_path, world=4)
    reporter.set_flops(1e9)
    reporter.step(1, STEP)
    (row,) = _rows(events)
    expected = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "tokens": 1000, "tokens_per_s": 2000.0}
    expected |= {"tokens_per_s_device": 500.0, "step_s": 0.5, "data_s": 0.05, "wait_s": 0.1, "compute_s": 0.35}
    expected |= {"mfu": None, "weight_decay": 0.1}
    assert {name: row[name] for name in expected} == expected and row["memory"] > 1e6
    assert "sparsity" not in row and "loss_scale" not in row
    line = capsys.readouterr().out
    assert "step   1/150  loss 2.5000  lr 1.00e-03  grad norm 0.700  2,000 tokens/s (500 each)" in line
    assert "data 10%  waiting 20%" in line and "MFU" not in line


def test_mfu_and_sparsity(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainer.metrics.peak_flops", lambda device: 1e12)
    reporter, events = _reporter(tmp_path, world=4)
    reporter.set_flops(1e9)
    reporter.step(1, StepMetrics(2.5, 1e-3, 0.7, 1000, 0.5, 0.0, sparsity=0.25, loss_scale=8.0))
    (row,) = _rows(events)
    assert row["mfu"] == 2000 * 1e9 / 4e12 and row["sparsity"] == 0.25 and row["loss_scale"] == 8.0
    line = capsys.readouterr().out
    assert "MFU 50.0%  sparsity 25.0%" in line and "data" not in line
    reporter.set_flops(None)
    assert reporter.mfu(1.0) is None


def test_only_rank_0_speaks(tmp_path, capsys):
    reporter, events = _reporter(tmp_path, "log.tensorboard=true", main=False)
    reporter.step(1, STEP)
    reporter.evaluation(1, 1.0, 2.7, 10, 0.1)
    reporter.close()
    assert _rows(events) == [] and capsys.readouterr().out == "" and not (tmp_path / "tensorboard").exists()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter, _ = _reporter(tmp_path, "log.tensorboard=true")
    reporter.step(1, STEP)
    reporter.step(2, STEP)
    reporter.evaluation(2, 1.25, 3.5, 10, 0.1)
    reporter.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert read["train/loss"] == [(1, 2.5), (2, 2.5)] and read["eval/loss"] == [(2, 1.25)]
    assert read["train/weight_decay"][0][1] == pytest.approx(0.1)
    assert read["speed/wait_s"][0][1] == pytest.approx(0.1) and read["speed/compute_s"][0][1] == pytest.approx(0.35)
    assert read["memory/peak_gb"][0][1] > 0 and "speed/mfu" not in read


def test_wandb(tmp_path, monkeypatch):
    seen: dict[str, object] = {"logged": []}
    run = types.SimpleNamespace(
        log=lambda values, step: seen["logged"].append((step, values)), finish=lambda: seen.update(finished=True)
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: seen.update(options=options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("ORCH_RUN_ID", "job-1")
    _reporter(tmp_path, "log.wandb=mine", main=False)
    assert "options" not in seen
    reporter, _ = _reporter(tmp_path, "log.wandb=mine")
    reporter.step(7, STEP)
    reporter.evaluation(7, 1.25, 3.5, 10, 0.1)
    reporter.close()
    options = seen["options"]
    assert (options["project"], options["id"], options["resume"]) == ("mine", "job-1", "allow")
    assert options["dir"] == str(tmp_path) and options["config"]["optim"]["lr"] == 6e-3
    assert [step for step, _ in seen["logged"]] == [7, 7] and seen["finished"]
    assert seen["logged"][0][1]["train/loss"] == 2.5 and seen["logged"][1][1] == {
        "eval/loss": 1.25,
        "eval/perplexity": 3.5,
    }


@pytest.mark.parametrize("main", [True, False])
def test_wandb_that_is_not_installed_stops_every_rank(tmp_path, main, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.wandb=mine") as error:
        _reporter(tmp_path, "log.wandb=mine", main=main)
    assert "pip install wandb" in error.value.hint


def test_timer_splits_a_step():
    timer = StepTimer()
    event = threading.Event()
    with timer.data():
        event.wait(0.02)
    with timer.wait():
        event.wait(0.04)
    event.wait(0.02)
    assert 0.02 <= timer.data_s < 0.04 <= timer.wait_s < timer.step_s
    assert timer.step_s >= 0.08


def test_profile_of_two_steps(tmp_path, capsys):
    for rank in (0, 1):
        profiler = Profiler((2, 3), tmp_path, rank)
        for step in (1, 2, 3, 4):
            profiler.before(step)
            torch.ones(10 + step) @ torch.ones(10 + step)
            profiler.after(step)
        profiler.close()
        with gzip.open(tmp_path / "profile" / f"rank-{rank}.json.gz") as file:
            trace = json.load(file)["traceEvents"]
        assert sum(event["name"] == "aten::dot" for event in trace if "name" in event) == 2
        assert ("aten::dot" in capsys.readouterr().out) == (rank == 0)
    for steps in (None, (5, 6)):
        profiler = Profiler(steps, tmp_path / "none", 0)
        profiler.before(1)
        profiler.after(1)
        profiler.close()
    assert not (tmp_path / "none").exists()


def test_profile_is_written_when_the_run_ends_early(tmp_path):
    profiler = Profiler((1, 9), tmp_path, 1)
    profiler.before(1)
    profiler.after(1)
    profiler.close()
    assert (tmp_path / "profile" / "rank-1.json.gz").is_file()
