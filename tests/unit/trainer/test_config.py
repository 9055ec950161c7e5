from __future__ import annotations

import pytest
import yaml

from trainer import config as configuration
from trainer.__main__ import build_parser
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
        assert config.check_world(1) and config.check_world(2) and config.check_world(4)


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
    assert "valid here: vocab_size" in _fails("tokenizer.qqqqq=1").replace("tokenizer.", "")


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lr=fast", "optim.lr: Input should be a valid number"),
        ("train.precision=fp8", "train.precision: Input should be 'fp32', 'bf16' or 'fp64' (given: 'fp8')"),
        (
            "model.num_attention_heads=3",
            "hidden_size=128 is not an even multiple of num_attention_heads=3 (try 126)",
        ),
        ("data.source=text_files", "text_files needs path"),
        ("task=dance", "unknown task 'dance' (valid: pretrain)"),
        ("name=../x", "name: String should match pattern"),
        ("seed", "not of the form key=value"),
        ("seed.x=1", "seed is a value, not a section"),
    ],
)
def test_wrong_values(override, words):
    assert words in _fails(override)


def test_unknown_recipe():
    assert "did you mean 'demo'" in _fails(recipe="dmo")
    assert "does not exist" in _fails(recipe="no/such.yaml")


def test_broken_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [")
    assert str(path) in _fails(recipe=str(path))
    path.write_text("- 1")
    assert "mapping" in _fails(recipe=str(path))


def test_global_batch_names_the_nearest_that_fit():
    config = configuration.load("demo", ["train.global_batch=20", "train.micro_batch=4"])
    with pytest.raises(ConfigError, match="the nearest that fit: 16, 32") as caught:
        config.check_world(4)
    assert caught.value.hint == "Set train.global_batch=32, or train.micro_batch=1."
    with pytest.raises(ConfigError, match="the nearest that fit: 32") as caught:
        config.check_world(8)
    assert caught.value.hint == "Set train.global_batch=32."


def test_help_lists_every_key_with_its_default():
    text = build_parser().format_help()
    for key, (_, _default, _) in configuration.keys().items():
        assert key + "=" in text
    assert "optim.lr=0.001" in text and "train.precision=fp32" in text
    values = yaml.safe_load(configuration.Config().to_yaml())
    assert {f"{s}.{k}" for s, v in values.items() if isinstance(v, dict) for k in v} <= set(
        configuration.keys()
    )
