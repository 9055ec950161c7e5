"""Weights do not depend on the layout, and equal what transformers itself makes or saved."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer import config as configuration
from trainer.errors import CheckpointError, ConfigError
from trainer.models import build, weights

CPU = torch.device("cpu")
TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=4",
    "data.seq_len=16",
    "train.device=cpu",
]


def _settings(*overrides: str, vocab_size: int = 301, pretrained=None):
    config = configuration.load("demo", [*TINY, *overrides])
    return config, build.model_config(
        config, vocab_size=vocab_size, bos_id=0, eos_id=1, pad_id=2, pretrained=pretrained
    )


def _built(*overrides: str, seed: int = 1234) -> torch.nn.Module:
    config, settings = _settings(*overrides)
    model = build.on_meta(config, settings, CPU)
    weights.initialise([model], build.on_meta(config, settings, CPU), seed, CPU)
    return model


@pytest.fixture
def folder(tmp_path):
    """A model that transformers itself made and saved in several files, in bf16."""
    _, settings = _settings()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)  # norms too
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / weights.INDEX).is_file()
    return tmp_path / "saved"


def test_every_layout_has_the_same_weights(ranks, tmp_path, folder):
    out = tmp_path / "out"
    result = ranks("models_weights", 4, argv=[str(out), str(folder), *TINY])
    assert result.exit_codes == [0] * 4, result.output
    made = dict(_built().named_parameters())
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored.update(load_file(file))
    _, settings = _settings()
    rotary = AutoModelForCausalLM.from_config(settings).model.rotary_emb.inv_freq
    kinds = {"plain": 1, "fsdp": 1, "tp": 3, "fsdp_tp": 3}
    for rank in range(4):
        saved = torch.load(f"{out}.{rank}")
        for (layout, kind), got in saved.items():
            expected = made if kind == "random" else stored
            assert got["parameters"].keys() == made.keys()
            for name, tensor in got["parameters"].items():
                assert torch.equal(tensor, expected[name].float()), (layout, kind, name)
            assert torch.equal(got["buffers"]["model.rotary_emb.inv_freq"], rotary)
            assert got["tied"]
            assert len(got["kinds"]) == kinds[layout], (layout, got["kinds"])
            if layout == "fsdp":
                total = sum(tensor.numel() for tensor in made.values())
                assert got["local"] <= total / 4 * 1.1
        for kind in ("random", "loaded"):
            assert saved["fsdp", kind]["loss"] == pytest.approx(saved["fsdp_tp", kind]["loss"], rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral"])
def test_weights_are_distributed_as_transformers_does(architecture):
    """Each parameter's mean and deviation are those of a normally built model; constants are equal."""
    extra = [f"model.architecture={architecture}", "model.hidden_size=128", "model.intermediate_size=256"]
    model = _built(*extra)
    torch.manual_seed(5)
    _, settings = _settings(*extra)
    normal = dict(AutoModelForCausalLM.from_config(settings).named_parameters())
    assert normal.keys() == dict(model.named_parameters()).keys()
    for name, parameter in ((name, parameter.detach()) for name, parameter in model.named_parameters()):
        other = normal[name].detach()
        if other.std() == 0 or parameter.dim() == 1:
            assert torch.equal(parameter, other), name
        else:
            assert parameter.std() == pytest.approx(other.std().item(), rel=0.1), name
            assert abs(parameter.mean()) < 6 * parameter.std() / math.sqrt(parameter.numel()), name
    drawn = [p.flatten()[:8] for p in model.parameters() if p.dim() > 1]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)  # no two modules share a seed
    if architecture == "gpt2":
        scaled = model.transformer.h[0].mlp.c_proj.weight.detach().std()
        assert scaled == pytest.approx(settings.initializer_range / math.sqrt(2 * 2), rel=0.05)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_buffers_equal_those_of_a_normal_model(architecture):
    _, settings = _settings(f"model.architecture={architecture}")
    normal = dict(AutoModelForCausalLM.from_config(settings).named_buffers())
    mine = dict(_built(f"model.architecture={architecture}").named_buffers())
    assert mine.keys() == normal.keys() and mine
    for name, buffer in mine.items():
        assert torch.equal(buffer, normal[name]), name


