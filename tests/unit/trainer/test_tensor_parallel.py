"""What tensor parallelism refuses, and with which advice. That it computes the same is in tests/parity."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from trainer.config import validate
from trainer.distributed.tensor_parallel import check_tensor_parallel
from trainer.errors import ConfigError

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}


def _check(family: str = "llama", sizes: dict[str, int] | None = None, **sections: dict[str, object]) -> None:
    sections = {"parallel": {"tensor": 4}, "data": {"seq_len": 32}} | sections
    check_tensor_parallel(AutoConfig.for_model(family, **SIZES | (sizes or {})), validate(sections, "test"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_families_with_a_plan_pass(family: str) -> None:
    _check(family, parallel={"tensor": 4, "sequence": True})


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"family": "gpt2"}, "parallel.tensor=4: .*'gpt2', only for llama, qwen2", "parallel.strategy=full_shard"),
        ({"sizes": {"num_key_value_heads": 6}}, "num_key_value_heads=6", "parallel.tensor to one of 1, 2, 3."),
        ({"sizes": {"num_attention_heads": 6, "num_key_value_heads": 4}}, "num_attention_heads=6", "one of 1, 2, 3."),
        ({"sizes": {"intermediate_size": 90}}, "intermediate_size=90", "one of 1, 2, 3."),
        ({"sizes": {"vocab_size": 90}}, "vocab_size=90", "one of 1, 2, 3, or model.vocab_size=92."),
        (
            {"parallel": {"tensor": 4, "sequence": True}, "data": {"seq_len": 30}},
            "data.seq_len=30",
            "Set data.seq_len=32.",
        ),
        ({"model": {"sparse": {"mask": "threshold"}}}, "model.sparse.mask", "leave model.sparse.mask"),
        ({"model": {"lora": {"rank": 8}}}, "model.lora.rank", "leave model.lora.rank"),
    ],
)
def test_refusals_name_what_to_change(given: dict, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        _check(**given)
    assert hint in (raised.value.hint or "")


def test_a_pretrained_vocabulary_is_not_asked_to_grow() -> None:
    with pytest.raises(ConfigError) as raised:
        _check(sizes={"vocab_size": 90}, model={"pretrained": "somewhere"})
    assert "model.vocab_size" not in (raised.value.hint or "")
