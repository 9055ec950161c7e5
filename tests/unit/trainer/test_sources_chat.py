"""Chats: the mask is compared with strings written by hand, and with tokens put together piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from trainer.config import DataConfig
from trainer.data import sources, tokenizer
from trainer.data.documents import Documents
from trainer.data.sources.base import Site
from trainer.data.sources.chat import ChatEncoder
from trainer.data.tokenizer import TextTokenizer
from trainer.errors import ConfigError, DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # as some do: the token that ends the turn is outside of the marked part
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
THINKING = (  # as Qwen3: only the last turn has (empty) thoughts
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITING = "{{ messages | length }}" + CHATML  # no rendering is the beginning of a longer one

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say hello, assistant."},
    {"role": "assistant", "content": "Hello, user."},
    {"role": "user", "content": "Say hello, assistant."},
    {"role": "assistant", "content": "Hello,\n again: ünï."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level tokenizer with the special tokens of ChatML, and no template."""
    path = tmp_path_factory.mktemp("chat") / "tokenizer"
    words = [message["content"] for message in TALK] * 5 + ["user\nassistant\nsystem\n"]
    trained = tokenizer.train(words, 400)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.save_pretrained(path)
    return path


def encoder(folder: Path, template: str | None) -> ChatEncoder:
    fast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    fast.chat_template = template
    return ChatEncoder(fast)


def decoded(chat: ChatEncoder, tokens: np.ndarray) -> str:
    return chat._tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_only_what_the_assistant_said(folder: Path, template: str) -> None:
    chat = encoder(folder, template)
    tokens, targets = chat.render(TALK)
    assert tokens.dtype == np.int32 and targets.dtype == bool and tokens.shape == targets.shape
    assert decoded(chat, tokens[targets]) == "Hello, user.<|im_end|>Hello,\n again: ünï.<|im_end|>"
    assert decoded(chat, tokens[~targets]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSay hello, assistant.<|im_end|>\n<|im_start|>assistant\n\n"
        "<|im_start|>user\nSay hello, assistant.<|im_end|>\n<|im_start|>assistant\n\n"
    )


def test_the_mask_equals_one_put_together_from_pieces(folder: Path) -> None:
    chat = encoder(folder, CHATML)
    ids: list[int] = []
    mask: list[bool] = []
    for message in TALK:
        said = message["role"] == "assistant"
        for piece, target in (
            ("<|im_start|>", False),
            (f"{message['role']}\n" + ("" if said else message["content"]), False),
            (message["content"] if said else "", True),
            ("<|im_end|>", said),
            ("\n", False),
        ):
            encoded = chat._tokenizer.encode(piece, add_special_tokens=False)
            ids += encoded
            mask += [target] * len(encoded)
    tokens, targets = chat.render(TALK)
    # a merge over the border of two pieces could differ; byte-level BPE splits at "\n" before a letter
    assert tokens.tolist() == ids and targets.tolist() == mask


def test_without_a_template(folder: Path) -> None:
    chat = encoder(folder, None)
    tokens, targets = chat.render(TALK)
    assert decoded(chat, tokens) == (
        "<s>System: Be brief.\nUser: Say hello, assistant.\nAssistant: Hello, user.<|im_end|>\n"
        "User: Say hello, assistant.\nAssistant: Hello,\n again: ünï.<|im_end|>\n"
    )
    assert decoded(chat, tokens[targets]) == " Hello, user.<|im_end|> Hello,\n again: ünï.<|im_end|>"


def test_a_last_turn_with_thoughts(folder: Path) -> None:
    chat = encoder(folder, THINKING)
    tokens, targets = chat.render(TALK)
    said = decoded(chat, tokens[targets])
    assert said == "Hello, user.<|im_end|><think>\n\n</think>\n\nHello,\n again: ünï.<|im_end|>"


def test_a_template_that_cannot_be_followed_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="message 2: the chat template does not render") as caught:
        encoder(folder, REWRITING).render(TALK)
    assert "{% generation %}" in caught.value.hint


def opened(tmp_path: Path, folder: Path, path: Path) -> Documents:
    data = DataConfig(source="chat", path=str(path), shuffle=False)
    return sources.open_documents(data, TextTokenizer.from_folder(folder), seed=0, cache=tmp_path / "cache")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_documents_from_jsonl_and_from_a_data_set(tmp_path: Path, folder: Path) -> None:
    from_lines = opened(tmp_path, folder, write(tmp_path / "c.jsonl", {"messages": TALK}, {"messages": TALK[:3]}))
    datasets.Dataset.from_dict({"messages": [TALK, TALK[:3]]}).save_to_disk(str(tmp_path / "saved"))
    from_table = opened(tmp_path, folder, tmp_path / "saved")
    chat = encoder(folder, None)
    for documents in (from_lines, from_table):
        assert len(documents) == 2
        for index, talk in enumerate((TALK, TALK[:3])):
            document = documents.read(index)
            tokens, targets = chat.render(talk)
            assert document.targets is not None
            assert document.tokens.tolist() == tokens.tolist() and document.targets.tolist() == targets.tolist()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not JSON"),
        ({"message": TALK}, "'messages' is missing"),
        ({"messages": "hello"}, "'messages' is str"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0 has no role"),
        ({"messages": [TALK[1], {"role": "assistant", "content": None}]}, "message 1 has no text"),
        ({"messages": [TALK[1]]}, "no message of the assistant"),
    ],
)
def test_a_malformed_row_is_named_when_opened(tmp_path: Path, folder: Path, row: Any, problem: str) -> None:
    path = write(tmp_path / "c.jsonl", {"messages": TALK}, row)
    with pytest.raises(DataError, match=rf"c\.jsonl:2: {problem}"):
        opened(tmp_path, folder, path)


def test_a_refusing_template_names_the_line(tmp_path: Path, folder: Path) -> None:
    fast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    fast.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + CHATML
    fast.save_pretrained(tmp_path / "strict")
    path = write(tmp_path / "c.jsonl", {"messages": TALK[1:]}, {"messages": TALK})
    documents = opened(tmp_path, tmp_path / "strict", path)
    assert documents.read(0).targets is not None
    with pytest.raises(DataError, match=r"c\.jsonl:2: the chat template refused it: no system role"):
        documents.read(1)


def test_what_is_no_chat_is_refused(tmp_path: Path, folder: Path) -> None:
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="no column of role and content"):
        opened(tmp_path, folder, tmp_path / "saved")


def test_texts_for_a_tokenizer(tmp_path: Path) -> None:
    data = DataConfig(source="chat", path=str(write(tmp_path / "c.jsonl", {"messages": TALK[1:3]})))
    assert list(sources.texts(sources.open_store(data, Site(cache=tmp_path)))) == [
        "Say hello, assistant.\nHello, user."
    ]
