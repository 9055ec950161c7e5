"""Documents of a packed row do not see one another, whatever computes attention; and it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trainer import config as configuration
from trainer.errors import ConfigError
from trainer.models import attention, build, weights
from trainer.models.memory import apply_activation_checkpoint, compile_layers

CPU = torch.device("cpu")
LENGTHS = [(7, 1, 12, 4), (24,)]
"""Documents of two rows of 24 tokens."""


def _model(name: str, *overrides: str) -> torch.nn.Module:
    recipe = [
        f"model.attention={name}",
        "train.precision=fp64",
        "train.device=cpu",
        "data.seq_len=24",
        "model.num_hidden_layers=2",
        *overrides,
    ]
    config = configuration.load("demo", recipe)
    settings = build.model_config(config, vocab_size=300, bos_id=0, eos_id=1, pad_id=2)
    model = build.on_meta(config, settings, CPU)
    weights.initialise([model], build.on_meta(config, settings, CPU), 3, CPU)
    return model


def _positions(together: bool = False) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in ([24] if together else row)]) for row in LENGTHS])


def _tokens() -> torch.Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def _logits(model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, position_ids=positions).logits


ARCHITECTURES = ["llama", "gpt2", "qwen3", "mistral"]


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_documents_do_not_see_each_other(name, architecture):
    extra = ["model.extra={attn_pdrop: 0}"] if architecture == "gpt2" else []
    model = _model(name, f"model.architecture={architecture}", *extra).eval()
    tokens = _tokens()
    other = tokens.clone()
    other[0, :7] = (tokens[0, :7] + 11) % 300  # another first document
    rest = slice(7, None)
    with torch.no_grad():
        apart = _logits(model, tokens, _positions())
        changed = _logits(model, other, _positions())
        assert (apart[0, rest] - changed[0, rest]).abs().max() == 0.0
        assert (apart[0, :7] - changed[0, :7]).abs().amax(dim=1).min() > 0.0
        # data.cross_document: positions run on
        seen = _logits(model, tokens, _positions(together=True)), _logits(model, other, _positions(together=True))
        assert (seen[0][0, rest] - seen[1][0, rest]).abs().max() > 0.0
        # and each document alone gives the same
        begin = 0
        for size in LENGTHS[0]:
            alone = _logits(model, tokens[:1, begin : begin + size], torch.arange(size)[None])
            assert (alone[0] - apart[0, begin : begin + size]).abs().max() < 1e-5
            begin += size


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_back_ends_agree(heads):
    """Logits and gradients, with grouped queries; eager only to fp32, in which transformers takes its softmax."""
    results = {}
    for name in ("eager", "sdpa", "varlen"):
        model = _model(name, f"model.num_key_value_heads={heads}")
        loss = model(input_ids=_tokens(), position_ids=_positions(), labels=_tokens())
        loss.backward()
        results[name] = [loss.detach()[None], *(p.grad for p in model.parameters())]
    for name, bound in (("varlen", 1e-12), ("eager", 1e-5)):
        for mine, reference in zip(results[name], results["sdpa"], strict=True):
            assert (mine - reference).norm() / reference.norm() <= bound


def test_sliding_window():
    """Mistral's: a token sees itself and the window − 1 before it, in its own document."""
    overrides = ["model.architecture=mistral", "model.extra={sliding_window: 5}"]
    logits = {}
    for name in ("sdpa", "varlen"):
        with torch.no_grad():
            logits[name] = _logits(_model(name, *overrides), _tokens(), _positions())
    assert (logits["sdpa"] - logits["varlen"]).abs().max() <= 1e-12
    with torch.no_grad():
        wide = _logits(_model("varlen", "model.architecture=mistral"), _tokens(), _positions())
    assert (wide - logits["varlen"]).abs().max() > 1e-6


@pytest.mark.parametrize("window", [None, 5])
def test_rows_whose_documents_see_one_another_are_causal_without_lengths(window, monkeypatch):
    """No lengths are made for them, and no dense mask but for a window narrower than the row."""
    monkeypatch.setattr(attention, "document_lengths", lambda ids: pytest.fail("lengths of a plain row"))
    mask, made = attention.sdpa_mask, []
    monkeypatch.setattr(attention, "sdpa_mask", lambda *args, **more: made.append(1) or mask(*args, **more))
    overrides = ["model.architecture=mistral", "data.cross_document=true"]
    overrides.append(f"model.extra={{sliding_window: {window or 'null'}}}")
    plain = torch.arange(_tokens().shape[1]).expand_as(_tokens())
    with torch.no_grad():
        ours, truth = (_logits(_model(name, *overrides), _tokens(), plain) for name in ("varlen", "eager"))
    assert (ours - truth).abs().max() <= 1e-5
    assert bool(made) == bool(window)


