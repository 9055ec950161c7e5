from __future__ import annotations

import argparse

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trainer import config as configuration
from trainer import plan
from trainer.distributed.layout import layout_for
from trainer.errors import ConfigError
from trainer.models import saved
from trainer.models.memory import apply_activation_checkpoint

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SMALL = [f"model.{key}={value}" for key, value in LLAMA.items()] + ["model.vocab_size=1024"]
BIG = [
    "model.hidden_size=8192",
    "model.intermediate_size=28672",
    "model.num_hidden_layers=80",
    "model.num_attention_heads=64",
    "model.num_key_value_heads=8",
    "model.vocab_size=128256",
    "model.tie_word_embeddings=false",
    "data.seq_len=8192",
    "parallel.strategy=full_shard",
    "train.precision=bf16",
    "train.global_batch=1024",
    "train.micro_batch=1",
    "train.steps=1000",
]
"""Llama 3 70B."""


def _config(*overrides):
    return configuration.load("demo", list(overrides))


def _args(*values):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_intermixed_args(["--config", "demo", *values])


def test_parameters_are_those_of_the_model():
    for tie in (True, False):
        sizes = plan.make(_config(*SMALL, f"model.tie_word_embeddings={str(tie).lower()}"), 1, 1).sizes
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=1024, tie_word_embeddings=tie))
        assert sizes.total == sum(p.numel() for p in model.parameters())
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        assert (sizes.embedding, sizes.layer) == (1024 * 64, layer)
    made = plan.make(_config("model.architecture=gpt2", *SMALL, "model.intermediate_size=null"), 1, 1)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=1024, n_positions=128))
    assert made.sizes.total == sum(p.numel() for p in gpt2.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_are_those_of_training(dtype):
    from trainer.config import OptimConfig
    from trainer.optimize import build_optimizer

    parts = plan.make(_config(*SMALL, f"optim.state_dtype={dtype}", "model.tie_word_embeddings=true"), 1, 1).parts
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=1024, tie_word_embeddings=True))
    optimizer = build_optimizer(model, OptimConfig(state_dtype=dtype))  # type: ignore[arg-type]
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["parameters"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert parts["optimizer states"] == sum(moment.nbytes for moment in moments)


class _Live(TorchDispatchMode):
    """Every storage that an operator made."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def bytes(self, but):
        """Those that are still there, without those in `but`."""
        alive = {key: size for key, (reference, size) in self.storages.items() if not reference.expired()}
        return sum(size for key, size in alive.items() if key not in but)


def _alive_after_forward(mode, precision, layers):
    """Bytes that a real forward pass on the CPU leaves behind for backward."""
    torch.manual_seed(0)
    sizes = {**LLAMA, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024, attn_implementation="sdpa"))
    apply_activation_checkpoint(model, mode)
    ids = torch.randint(0, 1024, (4, 128))
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with _Live() as live, low:
        hidden = model.model(ids, use_cache=False)[0]
    assert hidden.requires_grad
    return live.bytes(but=parameters)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activations_of_a_layer_against_a_real_forward_pass(mode, precision):
    measured = _alive_after_forward(mode, precision, 5) - _alive_after_forward(mode, precision, 2)
    if precision == "bf16":  # autocast's copies of the weights are a part of their own
        measured -= 3 * 2 * (4 * 64 * 64 + 3 * 64 * 160) * (mode == "none")
    config = _config(*SMALL, f"train.activation_checkpoint={mode}", f"train.precision={precision}")
    settings, _ = saved.settings_of(config, 0)
    _, kept, _ = saved.layer_bytes(config, layout_for(config, 1, 1), settings)
    assert kept == pytest.approx(measured / 3, rel=0.1)


def test_of_a_large_model_on_a_large_cluster():
    made = plan.make(_config(*BIG, "train.activation_checkpoint=full"), 64, 8)
    assert made.sizes.total == 70_553_706_496  # as published
    assert made.parts["parameters"] == made.parts["gradients"] == 70_553_706_496 * 4 / 512
    assert made.parts["optimizer states"] == 70_553_706_496 * 8 / 512
    assert made.tokens == 1024 * 8192
    matrices = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 8192 * 128256
    assert made.flops == 1024 * 8192 * (6 * matrices + 6 * 80 * 8192 * 8192)
    layer_input = 8192 * 8192 * 2
    assert 80 * layer_input < made.parts["activations"] < 80 * layer_input + 10 * plan.GIB
    assert made.memory < 80 * plan.GIB


@pytest.mark.parametrize(
    "overrides, shard, tensor, pipeline",
    [
        (["parallel.strategy=ddp"], 1, 1, 1),
        (["parallel.strategy=hybrid"], 8, 1, 1),
        (["parallel.tensor=8"], 64, 8, 1),
        (["parallel.strategy=shard_grad_op", "parallel.tensor=8", "parallel.pipeline=8"], 8, 8, 8),
    ],
)
def test_layouts_divide(overrides, shard, tensor, pipeline):
    made = plan.make(_config(*BIG, *overrides), 64, 8)
    assert (made.layout.shard, made.layout.tensor, made.layout.pipeline) == (shard, tensor, pipeline)
    stage = made.sizes.total / pipeline / tensor / shard
    assert made.local == pytest.approx(stage, rel=0.15 if pipeline > 1 else 0.001)
    assert made.parts["parameters"] == pytest.approx(4 * made.local, rel=0.15 if pipeline > 1 else 1e-9)


def test_less_is_kept_with_sequence_parallelism_and_less_in_flight_later():
    base = [*BIG, "train.activation_checkpoint=none", "parallel.tensor=8"]
    plain, cut = (plan.make(_config(*base, *more), 64, 8).parts for more in ([], ["parallel.sequence=true"]))
    assert cut["activations"] < 0.5 * plain["activations"]
    config = _config(*base, "parallel.strategy=ddp", "parallel.pipeline=8", "model.num_hidden_layers=72")
    settings, _ = saved.settings_of(config, 0)
    layout = layout_for(config, 512, 8)
    by_rank = [plan._activations(config, layout, settings, rank, 32) for rank in range(8)]
    assert by_rank == sorted(by_rank, reverse=True) and by_rank[0] > 6 * by_rank[-1]


def test_a_plan_that_fits(capsys):
    assert plan.run(_args(*BIG, "train.activation_checkpoint=full", "--nodes", "64")) == 0
    text = capsys.readouterr().out
    assert "fsdp512" in text and "70,553,706,496 (70.55 B)" in text and "8,388,608 tokens per step" in text
    days = plan.make(_config(*BIG), 64, 8).flops * 1000 / (512 * 989e12 * 0.4) / 86400
    assert f"{days:.2f} days at 40% MFU" in text


def test_what_cannot_fit_is_refused_with_the_keys_to_change(capsys):
    with pytest.raises(ConfigError, match=r"needs \d+\.\d GiB.*80 GiB") as error:
        plan.run(_args(*BIG, "train.activation_checkpoint=none", "train.micro_batch=2", "--nodes", "64"))
    assert error.value.exit_code == 2 and "train.activation_checkpoint=full" in error.value.hint
    assert "70.55 B" in capsys.readouterr().out
    with pytest.raises(ConfigError) as error:
        plan.run(_args(*BIG, "parallel.strategy=ddp", "--nodes", "64"))
    assert "parallel.strategy=full_shard" in error.value.hint and "train.activation_checkpoint=full" in error.value.hint
    with pytest.raises(ConfigError) as error:
        plan.run(_args(*BIG, "--memory", "20gb"))
    assert "Take more devices" in error.value.hint


def test_what_cannot_run_is_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        plan.run(_args(*SMALL, "train.global_batch=20", "--nodes", "2"))
    with pytest.raises(ConfigError, match="--gpu=H999"):
        plan.run(_args(*SMALL, "--gpu", "H999"))
    with pytest.raises(ConfigError, match="--memory=much"):
        plan.run(_args(*SMALL, "--memory", "much"))
    assert plan.parse_bytes("80gb") == plan.parse_bytes("80GiB") == plan.parse_bytes("80") == 80 * 2**30


def test_adapters_and_masks_and_missing_tokenizers():
    lora = plan.make(_config(*SMALL, "model.lora.rank=4"), 1, 1)
    trained = 3 * 4 * (4 * 2 * 64 + 3 * (64 + 160))
    assert lora.sizes.total * lora.sizes.trainable == pytest.approx(trained)
    assert lora.parts["gradients"] == pytest.approx(4 * trained)
    dense = plan.make(_config(*SMALL), 1, 1)
    assert lora.flops < dense.flops
    # in bf16 the frozen matrices take 2 bytes and need no copies to compute with; the head is the embedding
    low = plan.make(_config(*SMALL, "model.lora.rank=4", "train.precision=bf16"), 1, 1)
    frozen = 3 * (4 * 64 * 64 + 3 * 64 * 160)
    assert low.parts["parameters"] == pytest.approx(lora.parts["parameters"] - 2 * frozen)
    assert low.parts["parameters in bf16"] == pytest.approx(2 * (trained + 7 * 64))  # adapters and norms
    learned = plan.make(_config(*SMALL, "model.sparse.mask=learned"), 1, 1)
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 160)
    assert learned.sizes.total == dense.sizes.total + matrices
    assert learned.parts["activations"] == pytest.approx(dense.parts["activations"] + 4 * matrices, rel=0.01)
    made = plan.make(_config("tokenizer.path=none/such"), 1, 1)
    assert made.sizes.embedding == plan.VOCABULARY * 128 and "none/such" in made.notes[0]
    with pytest.raises(ConfigError) as error:
        plan.make(_config("model.pretrained=none/such"), 1, 1)
    assert "model.pretrained=FOLDER" in error.value.hint


def test_pretrained_folder(tmp_path):
    LlamaConfig(**LLAMA, vocab_size=500).save_pretrained(tmp_path)
    made = plan.make(_config(f"model.pretrained={tmp_path}"), 1, 1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=500))
    assert made.sizes.total == sum(p.numel() for p in model.parameters()) and made.notes == ()
