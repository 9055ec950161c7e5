"""From the recipe to a transformers configuration and a model without weights; the hub's folder; adapters."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading

import pytest
import torch
from huggingface_hub.utils import reset_sessions
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import config as configuration
from trainer.errors import ConfigError, DataError, DeadlineError
from trainer.models import build, download, lora, weights
from trainer.models.merge import merge

CPU = torch.device("cpu")


def _settings(*overrides: str, vocab_size: int = 300, pretrained=None):
    config = configuration.load("demo", ["train.device=cpu", *overrides])
    return build.model_config(config, vocab_size=vocab_size, bos_id=0, eos_id=1, pad_id=2, pretrained=pretrained)


def _model(*overrides: str, adapters: bool = False) -> torch.nn.Module:
    config = configuration.load("demo", ["train.device=cpu", *overrides])
    models = [build.on_meta(config, _settings(*overrides), CPU) for _ in range(2)]
    for model in models if adapters else ():
        lora.apply_lora(model, config)
    weights.initialise([models[0]], models[1], 0, CPU)
    return models[0]


SIZES = [
    "model.hidden_size=64",
    "model.intermediate_size=80",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.seq_len=48",
]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "olmo2", "phi3"])
def test_sizes_reach_the_model(architecture):
    model = _model(f"model.architecture={architecture}", *SIZES)
    settings = model.config
    assert settings.model_type == architecture
    assert (settings.hidden_size, settings.num_hidden_layers, settings.num_attention_heads) == (64, 3, 4)
    assert (settings.max_position_embeddings, settings.vocab_size, settings.use_cache) == (48, 300, False)
    assert model.get_input_embeddings().weight.shape == (300, 64)
    assert any(parameter.shape in ((80, 64), (64, 80), (160, 64)) for parameter in model.parameters())
    keys = [p.shape[0] for name, p in model.named_parameters() if name.endswith("k_proj.weight")]
    assert all(rows == 2 * 16 for rows in keys)
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert build.count_parameters(model) == AutoModelForCausalLM.from_config(settings).num_parameters()


def test_vocabulary_and_extra():
    settings = _settings("model.vocab_size=512", "model.extra={rope_theta: 500000.0, max_position_embeddings: 4096}")
    assert (settings.vocab_size, settings.rope_theta, settings.max_position_embeddings) == (512, 5e5, 4096)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.architecture=lama"], r"no causal language model of type 'lama'; did you mean 'llama'\?"),
        (["model.architecture=t5"], "no causal language model of type 't5'"),
        (["model.extra={rope_tetha: 1}"], r"LlamaConfig has no key 'rope_tetha'; did you mean 'rope_theta'\?"),
        (["model.vocab_size=299"], "the tokenizer has 300 ids, the model's embedding 299 rows"),
        (
            ["data.seq_len=64", "model.extra={max_position_embeddings: 32}"],
            "data.seq_len=64 is more than the model's 32",
        ),
        (["parallel.tensor=4"], "parallel.tensor=4 does not divide the model's 2 heads"),
        (["parallel.pipeline=2"], "ties its embeddings"),
        (["parallel.pipeline=9", "model.tie_word_embeddings=false"], "layers cannot be cut into parallel.pipeline=9"),
    ],
)
def test_what_cannot_be_built_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        _settings(*overrides)


def test_packed_documents_need_an_architecture_that_keeps_them_apart():
    with pytest.raises(ConfigError, match="OPTForCausalLM of transformers cannot keep packed documents apart"):
        _model("model.architecture=opt")
    assert _model("model.architecture=opt", "data.cross_document=true").config.model_type == "opt"


@pytest.fixture
def base(tmp_path):
    """A small Llama, saved by transformers with another number of heads than the recipe's."""
    settings = _settings(*SIZES, "model.num_key_value_heads=4", "model.tie_word_embeddings=false")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_pretrained_sizes_come_from_the_folder(base):
    settings = _settings("data.seq_len=32", "model.extra={attention_dropout: 0.25}", pretrained=base)
    assert (settings.hidden_size, settings.num_key_value_heads, settings.tie_word_embeddings) == (64, 4, False)
    assert (settings.max_position_embeddings, settings.attention_dropout, settings.use_cache) == (48, 0.25, False)
    for overrides, message in [
        (["data.seq_len=64"], "data.seq_len=64 is more than the model's 48 positions"),
        (["data.seq_len=32", "parallel.tensor=3"], "does not divide the model's 4 heads"),
    ]:
        with pytest.raises(ConfigError, match=message):
            _settings(*overrides, pretrained=base)
    with pytest.raises(ConfigError, match="the tokenizer has 301 ids"):
        _settings("data.seq_len=32", vocab_size=301, pretrained=base)
    (base / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match=r"config\.json\): transformers has no causal language model of type 't5'"):
        _settings(pretrained=base)
    (base / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.pretrained"):
        _settings(pretrained=base)


LORA = ["model.lora.rank=4", "model.lora.alpha=8", "model.lora.targets=[q_proj, up_proj]"]


def _adapted(base) -> torch.nn.Module:
    config = configuration.load("demo", ["train.device=cpu", "data.seq_len=32", *LORA])
    settings = _settings("data.seq_len=32", *LORA, pretrained=base)
    model, plan = (build.on_meta(config, settings, CPU) for _ in range(2))
    for one in (model, plan):
        lora.apply_lora(one, config)
    weights.load_pretrained([model], plan, base, 0, CPU)
    return model


def _save(folder, model, config, base) -> None:
    folder.mkdir()
    save_file(lora.adapter_state(model.named_parameters()), folder / "adapter_model.safetensors")
    lora.adapter_of(config, model.config, base).write_settings(folder)


def test_adapter_starts_as_pefts_and_the_base_is_frozen(base):
    model = _adapted(base)
    plain = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.weight"):
            assert parameter.requires_grad and not parameter.any()
        elif name.endswith("lora_A.default.weight"):  # kaiming_uniform_(a=√5): up to 1/√(inputs)
            limit = parameter.shape[1] ** -0.5
            assert parameter.requires_grad and 0.9 * limit < parameter.abs().max() <= limit
        else:
            assert not parameter.requires_grad
            assert torch.equal(parameter, plain[weights.plain_name(name)])
    assert sum(lora.is_adapter(name) for name, _ in model.named_parameters()) == 3 * 2 * 2


def test_adapter_opens_in_peft_and_merges(base, tmp_path):
    model = _adapted(base).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if lora.is_adapter(name):
                parameter.normal_(std=0.2)
    config = configuration.load("demo", LORA)
    _save(tmp_path / "adapter", model, config, base)
    tokens = torch.randint(0, 300, (2, 12))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        mine, before = model(tokens).logits, plain(tokens).logits
        opened = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        theirs = opened(tokens).logits
        assert torch.allclose(mine, theirs, atol=1e-6) and not torch.allclose(mine, before, atol=1e-2)
        opened.save_pretrained(tmp_path / "again")
        one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        merge(base, tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
    assert torch.allclose(mine, merged, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "full_shard")])
