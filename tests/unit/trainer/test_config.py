from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from trainer import config as configuration
from trainer.__main__ import build_parser
from trainer.distributed.layout import Layout, layout_for
from trainer.errors import ConfigError


def _fails(*overrides: str, recipe: str = "demo") -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.load(recipe, overrides)
    assert "\n" not in caught.value.message and caught.value.exit_code == 2
    return caught.value.message


def test_every_recipe_is_valid_and_resolves_to_itself(tmp_path):
    for name in configuration.recipe_names():
        config = configuration.load(name)
        saved = tmp_path / "config.yaml"
        saved.write_text(config.to_yaml())
        assert configuration.load(str(saved)) == config


WORLDS = {"fineweb-fsdp": 32, "llama-8b-fsdp-tp": 64, "llama-1b-fineweb": 8, "llama-8b-sft": 8, "llama-8b-lora": 4}


def test_every_recipe_fits_the_ranks_it_is_made_for():
    for name in configuration.recipe_names():
        config = configuration.load(name)
        for world in (1, 2, 4) if name not in WORLDS else (WORLDS[name],):
            configuration.check_world(config, layout_for(config, world, min(world, 8)))


def test_overrides_take_their_keys_type():
    config = configuration.load(
        "demo", ["optim.lr=1e-3", "data.shuffle=false", "name=123", "sample.prompt=a=b: c"]
    )
    assert config.optim.lr == 1e-3 and config.data.shuffle is False
    assert config.name == "123" and config.sample.prompt == "a=b: c"


def test_hash_follows_values():
    assert configuration.load("demo").hash() == configuration.load("demo").hash()
    assert configuration.load("demo").hash() != configuration.load("demo", ["seed=2"]).hash()


@pytest.mark.parametrize(
    "override, near",
    [("optim.lrr=1", "optim.lr"), ("train.lr=1", "optim.lr"), ("optm.lr=1", "optim.lr"), ("sede=1", "seed")],
)
def test_unknown_key_names_the_nearest(override, near):
    message = _fails(override)
    key = override.partition("=")[0]
    assert f"unknown key '{key}'" in message or "unknown key 'optm'" in message
    assert f"did you mean '{near}'" in message or "did you mean" in message


def test_unknown_key_without_a_near_one_lists_the_section():
    assert "valid here: path, vocab_size" in _fails("tokenizer.qqqqq=1").replace("tokenizer.", "")


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lr=fast", "optim.lr: Input should be a valid number"),
        ("train.precision=fp8", "train.precision: Input should be 'fp32', 'bf16', 'fp16' or 'fp64' (given: 'fp8')"),
        (
            "model.num_attention_heads=3",
            "hidden_size=128 is not an even multiple of num_attention_heads=3 (try 126)",
        ),
        ("task=dance", "unknown task 'dance' (valid: evaluate, finetune, pretrain)"),
        ("name=../x", "name: String should match pattern"),
        ("seed", "not of the form key=value"),
        ("seed.x=1", "seed is a value, not a section"),
    ],
)
def test_wrong_values(override, words):
    assert words in _fails(override)


DOCS = Path(__file__).parents[3] / "docs"
PAGES = ("trainer", "parallelism", "data", "checkpoints", "finetuning", "flags")


@pytest.mark.parametrize("page", PAGES)
def test_the_documents_name_only_keys_that_exist(page):
    sections = "|".join({key.partition(".")[0] for key in dict(configuration.keys()) if "." in key})
    text = re.sub(r"^```.*?^```", "", (DOCS / f"{page}.md").read_text(), flags=re.S | re.M)
    spans = re.findall(r"`([^`]+)`", text)
    named = {key for span in spans for key in re.findall(rf"(?<![\w/.])(?:{sections})\.[a-z_]+(?:\.[a-z_]+)?\b", span)}
    known = set(configuration.keys())
    files = {key for key in named if re.search(r"\.(py|yaml|md|json|safetensors)$", key)}
    assert [key for key in named - known - files if not any(name.startswith(f"{key}.") for name in known)] == []


def test_unknown_recipe():
    assert "did you mean 'demo'" in _fails(recipe="dmo")
    assert "does not exist" in _fails(recipe="no/such.yaml")


