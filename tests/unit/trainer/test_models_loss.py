"""The loss, recomputation and compilation: gradients as without them, less memory, and generation untouched."""

from __future__ import annotations

import copy
import gc
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import config as configuration
from trainer.errors import ConfigError
from trainer.models import build, loss, weights
from trainer.models.memory import apply_activation_checkpoint, compile_layers, decoder_layers

CPU = torch.device("cpu")
RECIPE = ["train.precision=fp64", "train.device=cpu", "data.seq_len=24", "model.num_hidden_layers=2"]


def _model(*overrides: str) -> torch.nn.Module:
    config = configuration.load("demo", [*RECIPE, *overrides])
    settings = build.model_config(config, vocab_size=300, bos_id=0, eos_id=1, pad_id=2)
    model = build.on_meta(config, settings, CPU)
    weights.initialise([model], build.on_meta(config, settings, CPU), config.seed, CPU)
    return model


def _batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[:, [3, 9, 23]] = loss.IGNORE
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def _gradients(model: torch.nn.Module, scale: float = 0.37) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value = model(**_batch())
    (value * scale).backward()
    return {"loss": value.detach()[None]} | {name: p.grad for name, p in model.named_parameters()}


def _close(mine: dict, reference: dict, bound: float) -> None:
    assert mine.keys() == reference.keys()
    for name, tensor in mine.items():
        error = (tensor.double() - reference[name].double()).norm() / reference[name].double().norm()
        assert error <= bound, (name, error)


def _reference(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """transformers' own logits, and the definition of cross-entropy."""
    batch = _batch()
    labels = batch.pop("labels").flatten()
    logits = type(model).forward(model, **batch).logits.flatten(0, 1)
    kept = labels != loss.IGNORE
    value = -logits.log_softmax(-1)[kept].gather(1, labels[kept][:, None]).sum()
    model.zero_grad()
    (value * 0.37).backward()
    return {"loss": value.detach()[None]} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["plain", "chunked"])
@pytest.mark.parametrize("overrides", [[], ["model.tie_word_embeddings=false"], ["model.architecture=gpt2"]])
def test_summed_loss_and_gradients(method, overrides, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 7)
    model = _model(f"model.loss={method}", *overrides).eval()  # GPT-2 has dropout
    assert model(**_batch()).dtype == torch.float64 and model(**_batch()).shape == ()
    _close(_gradients(model), _reference(model), 1e-12)


def _head(dtype: torch.dtype, rows: int = 512, width: int = 32, vocab: int = 5000, bias: bool = False):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(vocab, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, vocab, (1, rows), generator=generator)
    labels[0, ::5] = loss.IGNORE
    return hidden, weight, offset, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_in_each_precision(dtype, bias):
    """Against fp64 on the same rounded inputs; a sum that fp16 could not hold, and bf16 only to 1 in 256."""
    hidden, weight, offset, labels = _head(dtype, bias=bias)
    inputs = [x for x in (hidden, weight, offset) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rows = F.linear(exact[0][0], exact[1], exact[2] if bias else None)
    reference = F.cross_entropy(rows, labels[0], ignore_index=loss.IGNORE, reduction="sum")
    value = loss.chunked_loss(hidden, weight, offset, labels, chunk=100)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-3)
    assert value.item() == pytest.approx(reference.item(), rel=bound)
    wanted = torch.autograd.grad(reference * 0.01, exact)
    found = torch.autograd.grad(value * 0.01, inputs)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for mine, other, source in zip(found, wanted, inputs, strict=True):
        assert mine.dtype == source.dtype
        assert (mine.double() - other).norm() / other.norm() <= bound


def test_torchs_own_chunked_loss_is_not_good_enough():
    """Why loss.py has its own; if this fails, torch's linear_cross_entropy may have been mended: use it."""
    hidden, weight, _, labels = _head(torch.float16, rows=8192)
    options = torch.nn.LinearCrossEntropyOptions()
    with torch.no_grad():
        arguments = {"ignore_index": loss.IGNORE, "reduction": "sum", "options": options}
        theirs = F.linear_cross_entropy(hidden[0] * 4, weight, labels[0], **arguments)
        mine = loss.chunked_loss(hidden * 4, weight, None, labels)
    assert theirs.isinf() and mine.isfinite() and mine > 65504


def test_autocast():
    """Matrix products in bf16, loss and the weight's gradient in fp32."""
    model = _model("model.loss=chunked", "train.precision=fp32")
    exact = _gradients(model)
    exact = {name: tensor.clone() for name, tensor in exact.items()}
    with torch.autocast("cpu", torch.bfloat16):
        half = _gradients(model)
        plain = _gradients(_model("model.loss=plain", "train.precision=fp32"))
    assert half["loss"].dtype == torch.float32 and not torch.equal(half["loss"], exact["loss"])
    assert half["model.embed_tokens.weight"].dtype == torch.float32
    _close(half, exact, 0.03)
    _close(half, plain, 0.03)


def test_chunked_loss_only_computes_what_is_wanted(monkeypatch):
    hidden, weight, _, labels = _head(torch.float32)
    weight.requires_grad_(False)
    monkeypatch.setattr(torch, "zeros_like", None)  # what the weight's gradient would be made of
    loss.chunked_loss(hidden, weight, None, labels).backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not loss.chunked_loss(hidden, weight, None, labels).requires_grad