def test_frozen_matrices_in_low_precision_change_no_number(world, strategy, precision, ranks, tmp_path):
    """Two steps and an evaluation: bit for bit those of a base held in fp32, in half of its memory."""
    overrides = ["train.device=cpu", "data.seq_len=24", "model.num_hidden_layers=2", "model.lora.rank=4"]
    overrides += ["model.tie_word_embeddings=false", f"train.precision={precision}", f"parallel.strategy={strategy}"]
    result = ranks("lora_precision", world, argv=[str(tmp_path / "out"), *overrides])
    assert result.exit_codes == [0] * world, result.output
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for rank in range(world):
        held, wide = torch.load(tmp_path / f"out.{rank}", weights_only=False)
        kinds = held.pop("held")
        assert set(wide.pop("held").values()) == {torch.float32}
        for name, dtype in kinds.items():
            matrix = name.endswith(".base_layer.weight") or name == "lm_head.weight"
            assert (name, dtype) == (name, low if matrix else torch.float32)
        assert sum(dtype == low for dtype in kinds.values()) == 2 * 7 + 1
        assert held.keys() == wide.keys() and all(torch.equal(held[name], wide[name]) for name in wide)
        assert held["loss 0"] != held["loss 1"]
        assert all(held[f"0 {name}"].any() for name in kinds if lora.is_adapter(name))


def test_target_that_is_not_there():
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layer 'q_proj'") as caught:
        _model("model.architecture=gpt2", "model.lora.rank=2", adapters=True)
    assert "c_attn" in str(caught.value.hint)
    model = _model("model.architecture=gpt2", "model.lora.rank=2", "model.lora.targets=[c_attn]", adapters=True)
    assert model.transformer.h[0].attn.c_attn.lora_A["default"].weight.shape == (2, 128)


