"""The task finetune as a user runs it, from a folder that transformers wrote to a folder that transformers opens.

The references are loops over single conversations with plain transformers, its rendering of the chat template, and
peft's own opening and merging of adapters.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from trainer import __main__ as command
from trainer.checkpoints import manifest
from trainer.config import DataConfig
from trainer.data import tokenizer
from trainer.data.documents import Document
from trainer.data.lanes import Listed
from trainer.data.packing import IGNORE, Cutter

COLOURS = "red blue green gold black white pink grey teal navy plum rust sand rose lime jade mint wine snow coal"
GUESTS = "fox owl bear cat dog swan seal bee wolf ant moth frog goose crow snail lynx ibex mouse koala eel"
CHATS = [
    [
        {"role": "user", "content": f"Who lives in the {colour} house?"},
        {"role": "assistant", "content": f"It is the {guest}, they say."},
    ]
    for colour, guest in zip(COLOURS.split(), GUESTS.split(), strict=True)
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS = [
    "data.seq_len=64",
    "data.holdout=0",
    "eval.every=0",
    "train.device=cpu",
    "train.precision=fp32",
    "train.steps=2",
    "train.global_batch=4",
    "train.micro_batch=2",
    "optim.warmup_steps=1",
    "checkpoint.every=0",
    "log.every=1",
    "log.tensorboard=false",
    "distributed.timeout=60",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`chat.jsonl`, `base` (fp32, no chat template) and `chatml` (bf16; a turn ends with a token that is not EOS)."""
    root = tmp_path_factory.mktemp("made")
    (root / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    words = [message["content"] for chat in CHATS for message in chat]
    tokenizer.save(tokenizer.train([*words, "user\nassistant\n"], 400), root / "base")
    plain = AutoTokenizer.from_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(
        vocab_size=410, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    plain.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    plain.chat_template = CHATML
    plain.save_pretrained(root / "chatml")
    model.to(torch.bfloat16).save_pretrained(root / "chatml")
    return root


@pytest.fixture
def tune(ranks, made, tmp_path) -> Callable:
    """`tune(name, *overrides, base=…, recipe=…, world=…)`: a fine-tuning run, and whether its exit code is `code`."""

    def run(name, *overrides, base="base", recipe="llama-8b-sft", world=1, script="cli", env=(), code=0):
        where = [f"model.pretrained={made / base}", f"data.path={made / 'chat.jsonl'}"]
        argv = ["run", "--config", recipe, *SETTINGS, *where, *overrides]
        result = ranks(script, world, argv=argv, env={"ORCH_RUN_DIR": str(tmp_path / name), **dict(env)})
        assert result.exit_codes == [code] * world, result.output
        return result.output[0]

    return run


def plain_loss(model, folder: Path, chats=CHATS) -> tuple[float, int]:
    """Mean cross-entropy of what the assistant says with its end-of-turn token, one conversation at a time."""
    plain = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for chat in chats:
        prompt = plain.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        whole = plain.apply_chat_template(chat, tokenize=False).rstrip("\n")
        assert whole.startswith(prompt)
        ids = plain(whole, add_special_tokens=False, return_tensors="pt").input_ids[0]
        begin = len(plain(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logits = model.eval()(ids[None]).logits[0].float()
        total += float(F.cross_entropy(logits[begin - 1 : -1], ids[begin:], reduction="sum"))
        count += len(ids) - begin
    return total / count, count


def final_eval(events, name):
    row = events(name, "eval")[-1]
    return row["loss"], row["tokens"]


@pytest.mark.parametrize("base", ["base", "chatml"])
def test_a_memorised_answer_comes_out_of_a_plain_pipeline(base, tune, made, events, tmp_path):
    """Template, targets, shift and export fit together: greedy generation answers what was learnt, and then stops."""
    train = ["train.steps=160", "train.global_batch=10", "train.micro_batch=10", "optim.lr=1e-2", "log.every=10"]
    tune("run", *train, base=base)
    assert events("run", "step")[-1]["loss"] < 0.02
    final = tmp_path / "run/checkpoints/final"
    generate = pipeline("text-generation", model=str(final), torch_dtype="auto")
    assert generate.model.dtype == (torch.float32 if base == "base" else torch.bfloat16)
    assert generate.model.config.use_cache
    for chat in CHATS[3::6]:
        (answer,) = generate(chat[:1], max_new_tokens=30, do_sample=False)
        assert answer["generated_text"][-1]["content"].strip() == chat[1]["content"]
    assert (generate.tokenizer.chat_template == CHATML) == (base == "chatml")


LAYOUTS = {
    "ddp": ["checkpoint.type=full"],
    "full_shard": ["parallel.strategy=full_shard", "checkpoint.type=shard"],
    "tensor": ["parallel.tensor=2", "parallel.strategy=ddp", "checkpoint.type=full"],
    "pipeline": ["parallel.pipeline=2", "parallel.strategy=ddp", "train.activation_checkpoint=none"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_ends_in_the_same_kind_of_folder(layout, tune, made, events, tmp_path):
    """What plain transformers opens has the loss that the run told for its last step, and the same tokens counted."""
    held_out = ["eval.source=chat", f"eval.path={made / 'chat.jsonl'}", "optim.lr=1e-2"]
    output = tune("run", *held_out, *LAYOUTS[layout], world=2)
    final = tmp_path / "run/checkpoints/final"
    assert f"the model is in {final}" in output
    model = AutoModelForCausalLM.from_pretrained(final)
    loss, count = plain_loss(model, final)
    told, tokens = final_eval(events, "run")
    assert (loss, count) == (pytest.approx(told, rel=1e-5), tokens)
    before, _ = plain_loss(AutoModelForCausalLM.from_pretrained(made / "base"), final)
    assert abs(loss - before) > 0.1
    manifest.verify(final)
    linked = "full" in LAYOUTS[layout][-1]  # the checkpoint of this step has the same file
    assert ((final / "model.safetensors").stat().st_nlink == 2) == linked
    assert (final / "model.safetensors").stat().st_mode & 0o044 == final.stat().st_mode & 0o044


def test_no_step_gives_the_base_back_bit_for_bit(tune, made, tmp_path):
    tune("run", "train.steps=0", "parallel.strategy=full_shard", "checkpoint.type=full", base="chatml", world=2)
    before, after = (load_file(f / "model.safetensors") for f in (made / "chatml", tmp_path / "run/checkpoints/final"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize("mask", ["threshold", "learned"])
def test_masks_are_in_the_weights_of_the_folder(mask, tune, made, events, tmp_path):
    sparse = [f"model.sparse.mask={mask}", "model.sparse.end_step=1", "model.sparse.final_density=0.25"]
    held_out = ["eval.source=chat", f"eval.path={made / 'chat.jsonl'}", "train.steps=3"]
    tune("run", *sparse, *held_out, "parallel.strategy=full_shard", world=2)
    final = tmp_path / "run/checkpoints/final"
    weights = load_file(final / "model.safetensors")
    assert weights.keys() == load_file(made / "base/model.safetensors").keys()
    masked = [weight for name, weight in weights.items() if "_proj" in name]
    assert len(masked) == 14
    assert all(weight.count_nonzero() == round(0.25 * weight.numel()) for weight in masked)
    assert weights["lm_head.weight"].all()
    assert plain_loss(AutoModelForCausalLM.from_pretrained(final), final)[0] == pytest.approx(
        final_eval(events, "run")[0], rel=1e-5
    )


def test_a_folder_that_cannot_be_written_leaves_the_old_one(tune, tmp_path):
    tune("run")
    final = tmp_path / "run/checkpoints/final"
    before = manifest.read(final)["save"]
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000002/training")  # so that nothing could be linked: start anew
    output = tune("run", "checkpoint.resume=none", "train.steps=0", script="full_disk", code=1)
    assert "error: the model could not be written to" in output and "File too large" in output
    assert manifest.verify(final)["save"] == before
    assert not list(final.parent.glob(".*"))


LORA = ["model.lora.rank=4", "model.lora.alpha=8", "model.lora.dropout=0.1", "optim.lr=2e-2", "train.steps=6"]


def _losses(events, name):
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"], row["tokens"]) for row in events(name, "step")}


@pytest.mark.parametrize("strategy, kind", [("ddp", "full"), ("full_shard", "full"), ("full_shard", "shard")])
def test_adapters_alone_are_saved_and_go_on_bit_for_bit(strategy, kind, tune, made, events, tmp_path):
    given = [*LORA, f"parallel.strategy={strategy}", f"checkpoint.type={kind}", "eval.source=chat"]
    given = [*given, f"eval.path={made / 'chat.jsonl'}"]
    tune("whole", *given, recipe="llama-8b-lora", world=2)
    stopped = {"script": "stop_after", "env": {"STOP_AFTER": "3"}, "code": 75}
    tune("part", *given, recipe="llama-8b-lora", world=2, **stopped)
    assert not (tmp_path / "part/checkpoints/final").exists()
    (tmp_path / "part/stop").unlink()
    shutil.copytree(tmp_path / "part", tmp_path / "one", ignore=shutil.ignore_patterns("events"))
    assert "resuming from step 3" in tune("part", *given, recipe="llama-8b-lora", world=2)
    assert _losses(events, "part") == _losses(events, "whole")
    assert final_eval(events, "part") == final_eval(events, "whole")
    if (strategy, kind) == ("full_shard", "full"):  # at another number of ranks: other random numbers, the same rows
        assert "resuming from step 3" in tune("one", *given, recipe="llama-8b-lora", world=1)
        rows = {step: row[3] for step, row in _losses(events, "one").items()}
        assert rows == {step: row[3] for step, row in _losses(events, "whole").items() if step > 3}
    _check_adapter(tmp_path / "whole/checkpoints/final", made, *final_eval(events, "whole"))
    if kind == "full":
        _check_saved(tmp_path / "whole/checkpoints/step_00000006", made, *final_eval(events, "whole"))


def _check_adapter(folder: Path, made: Path, told: float, tokens: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    before, _ = plain_loss(base, folder)
    loss, count = plain_loss(PeftModel.from_pretrained(base, folder), folder)
    assert (loss, count) == (pytest.approx(told, rel=1e-5), tokens) and loss < before - 0.1


def _check_saved(folder: Path, made: Path, told: float, tokens: int) -> None:
    """Nothing of the base is in it: neither weights nor moments."""
    _check_adapter(folder, made, told, tokens)
    adapters = load_file(folder / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 2 and all(".lora_" in name for name in adapters)
    moments = load_file(folder / "training/optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in adapters
    }
    weights = sum(tensor.numel() for tensor in adapters.values())
    assert sum(tensor.numel() for name, tensor in moments.items() if "exp_avg" in name) == 2 * weights
    assert [path.name for path in folder.rglob("*.safetensors") if path.name.startswith("model")] == []


@pytest.mark.parametrize("strategy", ["ddp", "full_shard"])
def test_low_precision_from_the_base_to_the_sample(strategy, tune, made, tmp_path):
    given = [*LORA, "train.precision=bf16", "sample.max_new_tokens=3", f"parallel.strategy={strategy}"]
    output = tune("low", *given, recipe="llama-8b-lora", world=2)
    assert "bf16" in output and "sample: " in output
    saved = load_file(tmp_path / "low/checkpoints/final/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


@pytest.fixture
def adapter(tune, made, tmp_path) -> Path:
    """Trained once for all tests."""
    if not (made / "lora").exists():
        tune("lora", *LORA, recipe="llama-8b-lora")
        (tmp_path / "lora").rename(made / "lora")
    shutil.copytree(made / "lora", tmp_path / "lora")
    return tmp_path / "lora/checkpoints/final"


@pytest.fixture
def other(made, tmp_path) -> Path:
    """The base with other values in one matrix."""
    folder = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(made / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.01
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(folder)
    return folder


def test_another_base_is_noticed(adapter, tune, other, made, tmp_path):
    output = tune("lora", *LORA, f"model.pretrained={other}", "train.steps=8", recipe="llama-8b-lora", code=1)
    assert "were trained on other base weights" in output and "Set model.pretrained" in output
    copy = tmp_path / "copy"  # the same weights in many files, somewhere else
    AutoModelForCausalLM.from_pretrained(made / "base").save_pretrained(copy, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(copy)
    output = tune("lora", *LORA, f"model.pretrained={copy}", "train.steps=8", recipe="llama-8b-lora")
    assert "resuming from step 6" in output


def test_merge(adapter, made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["merge", "--adapter", str(adapter), "--out", "merged"]) == 0
    assert "merged" in capsys.readouterr().out
    ids = torch.arange(40)[None]
    base = AutoModelForCausalLM.from_pretrained(made / "base").eval()
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
    assert torch.allclose(after, adapted, atol=1e-5) and not torch.allclose(after, before, atol=1e-2)
    assert AutoTokenizer.from_pretrained("merged").apply_chat_template(CHATS[0], tokenize=False).startswith("<s>User")
    assert sorted(path.name for path in Path("merged").glob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no adapter", "is no adapter: there is no adapter_config.json"),
        ("no weights", "there is no adapter_model.safetensors"),
        ("torn", "adapter_model.safetensors: "),
        ("other weights", "was trained on other weights than those in"),
        ("no base", "the folder ./nowhere does not exist"),
        ("not a model", "cannot be opened"),
        ("narrow", "for another model than"),
        ("short", "that has no layer 'model.layers.1."),
        ("deep", "it has no base_model.model.model.layers.2."),
        ("out", "is there already"),
    ],
)
def test_merge_says_what_is_wrong_in_one_line(wrong, message, adapter, other, made, tmp_path, capsys):
    given, base, out = tmp_path / "given", str(made / "base"), tmp_path / "out"
    shutil.copytree(adapter, given)
    if wrong == "no adapter":
        given = made / "base"
    elif wrong == "no weights":
        (given / "adapter_model.safetensors").unlink()
    elif wrong == "torn":
        os.truncate(given / "adapter_model.safetensors", 1000)
    elif wrong in ("other weights", "narrow", "short", "deep"):
        base = str(other)
        if wrong != "other weights":
            (given / "manifest.json").unlink()  # an adapter of another program
            config = LlamaConfig.from_pretrained(made / "base")
            config.hidden_size = 32 if wrong == "narrow" else config.hidden_size
            config.num_hidden_layers = {"short": 1, "deep": 3}.get(wrong, 2)
            LlamaForCausalLM(config).save_pretrained(base)
    elif wrong in ("no base", "not a model"):
        base = "./nowhere" if wrong == "no base" else str(tmp_path)
        (given / "manifest.json").unlink()
    elif wrong == "out":
        out = tmp_path
    code = command.main(["merge", "--adapter", str(given), "--base", base, "--out", str(out)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code in (1, 2) and message in lines[0] and lines[0].startswith("error: ")
    assert len(lines) <= 2 and not list(tmp_path.glob(".out*"))
    assert wrong == "out" or not out.exists()


def test_fit_cuts_no_document_that_fits_a_row():
    """Against a list of rows made by hand: next fit; a document that is too long is cut as `pack` cuts it."""

    class Made:
        lengths = (5, 3, 4, 9, 1, 20, 2, 8)

        def __len__(self):
            return len(self.lengths)

        def read(self, index):
            return Document(np.arange(self.lengths[index], dtype=np.int32) + 100 * index)

    cutter = Cutter.of(DataConfig(strategy="fit", seq_len=8), pad_id=0)
    source, rows, place = Listed(Made(), range(8)), [], (0, 0)
    while cut := cutter.row(source, *place):
        rows.append(cut.row)
        place = (cut.position, cut.offset)
    found = [[(piece.document, piece.begin, piece.end) for piece in row.pieces] for row in rows]
    assert found == [
        [(0, 0, 5), (1, 0, 3)],
        [(2, 0, 4)],
        [(3, 0, 9)],
        [(4, 0, 1), (5, 0, 8)],
        [(5, 7, 16)],
        [(5, 15, 20), (6, 0, 2)],
        [(7, 0, 8)],
    ]
    targets = [int(label) for row in rows for label in row.labels if label != IGNORE]
    assert targets == [100 * index + i for index, length in enumerate(Made.lengths) for i in range(1, length)]
