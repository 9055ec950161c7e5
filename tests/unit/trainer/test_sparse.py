from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from trainer import config as configuration
from trainer.config import SparseConfig
from trainer.errors import ConfigError
from trainer.models.sparse import (
    BitLinear,
    LearnedMaskLinear,
    MaskedLinear,
    SparseController,
    apply_sparse,
    bake,
    check,
    initialize_masks,
    resolve,
    sparsity,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double()


def _config(mask: str, **values) -> SparseConfig:
    return SparseConfig(**{"mask": mask, "final_density": 0.3, "start_step": 0, "end_step": 10, **values})


def _ids() -> torch.Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(3))


def _loss(model: nn.Module) -> torch.Tensor:
    ids = _ids()
    return F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten(), reduction="sum")


def test_cubic_density_and_geometric_temperature():
    layer = MaskedLinear(4, 4)
    controller = SparseController(layer, _config("learned", final_density=0.2, start_step=10, end_step=30))
    seen = {}
    for step in (0, 10, 15, 20, 30, 99):
        controller.step(step)
        seen[step] = (layer.density, layer.temperature)
    assert seen[0] == seen[10] == (1.0, 1.0)
    assert seen[15] == pytest.approx((0.2 + 0.8 * 0.75**3, 0.1**0.25))
    assert seen[20] == pytest.approx((0.2 + 0.8 * 0.125, 0.1**0.5))
    assert seen[30] == seen[99] == pytest.approx((0.2, 0.1))
    SparseController(layer, _config("learned", start_step=5, end_step=5)).step(5)
    assert layer.density == pytest.approx(0.3)


@pytest.mark.parametrize("mask", ["threshold", "learned", "bitnet"])
def test_dense_is_bitwise_a_plain_model(mask):
    plain, sparse = _llama(), _llama()
    apply_sparse(sparse, _config(mask, start_step=5)).step(5 if mask != "bitnet" else 4)
    for model in (plain, sparse):
        _loss(model).backward()
    gradients = dict(sparse.named_parameters())
    assert torch.equal(plain(_ids()).logits, sparse(_ids()).logits)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
    assert sparsity(sparse) == 0 and sparsity(plain) is None


def test_threshold_keeps_the_largest_and_passes_every_gradient():
    torch.manual_seed(0)
    layer, x = MaskedLinear(10, 20), torch.randn(7, 10)
    SparseController(layer, _config("threshold")).step(10)
    output = layer(x)
    order = layer.weight.detach().abs().flatten().argsort(descending=True)
    masked = torch.zeros(200)
    masked[order[:60]] = layer.weight.detach().flatten()[order[:60]]
    assert torch.equal(output, F.linear(x, masked.view(20, 10), layer.bias))
    assert sparsity(layer) == pytest.approx(0.7)
    output.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * output.detach().T @ x)
    assert layer.weight.grad.flatten()[order[60:]].abs().min() > 0


def test_learned_mask_follows_its_logits_and_trains_them():
    torch.manual_seed(0)
    layer, x = LearnedMaskLinear(10, 20).double(), torch.randn(7, 10).double()
    controller = SparseController(layer, _config("learned", temperature=2.0, final_temperature=0.5))
    controller.step(10)
    layer(x)
    kept = layer.effective_weight() != 0
    order = layer.weight.detach().abs().flatten().argsort(descending=True)
    assert set(kept.flatten().nonzero().flatten().tolist()) == set(order[:60].tolist())  # equal logits: magnitude
    with torch.no_grad():
        layer.mask_logits.copy_(torch.randn(20, 10))
    controller.step(10)
    output = layer(x)
    logits = layer.mask_logits.detach()
    mask = logits >= logits.flatten().sort(descending=True).values[59]
    assert mask.sum() == 60
    assert torch.equal(output, F.linear(x, layer.weight * mask, layer.bias))
    upstream = torch.randn(7, 20).double()
    output.backward(upstream)
    # reference: autograd through w · sigmoid(logits / T), whose gradient the logits are to have
    soft = logits.clone().requires_grad_()
    (F.linear(x, layer.weight.detach() * torch.sigmoid(soft / 0.5)) * upstream).sum().backward()
    torch.testing.assert_close(layer.mask_logits.grad, soft.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x, rtol=1e-12, atol=1e-12)