def test_lengths_are_computed_once_and_survive_recomputation_and_compilation(monkeypatch):
    calls = []
    plain = attention.document_lengths
    monkeypatch.setattr(attention, "document_lengths", lambda ids: calls.append(1) or plain(ids))
    gradients = []
    for change in ("none", "full", "selective", "compile"):
        model = _model("varlen")
        if change == "compile":
            compile_layers(model, "aot_eager")
        else:
            apply_activation_checkpoint(model, change)
        calls.clear()
        model(input_ids=_tokens(), position_ids=_positions(), labels=_tokens()).backward()
        assert len(calls) == 1
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for mine, reference in zip(other, gradients[0], strict=True):
            assert (mine - reference).norm() / reference.norm() <= 1e-12


def test_document_lengths():
    found = attention.document_lengths(_positions())
    assert found["cu_seq_lens_q"].tolist() == [0, 7, 8, 20, 24, 48]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == 24  # the next power of two is more than a row
    assert attention.document_lengths(_positions()[:1])["max_length_q"] == 16
    assert attention.document_lengths(_positions(together=True))["cu_seq_lens_q"].tolist() == [0, 24, 48]


def test_kernel_gets_what_it_documents(monkeypatch):
    """What is handed to torch's CUDA kernel, here replaced by its definition in plain SDPA over shapes (T, H, D)."""
    handed = {}

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        handed.update(window=window_size, gqa=enable_gqa, shapes=(query.shape, key.shape), longest=(max_q, max_k))
        assert torch.equal(cu_q, cu_k)
        pieces = []
        for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            assert b - a <= max_q
            q, k, v = (x[a:b].transpose(0, 1)[None].float() for x in (query, key, value))
            pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa))
        return torch.cat([piece[0].transpose(0, 1) for piece in pieces]).to(query.dtype)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    tokens, positions = _tokens(), _positions()
    with torch.no_grad():
        mine = _logits(_model("varlen"), tokens, positions)
        monkeypatch.undo()
        reference = _logits(_model("sdpa"), tokens, positions)
    assert (mine - reference).abs().max() < 1e-5
    assert handed == {
        "window": (-1, 0),
        "gqa": True,
        "shapes": (torch.Size([48, 4, 32]), torch.Size([48, 2, 32])),
        "longest": (24, 24),
    }


def test_generation_is_that_of_sdpa():
    """With a cache, and with padding on the left: no document lengths then, but SDPA's masks."""
    made = []
    for name in ("sdpa", "varlen"):
        model = _model(name, "data.seq_len=64").eval()
        tokens, mask = _tokens()[:, :10], torch.ones(2, 10, dtype=torch.long)
        mask[1, :4] = 0
        made.append(
            model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
            )
        )
    assert made[0].shape == (2, 22)
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        (["train.precision=bf16"], "cuda", "varlen"),
        (["train.precision=fp32"], "cuda", "sdpa"),
        (["train.precision=fp32"], "cpu", "varlen"),
        (["train.precision=bf16", "model.architecture=gpt2"], "cuda", "sdpa"),  # its attention has dropout
        (["train.precision=bf16", "model.extra={head_dim: 20}"], "cuda", "sdpa"),
    ],
)
def test_auto(overrides, device, expected):
    config = configuration.load("demo", overrides)
    settings = build.model_config(config, vocab_size=300, bos_id=0, eos_id=1, pad_id=2)
    kind = build.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    assert attention.back_end(config, settings, kind, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (["model.attention=flash"], "cuda", "needs the package flash-attn"),
        (["model.attention=varlen", "train.precision=fp32"], "cuda", "half precision, not fp32"),
        (["model.attention=varlen", "model.architecture=gpt2"], "cpu", "attn_pdrop is 0.1"),
    ],
)
def test_what_cannot_be_had_is_refused(overrides, device, message):
    config = configuration.load("demo", overrides)
    settings = build.model_config(config, vocab_size=300, bos_id=0, eos_id=1, pad_id=2)
    kind = build.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    with pytest.raises(ConfigError, match=message):
        attention.back_end(config, settings, kind, torch.device(device))