def test_seed_decides_and_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    one, two, other = _built(), _built(), _built(seed=7)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.model.layers[1].mlp.up_proj.weight, two.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(one.model.layers[1].mlp.up_proj.weight, other.model.layers[1].mlp.up_proj.weight)


def test_fp64_has_the_fp32_values():
    half, full = _built(), _built("train.precision=fp64")
    for mine, wide in zip(half.parameters(), full.parameters(), strict=True):
        assert wide.dtype == torch.float64 and torch.equal(mine.double(), wide)


def test_a_parameter_without_initial_value_is_refused():
    config, settings = _settings()
    model, reference = build.on_meta(config, settings, CPU), build.on_meta(config, settings, CPU)
    for one in (model, reference):
        one.model.layers[0].mlp.forgotten = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.mlp\.forgotten' without an initial value"):
        weights.initialise([model], reference, 0, CPU)


def _load(folder, *overrides: str) -> torch.nn.Module:
    config, settings = _settings(*overrides, pretrained=folder)
    model = build.on_meta(config, settings, CPU)
    weights.load_pretrained([model], build.on_meta(config, settings, CPU), folder, 0, CPU)
    return model


def test_loaded_model_computes_what_transformers_computes(folder):
    mine = _load(folder).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, 301, (2, 16))
    assert torch.equal(mine(tokens).logits, theirs(tokens).logits)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight


def test_gpt2_of_the_hub_without_prefix_and_with_masks(tmp_path):
    """As the hub has it: no `transformer.` before the names, no head, and the causal masks as tensors."""
    _, settings = _settings("model.architecture=gpt2")
    theirs = AutoModelForCausalLM.from_config(settings).eval()
    theirs.save_pretrained(tmp_path)
    state = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / weights.SINGLE).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 1024, 1024)
    save_file(state, tmp_path / weights.SINGLE)
    mine = _load(tmp_path).eval()
    tokens = torch.randint(0, 301, (2, 16))
    assert torch.equal(mine(tokens).logits, theirs(tokens).logits)


def _change(folder, change) -> None:
    """Rewrites the folder as one file with changed tensors."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
        file.unlink()
    (folder / weights.INDEX).unlink()
    change(state)
    save_file(state, folder / weights.SINGLE)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), f"there is no tensor '{NORM}'"),
        (lambda state: state.update(extra=torch.ones(2)), "no place for the tensor 'extra'"),
        (
            lambda state: state.update({NORM: torch.ones(31)}),
            rf"'{NORM}' has the shape \(31,\), the model's is \(32,\)",
        ),
        (lambda state: state.pop("model.embed_tokens.weight"), "there is no tensor 'model.embed_tokens.weight'"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    _change(folder, change)
    with pytest.raises(CheckpointError, match=message):
        _load(folder)


def test_untied_head_must_be_there(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"there is no tensor 'lm_head\.weight'"):
        _load(folder)


def test_folder_without_safetensors_or_with_a_torn_file(folder):
    torn = next(folder.glob("model-*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=torn.name):
        _load(folder)
    for file in [*folder.glob("*.safetensors"), folder / weights.INDEX]:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        _load(folder)


def test_a_pipeline_stage_gets_its_own_weights_only(folder):
    """A stage as distributed/pipeline_parallel.py cuts it: absent pieces are deleted or None."""
    import copy

    config, settings = _settings("model.tie_word_embeddings=false")
    reference = build.on_meta(config, settings, CPU)
    stage = copy.deepcopy(reference)
    del stage.model.layers[0]
    stage.model.layers = torch.nn.ModuleDict({"1": stage.model.layers[0]})
    stage.model.embed_tokens = None
    weights.initialise([stage], reference, 1234, CPU)
    whole = dict(_built("model.tie_word_embeddings=false").named_parameters())
    assert "lm_head.weight" in dict(stage.named_parameters())
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, whole[name]), name
