"""Perplexity, as a task and while training, against loops with plain transformers: one window at a time, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trainer import __main__ as command
from trainer.data import tokenizer
from trainer.data.streaming_import import MDSWriter

LENGTH, STRIDE = 24, 8
SENTENCE = "the of and a to in is you that it he was for on are as with his they at be this have from by"
WORDS = SENTENCE.split()
TEXTS = [
    " ".join(WORDS[(7 * index + i * i + i // 5) % len(WORDS)] for i in range(3 + 13 * (index % 6))) + "."
    for index in range(17)
]
CHATS = [
    [
        {"role": "user", "content": f"{TEXTS[index][:20]}?"},
        {"role": "assistant", "content": TEXTS[index + 1][:40]},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": TEXTS[index][-12:]},
    ]
    for index in range(8)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model with its tokenizer, and the same texts as files, JSON lines, Arrow (`save_to_disk`) and MDS."""
    root = tmp_path_factory.mktemp("made")
    tokenizer.save(tokenizer.train(TEXTS, 320), root / "model")
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=320)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=200, initializer_range=0.3))
    model.save_pretrained(root / "model")
    (root / "text").mkdir()
    for index, text in enumerate(TEXTS):
        (root / f"text/{index:02}.txt").write_text(text)
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (root / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(root / "arrow"))
    datasets.Dataset.from_dict({"messages": CHATS}).save_to_disk(str(root / "chats"))
    with MDSWriter(out=str(root / "mds/validation"), columns={"text": "str"}) as writer:
        for text in TEXTS:
            writer.write({"text": text})
    return root


def documents(made: Path) -> list[list[int]]:
    plain = AutoTokenizer.from_pretrained(made / "model")
    first, last = plain.bos_token_id, plain.eos_token_id
    return [[first, *plain(text, add_special_tokens=False).input_ids, last] for text in TEXTS]


Windows = list[tuple[list[int], list[bool]]]
"""Tokens, and which of them count."""


def packed_apart(made: Path) -> Windows:
    """All documents end to end, cut into rows that share a token; of a row each document is a window for itself."""
    windows: Windows = []
    stream = [(index, token) for index, document in enumerate(documents(made)) for token in document]
    for start in range(0, len(stream) - 1, LENGTH):
        row = stream[start : start + LENGTH + 1]
        for index in sorted({index for index, _ in row}):
            part = [token for owner, token in row if owner == index]
            windows.append((part, [False] + [True] * (len(part) - 1)))
    return windows


def packed_across(made: Path) -> Windows:
    """C4-style: blocks of one stream, in which the beginning of a document sees the end of the one before."""
    stream = [(token, i > 0) for document in documents(made) for i, token in enumerate(document)]
    blocks = [stream[start : start + LENGTH + 1] for start in range(0, len(stream) - 1, LENGTH)]
    return [([t for t, _ in block], [False, *(counts for _, counts in block[1:])]) for block in blocks]


def overflowing(made: Path) -> Windows:
    """Windows of each document that repeat STRIDE tokens, which count in the first of them only."""
    windows: Windows = []
    for document in documents(made):
        done = 1
        for start in range(0, len(document), LENGTH - STRIDE):
            part = document[start : start + LENGTH + 1]
            if start + len(part) > done:
                windows.append((part, [start + i >= done for i in range(len(part))]))
                done = start + len(part)
    return windows


def truncated(made: Path) -> Windows:
    return [(document[: LENGTH + 1], [False] + [True] * LENGTH) for document in documents(made)]


def conversations(made: Path) -> Windows:
    """Turn by turn: `Role: text`, what the assistant says ends with EOS, and that counts."""
    plain = AutoTokenizer.from_pretrained(made / "model")
    windows: Windows = []
    for chat in CHATS:
        tokens, counts = [plain.bos_token_id], [False]
        for message in chat:
            said = message["role"] == "assistant"
            name = plain(f"{message['role'].capitalize()}:", add_special_tokens=False).input_ids
            text = plain(f" {message['content']}", add_special_tokens=False).input_ids + [plain.eos_token_id] * said
            line = plain("\n", add_special_tokens=False).input_ids
            tokens += [*name, *text, *line]
            counts += [False] * len(name) + [said] * len(text) + [False] * len(line)
        windows.append((tokens, counts))
    return windows


def expected(made: Path, windows: Windows) -> tuple[float, int]:
    """(mean cross-entropy of the tokens that count, how many these are)."""
    model = AutoModelForCausalLM.from_pretrained(made / "model").eval()
    total, count = 0.0, 0
    for tokens, counts in windows:
        if len(tokens) < 2:
            continue
        ids = torch.tensor(tokens)
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        chosen = torch.tensor(counts[1 : len(tokens)])
        total += losses[chosen].double().sum().item()
        count += int(chosen.sum())
    return total / count, count


