"""HF `Trainer` on the model and rows of benchmarks/gpu.py; one JSON line: each step's seconds, and peak memory."""

from __future__ import annotations

import json
import sys
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int, seq_len: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocab_size, (count, seq_len), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index]
        # as its collators do: without a mask transformers would build one of (rows, L, L), and flash could not be used
        return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(LlamaConfig(**given["model"], use_cache=False))
    torch.set_default_device("cpu")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=given["steps"],
            per_device_train_batch_size=given["rows"],
            bf16=True,
            gradient_checkpointing=given["checkpoint"],
            torch_compile=given["compile"],
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            logging_steps=given["steps"],
            disable_tqdm=True,
        )
        rows = Rows(given["steps"] * given["rows"], given["seq_len"], given["model"]["vocab_size"])
        Trainer(model, arguments, train_dataset=rows, callbacks=[clock]).train()
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(json.dumps({"seconds": clock.seconds, "memory": memory}), flush=True)


if __name__ == "__main__":
    main()