class _Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub, served from `files`."""

    files: dict[str, bytes]
    requests: list[str]
    broken = False
    sha = "a" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/me/tiny/revision/") or self.path == "/api/models/me/tiny":
            listing = [{"rfilename": name} for name in self.files]
            self._send(json.dumps({"id": "me/tiny", "sha": self.sha, "siblings": listing}).encode())
        elif self.path.startswith(f"/me/tiny/resolve/{self.sha}/"):
            body = self.files[self.path.rpartition("/")[2]]
            if self.broken and self.path.endswith(".safetensors"):
                self.send_error(403)
                return
            self._send(body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": self.sha})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def _send(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


UNWANTED = {"pytorch_model.bin", "x.py", "consolidated.safetensors", "original/params.json"}


@pytest.fixture
def hub(base, monkeypatch):
    """A hub on this machine with the repository me/tiny."""
    _Hub.files = {path.name: path.read_bytes() for path in base.iterdir()} | dict.fromkeys(UNWANTED, b"no")
    _Hub.requests, _Hub.broken = [], False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    template = here + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    _set_offline(monkeypatch, False)
    yield _Hub
    server.shutdown()
    server.server_close()


def _set_offline(monkeypatch, offline: bool) -> None:
    """A session of the client is on or off for good, and a new thread may have an old one's number, so its session."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    reset_sessions()


def _fetch(cache, name="me/tiny", *, leader=True, timeout=5.0, said=None):
    said = [] if said is None else said
    return download.fetch(name, None, cache, leader=leader, timeout=timeout, say=said.append)


def test_download_once_and_only_safe_files(hub, tmp_path):
    said: list[str] = []
    folder = _fetch(tmp_path, said=said)
    assert {path.name for path in folder.iterdir()} == set(hub.files) - UNWANTED
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64
    assert said == [f"downloading me/tiny to {tmp_path / 'hub'}"]
    hub.requests.clear()
    assert _fetch(tmp_path) == folder == _fetch(tmp_path, leader=False)
    assert hub.requests == []  # so it also works without network


def test_partial_download_is_not_taken_for_a_whole_one(hub, tmp_path, monkeypatch):
    hub.broken = True
    with pytest.raises(DataError, match="cannot be downloaded: 403 Forbidden"):
        _fetch(tmp_path)
    assert list((tmp_path / "hub").rglob("config.json"))  # some of it is there
    _set_offline(monkeypatch, True)
    with pytest.raises(DataError, match=r"cannot be downloaded: .*offline mode is enabled"):
        _fetch(tmp_path)
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for the node's rank 0 to download me/tiny"):
        _fetch(tmp_path, leader=False, timeout=0.1)
    _set_offline(monkeypatch, False)
    hub.broken = False
    assert (_fetch(tmp_path) / weights.SINGLE).is_file()


def test_others_wait_with_a_word_until_it_is_there(hub, tmp_path):
    said: list[str] = []
    found = []
    waiter = threading.Thread(target=lambda: found.append(_fetch(tmp_path, leader=False, timeout=30, said=said)))
    waiter.start()
    while not said:
        pass
    folder = _fetch(tmp_path)
    waiter.join(10)
    assert found == [folder] and said == ["waiting for the node's rank 0 to download me/tiny"]


def test_unknown_names(hub, tmp_path):
    with pytest.raises(ConfigError, match="me/other is neither a local folder nor on the hub"):
        _fetch(tmp_path, "me/other")
    with pytest.raises(ConfigError, match=r"the folder \./nowhere does not exist"):
        _fetch(tmp_path, "./nowhere")


def test_local_folder_is_used_as_it_is(base, tmp_path):
    assert _fetch(tmp_path / "cache", str(base), leader=False) == base
    assert not (tmp_path / "cache").exists()


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _set_offline(monkeypatch, True)
    with pytest.raises(DataError, match="cannot be downloaded: HF_HUB_OFFLINE is set") as caught:
        _fetch(tmp_path)
    assert "give that folder instead" in str(caught.value.hint)


def test_lock_is_waited_for_with_a_deadline(tmp_path):
    from trainer.locks import locked

    said: list[str] = []
    with locked(tmp_path / "x.lock", 1, said.append, "nobody"):
        second = locked(tmp_path / "x.lock", 0.1, said.append, "another run")
        with pytest.raises(DeadlineError, match=r"waited 0\.1 s for another run"), second:
            pass
        assert said == ["waiting for another run"]
    with locked(tmp_path / "x.lock", 0.1, said.append, "nobody"):
        pass
    assert said == ["waiting for another run"]


def test_merge_brings_a_tokenizer_along(base, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))).save_pretrained(base)
    model = _adapted(base)
    config = configuration.load("demo", LORA)
    _save(tmp_path / "a", model, config, base)
    merge(base, tmp_path / "a", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == [0]
