"""Conversations through the tokenizer's chat template; only the assistant's tokens are targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config import DataConfig
from trainer.data.documents import Document
from trainer.data.sources.base import Site, Store
from trainer.data.sources.text import JsonLines, list_files
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool", "developer")

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}:{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For a tokenizer without one: `<s>User: question\\nAssistant: answer</s>\\n`, the answer and `</s>` are targets."""


class JsonChats(Store):
    """`{"messages": [{"role": …, "content": …}, …]}` on each line. Every line is checked when it is opened."""

    kind = "messages"

    def __init__(self, lines: JsonLines, column: str) -> None:
        self._lines, self._column = lines, column
        self.fingerprint = lines.fingerprint
        for index in range(len(lines)):
            self.get(index)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return self._lines.where(index)

    def get(self, index: int) -> Messages:
        return check(self._lines.row(index).get(self._column), self.where(index), self._column)


def chat(data: DataConfig, site: Site) -> Store:
    """JSON lines in `data.path`, else as the source `hub`, with a column `messages`."""
    if data.path is not None:
        path = Path(data.path)
        if path.suffix == ".jsonl" or (path.is_dir() and not any(path.glob("*.json")) and any(path.rglob("*.jsonl"))):
            return JsonChats(JsonLines(list_files(data, (".jsonl",))), data.column or "messages")
    from trainer.data.sources.hub import hub

    store = hub(data, site)
    if store.kind != "messages":
        raise ConfigError(f"data.source=chat: {data.path or data.name} has no column of role and content")
    return store


def check(messages: Any, where: str, column: str = "messages") -> Messages:
    """`messages`, if they are a conversation with something to learn from. Raises DataError with `where`."""
    problem = None
    if not isinstance(messages, list) or not messages:
        problem = f"{column!r} is {'missing or empty' if not messages else type(messages).__name__}, not a list"
    else:
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                problem = f"message {number} has no role of {', '.join(ROLES)}"
            elif not isinstance(message.get("content"), str):
                problem = f"message {number} has no text as content"
            if problem:
                break
        else:
            if not any(message["role"] == "assistant" for message in messages):
                problem = "no message of the assistant, so nothing to learn"
    if problem:
        raise DataError(f"{where}: {problem}", hint='Each row: {"messages": [{"role": "user", "content": "…"}, …]}')
    return messages


class ChatEncoder:
    """Renders and tokenises conversations.

    A template that marks the assistant's part with `{% generation %}` is believed. For any other, the part
    of a turn is what rendering up to it, with the prompt for generation, leaves of rendering it too; both
    must be found in the whole rendering. The end-of-turn token belongs to the turn: the model is to learn to stop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template or DEFAULT_TEMPLATE
        if not isinstance(self._template, str):
            raise ConfigError("the tokenizer has several chat templates, none of them the default")
        if not tokenizer.is_fast:
            raise ConfigError("chats need a fast tokenizer", hint="Set tokenizer.path to one with tokenizer.json.")
        self._marked = "{% generation" in self._template or "{%- generation" in self._template

    @classmethod
    def of_folder(cls, folder: Path) -> ChatEncoder:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))

    def encode(self, store: Store, index: int) -> Document:
        messages = check(store.get(index), store.where(index))
        try:
            tokens, targets = self.render(messages)
        except DataError:
            raise
        except Exception as error:  # jinja's, and whatever a template raises
            raise DataError(f"{store.where(index)}: the chat template refused it: {error}") from error
        return Document(tokens, targets)

    def render(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int32 tokens and (n,) bool: the assistant's tokens."""
        if self._marked:
            result = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            tokens = np.asarray(result["input_ids"], np.int32)
            targets = np.asarray(result["assistant_masks"], bool)
        else:
            text = self._text(messages)
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            tokens = np.asarray(encoded["input_ids"], np.int32)
            begins, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
            targets = np.zeros(len(tokens), bool)
            for begin, end in self._turns(messages, text):
                targets |= (begins >= begin) & (ends <= end) & (ends > begins)
        closes = (tokens[1:] == self._tokenizer.eos_token_id) & targets[:-1]
        targets[1:] |= closes  # a template may end the marked part before the token that ends the turn
        return tokens, targets

    def _text(self, messages: Messages, prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=prompt
        )

    def _turns(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Begin and end of each assistant turn in `text`, the rendering of all `messages`."""
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], prompt=True)
            until = self._text(messages[: number + 1])
            content = message["content"].strip()
            found = until.rfind(content)
            close = until[found + len(content) :] if found >= 0 else ""
            if text.startswith(before) and text.startswith(until):
                end = len(until)
            elif text.startswith(before) and text.startswith(content + close, len(before)):
                # earlier turns may be rendered shorter than last ones (Qwen3 leaves out their empty thoughts)
                end = len(before) + len(content + close)
            else:
                raise DataError(
                    f"message {number}: the chat template does not render a conversation as a continuation of its"
                    " beginning, so the assistant's part cannot be told",
                    hint="Mark it in the tokenizer's chat_template with {% generation %} … {% endgeneration %}.",
                )
            # the line break after the end-of-turn token belongs to the template, not to the turn
            turns.append((len(before), len(before) + len(text[len(before) : end].rstrip())))
        return turns