class _Watch(TorchDispatchMode):
    """The most bytes in one tensor that any operation gave, and how often each operation was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.counts[str(function)] += 1
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.peak = max(self.peak, one.numel() * one.element_size())
        return result


def test_chunked_loss_never_has_all_logits():
    hidden, weight, _, labels = _head(torch.float32, rows=4096)
    logits = 4096 * 5000 * 4
    with _Watch() as chunked:
        loss.chunked_loss(hidden, weight, None, labels, chunk=256).backward()
    assert chunked.peak == logits / 16
    with _Watch() as plain:
        loss.summed_loss(F.linear(hidden, weight), labels).backward()
    assert plain.peak == logits


def test_generation_saving_and_copies_are_as_before(tmp_path):
    model = _model("model.loss=chunked").eval()
    batch = _batch()
    labels = batch.pop("labels")
    assert torch.equal(model(**batch).logits, type(model).forward(model, **batch).logits)
    made = model.generate(input_ids=batch["input_ids"][:, :5], max_new_tokens=6, do_sample=False)
    assert made.shape[1] > 5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()
        assert other(**batch, labels=labels) != model(**batch, labels=labels)  # each its own weights


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("change", ["full", "selective", "compiled", "selective compiled"])
def test_recomputation_and_compilation_leave_gradients(change, architecture):
    overrides = [f"model.architecture={architecture}"]
    if architecture == "gpt2":
        overrides.append("model.extra={attn_pdrop: 0, resid_pdrop: 0, embd_pdrop: 0}")
    plain, model = _model(*overrides), _model(*overrides)
    mode = change.removesuffix("compiled").strip() or "none"
    apply_activation_checkpoint(model, mode)
    if change.endswith("compiled"):
        compile_layers(model, "aot_eager")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    _close(_gradients(model), _gradients(plain), 1e-12)


def _kept(mode: str) -> int:
    """Bytes that autograd keeps for the backward pass."""
    model = _model("data.seq_len=24", "model.num_hidden_layers=4")
    apply_activation_checkpoint(model, mode)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = model(**_batch())
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del value
    gc.collect()
    return sum(size for pointer, size in seen.items() if pointer not in parameters)


def test_recomputation_saves_memory():
    assert _kept("full") < 0.3 * _kept("none")


def test_selective_recomputes_no_matrix_product():
    """full computes the layers' matrix products and attention once more, selective only what is cheap."""
    counts = {}
    for mode in ("none", "selective", "full"):
        model = _model()
        apply_activation_checkpoint(model, mode)
        with _Watch() as watch:
            model(**_batch()).backward()
        counts[mode] = watch.counts
    attention = next(name for name in counts["none"] if "scaled_dot_product" in name and "backward" not in name)
    for name in ("aten.mm.default", attention):
        assert counts["selective"][name] == counts["none"][name] < counts["full"][name]
    assert counts["selective"]["aten.silu.default"] == 2 * counts["none"]["aten.silu.default"]


def test_decoder_layers():
    assert [name for name, _ in decoder_layers(_model())] == ["model.layers.0", "model.layers.1"]
    assert [name for name, _ in decoder_layers(_model("model.architecture=gpt2"))] == [
        "transformer.h.0",
        "transformer.h.1",
    ]
    with pytest.raises(ConfigError, match="no decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ([], "cuda", "chunked"),
        ([], "cpu", "plain"),
        (["parallel.tensor=2"], "cuda", "plain"),
        (["model.architecture=gemma2"], "cuda", "plain"),
        (["model.loss=chunked"], "cpu", "chunked"),
    ],
)
def test_auto_loss(overrides, device, expected):
    config = configuration.load("demo", overrides)
    settings = build.model_config(config, vocab_size=300, bos_id=0, eos_id=1, pad_id=2)
    model = build.on_meta(configuration.load("demo", ["model.loss=plain"]), settings, CPU)
    assert loss.loss_method(config, model, torch.device(device)) == expected


def test_chunked_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"changes its logits \(final_logit_softcapping\)"):
        _model("model.loss=chunked", "model.architecture=gemma2")
    with pytest.raises(ConfigError, match=r"with parallel\.tensor"):
        _model("model.loss=chunked", "parallel.tensor=2")


def test_two_ranks_with_fsdp2(ranks, tmp_path):
    """Loss in the root's group, in a group of its own, recomputed, compiled; LoRA under FSDP2 and DDP."""
    out = tmp_path / "out"
    result = ranks("models_loss", 2, argv=[str(out), *RECIPE])
    assert result.exit_codes == [0, 0], result.output
    saved = [torch.load(f"{out}.{rank}") for rank in range(2)]

    def reference(*overrides: str) -> dict[str, torch.Tensor]:
        model = _model(*overrides)
        batch = _batch() | {"labels": _batch()["input_ids"].roll(-1, 1)}
        (model(**batch) / 2).backward()  # FSDP2 and DDP average over ranks
        return {name: p.grad for name, p in model.named_parameters()}

    tied, untied = reference(), reference("model.tie_word_embeddings=false")
    for mine in saved:
        for name in ("plain", "chunked", "full", "selective"):
            _close(mine[name], tied, 1e-10)
        _close(mine["own_group"], untied, 1e-10)
        adapters = [name for name in mine["lora"] if ".lora_" in name]
        assert len(adapters) == 2 * 7 * 2 and len(mine["lora"]) == len(adapters) + 1
        sharded, replicated = mine["lora"], mine["lora_ddp"]
        assert all(torch.equal(sharded["state"][key], value) for key, value in replicated["state"].items())
        _close({n: sharded[n] for n in adapters}, {n: replicated[n] for n in adapters}, 1e-10)