def test_broken_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [")
    assert str(path) in _fails(recipe=str(path))
    path.write_text("- 1")
    assert "mapping" in _fails(recipe=str(path))


def _refused(world: int, *overrides: str, local: int = 8) -> ConfigError:
    config = configuration.load("demo", overrides)
    with pytest.raises(ConfigError) as caught:
        configuration.check_world(config, layout_for(config, world, local))
    return caught.value


def test_global_batch_names_the_nearest_that_fit():
    wrong = ["train.global_batch=20", "train.micro_batch=4"]
    error = _refused(4, *wrong)
    assert "the nearest that fit: 16, 32" in error.message
    assert error.hint == "Set train.global_batch=32, or train.micro_batch=1."
    error = _refused(8, *wrong)
    assert "the nearest that fit: 32" in error.message
    assert error.hint == "Set train.global_batch=32."
    # ranks that share a row do not count
    config = configuration.load("demo", ["train.global_batch=4", "train.micro_batch=4", "parallel.tensor=2"])
    configuration.check_world(config, layout_for(config, 2, 2))


PIPELINE = ("parallel.pipeline=2", "model.tie_word_embeddings=false")


@pytest.mark.parametrize(
    ("world", "overrides", "message", "hint"),
    [
        (6, ["parallel.tensor=4"], "4 × 1 does not divide the 6 ranks", "1, 2, 3, 6"),
        (4, ["parallel.strategy=hybrid", "parallel.replicate=3"], "parallel.replicate=3", "1, 2, 4"),
        (4, ["parallel.tensor=4"], "does not divide model.num_key_value_heads=2", "divisor of 2"),
        (2, ["parallel.sequence=true"], "parallel.sequence needs", "parallel.tensor"),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "data.seq_len=127"], "seq_len=127", "data.seq_len=128"),
        (2, ["parallel.pipeline=2"], "tied embeddings", "model.tie_word_embeddings=false"),
        (4, [*PIPELINE, "parallel.strategy=full_shard"], "full_shard gathers", "shard_grad_op"),
        (4, ["parallel.pipeline=4", *PIPELINE[1:]], "cannot be cut into 4", "parallel.pipeline to at most 2"),
        (2, [*PIPELINE, "train.global_batch=4"], "at least 2 micro-batches", "train.global_batch=8"),
        (2, [*PIPELINE, "model.lora.rank=4"], "LoRA", "parallel.pipeline=1"),
        (2, [*PIPELINE, "parallel.schedule=zero_bubble", "model.num_hidden_layers=4", "train.compile=true"],
         "backward twice", "train.compile=false"),
        (2, [*PIPELINE, "parallel.schedule=zero_bubble", "train.activation_checkpoint=selective"],
         "backward twice", "train.activation_checkpoint=full"),
        (2, [*PIPELINE, "parallel.schedule=zero_bubble", "model.loss=chunked"], "backward twice", "model.loss=plain"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_work_name_the_key(world, overrides, message, hint):
    error = _refused(world, *overrides)
    assert message in error.message and hint in (error.hint or "")


def test_ranks_are_laid_out_with_tensor_innermost_and_stages_outermost():
    layout = Layout(pipeline=2, replicate=2, shard=3, tensor=2)
    seen = [(layout.pipeline_rank(r), layout.data_rank(r), layout.tensor_rank(r)) for r in range(layout.world)]
    assert seen == [(p, d, t) for p in range(2) for d in range(6) for t in range(2)]
    config = configuration.load("demo", ["parallel.strategy=hybrid", "parallel.tensor=2"])
    assert layout_for(config, 16, 8) == Layout(replicate=2, shard=4, tensor=2)  # shards within a node


def test_help_lists_every_key_with_its_default():
    text = build_parser().format_help()
    for key, (_, _default, _) in configuration.keys().items():
        assert key + "=" in text
    assert "optim.lr=0.001" in text and "train.precision=fp32" in text
    values = yaml.safe_load(configuration.Config().to_yaml())
    listed = set(configuration.keys())
    for section, inner in values.items():
        for key in inner if isinstance(inner, dict) else ():
            full = f"{section}.{key}"
            assert full in listed or any(name.startswith(f"{full}.") for name in listed)