CELLS: dict[str, tuple[str, str, list[str], Any]] = {
    "text": ("text_files", "text", [], packed_apart),
    "jsonl": ("jsonl", "lines.jsonl", [], packed_apart),
    "arrow": ("hub", "arrow", [], packed_apart),
    "mds": ("mds", "mds", [], packed_apart),
    "c4-style": ("hub", "arrow", ["data.cross_document=true"], packed_across),
    "overflow": ("mds", "mds", ["data.strategy=overflow", f"data.stride={STRIDE}"], overflowing),
    "trunc": ("jsonl", "lines.jsonl", ["data.strategy=trunc"], truncated),
    "chat": ("chat", "chat.jsonl", ["data.strategy=fit", "data.seq_len=200"], conversations),
    "chat-arrow": ("chat", "chats", ["data.strategy=fit", "data.seq_len=200"], conversations),
}
"""Name → source, path, further overrides, reference."""


def arguments(made: Path, cell: str, *more: str) -> list[str]:
    source, path, overrides, _ = CELLS[cell]
    given = [f"model.pretrained={made / 'model'}", f"eval.source={source}", f"eval.path={made / path}"]
    given += ["data.source=jsonl", "data.path=nowhere.jsonl"]  # training data are not even opened
    small = ["eval.micro_batch=3", "train.device=cpu", "log.tensorboard=false", f"data.seq_len={LENGTH}"]
    return ["run", "--config", "demo", "task=evaluate", *given, *small, *overrides, *more]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_token_once_at_any_number_of_ranks(world, ranks, events, made, tmp_path):
    runs = [(str(tmp_path / cell), arguments(made, cell)) for cell in CELLS]
    result = ranks("evaluations", world, argv=[json.dumps(runs)])
    assert result.exit_codes == [0] * world, result.output
    for cell, (*_, reference) in CELLS.items():
        (told,) = events(cell, "eval")
        loss, count = expected(made, reference(made))
        assert (cell, told["tokens"]) == (cell, count)
        assert (cell, told["loss"]) == (cell, pytest.approx(loss, rel=1e-4))
        assert told["perplexity"] == pytest.approx(np.exp(told["loss"]))


def test_max_rows_are_drawn_with_the_seed(ranks, events, made, tmp_path):
    """The documents come in numpy's permutation for the seed; then as always, until there are so many rows."""
    found = {}
    for world, seeds in ((1, (5, 6)), (2, (5,))):
        runs = [
            (str(tmp_path / f"{world}-{seed}"), arguments(made, "arrow", "eval.max_rows=4", f"seed={seed}"))
            for seed in seeds
        ]
        result = ranks("evaluations", world, argv=[json.dumps(runs)])
        assert result.exit_codes == [0] * world, result.output
        for seed in seeds:
            (told,) = events(f"{world}-{seed}", "eval")
            found[world, seed] = (pytest.approx(told["loss"], rel=1e-6), told["tokens"])
    assert found[1, 5] == found[2, 5] and found[1, 5] != found[1, 6]
    order = np.random.Generator(np.random.Philox(key=[5, 0])).permutation(len(TEXTS))
    stream = [token > 0 for index in order for token, _ in enumerate(documents(made)[index])]
    assert found[1, 5][1] == sum(stream[: 4 * LENGTH + 1])


def test_training_goes_on_as_if_there_had_been_no_evaluation(train, events):
    """With dropout: it is off during an evaluation and on after it, and draws the same random numbers."""
    gpt2 = ["model.architecture=gpt2", "model.intermediate_size=null", "model.num_key_value_heads=null"]
    for name, every in (("with", 2), ("without", 0)):
        result = train(name, *gpt2, f"eval.every={every}", "checkpoint.every=0")
        assert result.exit_codes == [0], result.output
    assert [row["step"] for row in events("with", "eval")] == [2, 4, 6]
    assert [row["step"] for row in events("without", "eval")] == [6]
    rows = [[(row["loss"], row["grad_norm"]) for row in events(name, "step")] for name in ("with", "without")]
    assert rows[0] == rows[1]
    result = train("dry", *gpt2, "checkpoint.every=0", "model.extra={resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}")
    assert rows[0] != [(row["loss"], row["grad_norm"]) for row in events("dry", "step")]  # there is dropout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.pretrained=null", "task=evaluate needs a model"),
        ("eval.source=null", "there is nothing to evaluate on"),
        ("model.pretrained=adapter", "is an adapter, not a whole model"),
    ],
)
def test_what_cannot_be_evaluated(wrong, message, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("ORCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert command.main(arguments(made, "text", "data.holdout=0", wrong)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "hint: " in error