def test_bitnet_equals_transformers():
    torch.manual_seed(0)
    mine, reference = BitLinear(10, 20, bias=False), AutoBitLinear(10, 20, bias=False, online_quant=True)
    reference.load_state_dict(mine.state_dict())
    SparseController(mine, _config("bitnet")).step(0)
    x, y = (torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    with torch.compiler.set_stance("force_eager"):
        expected = reference(y)
    output = mine(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    for one in (output, expected):
        one.square().sum().backward()
    torch.testing.assert_close(mine.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert sparsity(mine) == pytest.approx((mine.effective_weight() == 0).double().mean().item())
    assert 0.1 < sparsity(mine) < 0.6 and len(mine.effective_weight().unique()) == 3


def test_threshold_holds_for_a_step_and_is_fresh_in_evaluation():
    layer, x = MaskedLinear(8, 8), torch.randn(2, 8)
    controller = SparseController(layer, _config("threshold"))
    controller.step(10)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(1000)
    layer(x)
    assert (layer.effective_weight() != 0).sum() == 64  # the old threshold: one mask for all micro-batches
    layer.eval()
    assert (layer.effective_weight() != 0).sum() == 19 and sparsity(layer) == pytest.approx(0.7, abs=0.01)
    controller.step(10)
    assert (layer.effective_weight() != 0).sum() == 19


def test_layers_are_chosen_by_pattern_and_names_stay():
    plain, model = _llama(), _llama()
    apply_sparse(model, _config("threshold", exclude=["*q_proj"]))
    assert plain.state_dict().keys() == model.state_dict().keys()
    sparse = {name for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
    assert len(sparse) == 12 and not any("q_proj" in name or "lm_head" in name for name in sparse)
    with pytest.raises(ConfigError, match=r"model\.sparse\.include") as error:
        apply_sparse(_llama(), _config("threshold", include=["*.attn.*"]))
    assert "q_proj" in error.value.hint
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    with pytest.raises(ConfigError, match="matches none"):
        apply_sparse(gpt2, _config("threshold"))


@pytest.mark.parametrize("mask", ["threshold", "learned", "bitnet"])
def test_meta_device_checkpoint_and_export(mask, tmp_path):
    model = _llama()
    apply_sparse(model, _config(mask)).step(10)
    if mask == "learned":
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LearnedMaskLinear):
                    module.mask_logits.normal_()
    expected = model(_ids()).logits
    with torch.device("meta"):
        again = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    controller = apply_sparse(again, _config(mask))
    again.to_empty(device="cpu")
    initialize_masks(again)
    assert all((p == 3.0).all() for name, p in again.named_parameters() if name.endswith("mask_logits"))
    again.model.rotary_emb = model.model.rotary_emb
    assert again.load_state_dict(model.state_dict(), strict=True)
    controller.step(10)
    assert torch.equal(again(_ids()).logits, expected)

    bake(again)
    again.save_pretrained(tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    zeros = (loaded.model.layers[0].mlp.up_proj.weight == 0).double().mean().item()
    if mask == "bitnet":  # plain linear layers do not round activations to 8 bits
        assert ((loaded(_ids()).logits - expected).norm() / expected.norm()).item() < 0.02
        assert len(loaded.model.layers[0].mlp.up_proj.weight.unique()) == 3
    else:
        assert torch.equal(loaded(_ids()).logits, expected) and zeros == pytest.approx(0.7, abs=0.001)


@pytest.mark.parametrize("mask", ["threshold", "learned", "bitnet"])
def test_two_fsdp_ranks_equal_one_process(mask, ranks, tmp_path):
    model = _llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inverse = model.model.rotary_emb.inv_freq
    torch.save({"sizes": SIZES, "weights": weights, "ids": _ids(), "inv_freq": inverse}, tmp_path / "weights")
    result = ranks("sparse", 2, argv=[str(tmp_path / "out"), mask, str(tmp_path / "weights")])
    assert result.exit_codes == [0, 0], result.output
    apply_sparse(model, _config(mask)).step(5)
    _loss(model).backward()
    bake_expected = {n: m.effective_weight() for n, m in model.named_modules() if isinstance(m, MaskedLinear)}
    for rank in (0, 1):
        saved = torch.load(f"{tmp_path / 'out'}.{rank}")
        assert saved["gradients"].keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            error = (saved["gradients"][name] - parameter.grad).norm() / parameter.grad.norm()
            assert error <= 1e-10, (name, error)
        assert saved["sparsity"] == sparsity(model) > 0.2
        assert not any(name.endswith("mask_logits") for name in saved["baked"])
        for name, weight in bake_expected.items():
            assert torch.equal(saved["baked"][f"{name}.weight"], weight), name


@pytest.mark.parametrize("mask", ["threshold", "learned", "bitnet"])
def test_recomputed_and_compiled_layers_give_the_same_gradients(mask):
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for way in ("plain", "recomputed", "compiled"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh()).double()
        apply_sparse(model, _config(mask, include=["*"])).step(10)
        call = torch.compile(model, backend="aot_eager") if way == "compiled" else model
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
        output = checkpoint(model, x, use_reentrant=False) if way == "recomputed" else call(x)
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for mine, reference in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_training_learns_under_a_falling_density():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    controller = apply_sparse(model, _config("learned", include=["*"], final_density=0.2, start_step=20, end_step=200))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    target = torch.randn(16, 4)
    losses = []
    for step in range(300):
        controller.step(step)
        x = torch.randn(64, 16)
        loss = (model(x) - torch.tanh(x @ target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]


def test_controller_of_several_parts_and_from_a_file(tmp_path):
    file = tmp_path / "sparse.yaml"
    file.write_text("{mask: threshold, final_density: 0.25, end_step: 1, include: ['*']}")
    config = SparseConfig(file=str(file))
    parts = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
    for part in parts:
        apply_sparse(part, config)
    SparseController(parts, config).step(1)
    for part in parts:
        part(torch.ones(1, 4))
    assert sparsity(*parts) == 0.75


def test_file_of_settings(tmp_path):
    yaml_file, json_file = tmp_path / "sparse.yaml", tmp_path / "sparse.json"
    yaml_file.write_text("mask: threshold\nfinal_density: 0.25\n")
    json_file.write_text(json.dumps({"mask": "threshold", "final_density": 0.25}))
    for file in (yaml_file, json_file):
        got = resolve(SparseConfig(file=str(file)))
        assert (got.mask, got.final_density, got.file) == ("threshold", 0.25, None)
    yaml_file.write_text("mask: threshold\nfinal_densty: 0.25\n")
    with pytest.raises(ConfigError, match="unknown key 'final_densty'; did you mean 'final_density'"):
        resolve(SparseConfig(file=str(yaml_file)))
    yaml_file.write_text("final_density: 2\n")
    with pytest.raises(ConfigError, match="final_density"):
        resolve(SparseConfig(file=str(yaml_file)))
    with pytest.raises(ConfigError, match=r"model\.sparse\.file"):
        resolve(SparseConfig(file=str(tmp_path / "none")))


def test_layouts_that_cannot_work_are_refused():
    threshold = "model.sparse.mask=threshold"
    check(configuration.load("demo", [threshold]))
    check(configuration.load("demo", ["parallel.tensor=2"]))
    with pytest.raises(ConfigError, match=r"model\.sparse\.mask=threshold.*parallel\.tensor=2"):
        check(configuration.load("demo", [threshold, "parallel.tensor=2"]))
    with pytest.raises(ConfigError, match=r"model\.sparse\.end_step=3"):
        check(configuration.load("demo", [threshold, "model.sparse.start_step=5", "model.sparse.end_step=3"]))
    with pytest.raises(ConfigError, match=r"model\.lora\.rank"):
        check(configuration.load("demo", [threshold, "model.lora.rank=4"]))
