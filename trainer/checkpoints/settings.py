"""What lies beside the weights in a folder that transformers and serving engines open."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trainer.checkpoints.state import TrainingState
from trainer.data.tokenizer import copy_files


def write_settings(folder: Path, state: TrainingState, dtype: torch.dtype | None = None) -> None:
    """Configuration of the model, or of the adapter; defaults for generation; the tokenizer.

    `dtype`: that of the weights in `folder`, if it is not that of the parameters.

    Generation also ends at the token that ends a turn of the conversations, if it learnt any.
    """
    config = type(state.hf_config).from_dict(state.hf_config.to_dict())
    mapping: Callable[..., Any] = AutoModelForCausalLM._model_mapping
    config.architectures = [mapping[type(config)].__name__]  # type: ignore[index]
    config.dtype = dtype or next(state.model.parts[0].parameters()).dtype
    config.use_cache = True  # off in training only
    if state.adapter is None:
        config.save_pretrained(folder)
    else:
        state.adapter.write_settings(folder)
    defaults = GenerationConfig.from_model_config(config).to_diff_dict()
    defaults.pop("_from_model_config", None)
    _write_generation(folder, state, defaults)
    tokenizer = state.tokenizer_folder
    if tokenizer is not None:
        copy_files(tokenizer, folder)
        if state.chat and not _template(tokenizer).own:
            from trainer.data.sources.chat import DEFAULT_TEMPLATE

            # the marks are for training; not every engine knows them
            plain = re.sub(r"{% (end)?generation %}", "", DEFAULT_TEMPLATE)
            (folder / "chat_template.jinja").write_text(plain, encoding="utf-8")


def _write_generation(folder: Path, state: TrainingState, values: dict[str, Any]) -> None:
    base = state.pretrained / "generation_config.json" if state.pretrained else None
    if base is not None and base.is_file():
        values = json.loads(base.read_text(encoding="utf-8"))
    end = _template(state.tokenizer_folder).end if state.chat and state.tokenizer_folder else None
    ends = values.get("eos_token_id")
    known = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if end is not None and end not in known:
        values["eos_token_id"] = [*known, end] if known else end
    (folder / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class _Template(NamedTuple):
    own: bool
    """Whether the tokenizer has one."""
    end: int | None
    """The special token with which it ends what the assistant says, if that is one."""


@functools.cache
def _template(folder: Path) -> _Template:
    from trainer.data.sources.chat import ChatEncoder

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    tokens, targets = ChatEncoder(tokenizer).render(talk)
    last = int(tokens[targets][-1])
    return _Template(bool(tokenizer.chat_template), last if last in tokenizer.added_tokens_decoder else None)
