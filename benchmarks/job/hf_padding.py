"""HF `Trainer` with its padding collator on the documents of useful_tokens.py; prints one JSON line.

Each step's useful tokens (targets), slots, and the moment of its end. Documents come from memory, cut to `max_length`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Documents(Dataset):
    def __init__(self, tokens: np.ndarray, ends: np.ndarray, max_length: int) -> None:
        self._parts = [part[:max_length].tolist() for part in np.split(tokens, ends[:-1])]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self._parts[index]}


class Counted:
    """The collator, which also counts what it gives."""

    def __init__(self, collate: DataCollatorForLanguageModeling) -> None:
        self._collate = collate
        self.useful: list[int] = []
        self.slots: list[int] = []

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self._collate(rows)
        self.useful.append(int((batch["labels"][:, 1:] != -100).sum()))
        self.slots.append(batch["labels"].numel())
        return batch


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")))
    tokenizer.pad_token = "<pad>"
    saved = np.load(given["documents"])
    collate = Counted(DataCollatorForLanguageModeling(tokenizer, mlm=False))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=given["steps"],
            per_device_train_batch_size=given["rows"],
            optim="adamw_torch_fused",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            logging_steps=10,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(
            LlamaForCausalLM(LlamaConfig(**given["model"])),
            arguments,
            train_dataset=Documents(saved["tokens"], saved["ends"], given["max_length"]),
            data_collator=collate,
            callbacks=[clock],
        ).train()
    steps = given["steps"]  # the loader collates ahead
    found = {"useful": collate.useful[:steps], "slots": collate.slots[:steps], "ends": clock.ends}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
