"""The truth: one plain process, plain transformers, torch's cross-entropy over the whole global batch, fp64."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import Config

IGNORE = -100
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Reference:
    """Of the step's summed loss divided by its valid labels."""

    batch: dict[str, torch.Tensor]
    """(rows, L): input_ids, labels, position_ids of the whole global batch."""
    weights: dict[str, torch.Tensor]
    """Parameters and buffers that the model starts with; tied ones under each of their names."""
    parameters: int
    gradients: dict[str, torch.Tensor]
    """fp64, by name, of what is trained; tied ones once."""
    loss: float
    """Summed."""
    tokens: int
    norm: float
    plain_error: dict[str, float]
    """‖Δ‖/‖ref‖ of one plain process that computes in the cell's own precision: what that precision costs."""


def build_model(config: Config, dtype: torch.dtype) -> nn.Module:
    """The cell's model with random weights from its seed; biases and norms are not left at 0 and 1."""
    size = config.model
    common = {"vocab_size": size.vocab_size, "tie_word_embeddings": size.tie_word_embeddings, "use_cache": False}
    if size.architecture == "gpt2":
        shape = {
            "n_embd": size.hidden_size,
            "n_layer": size.num_hidden_layers,
            "n_head": size.num_attention_heads,
            "n_positions": config.data.seq_len,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }
    else:
        shape = {
            "hidden_size": size.hidden_size,
            "intermediate_size": size.intermediate_size,
            "num_hidden_layers": size.num_hidden_layers,
            "num_attention_heads": size.num_attention_heads,
            "num_key_value_heads": size.num_key_value_heads,
            "head_dim": size.hidden_size // size.num_attention_heads,
        }
    settings = AutoConfig.for_model(size.architecture, bos_token_id=0, eos_token_id=0, **common, **shape)
    generator = torch.Generator().manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    if config.model.lora.rank:
        lora = config.model.lora
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets), model)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * size.initializer_range + (parameter.dim() == 1))
    return model.to(dtype).train()


def build_batch(config: Config, rows: int, packed: bool) -> dict[str, torch.Tensor]:
    """Rows whose micro-batches have very different numbers of valid labels; the third has none."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    length, micro = config.data.seq_len, config.train.micro_batch
    vocabulary = config.model.vocab_size or 0
    tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    keep = torch.tensor([1.0, 0.15, 0.0, 0.6, 0.05])[torch.arange(rows) // micro % 5]
    labels[torch.rand(rows, length, generator=generator) >= keep[:, None]] = IGNORE
    positions = torch.arange(length).repeat(rows, 1)
    if packed:
        for row in range(rows):
            start = 3 + (row * 5) % (length - 6)
            positions[row, start:] -= start
            labels[row, start - 1] = IGNORE
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def reference(config: Config, rows: int, packed: bool, whole_module_low: bool) -> Reference:
    """`whole_module_low`: low precision casts the whole module (FSDP2's policy), not each operation (autocast)."""
    batch = build_batch(config, rows, packed)
    model = build_model(config, torch.float64)
    weights = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
    weights |= {name: value.clone() for name, value in model.named_buffers()}
    loss, tokens = _backward(model, batch, packed, contextlib.nullcontext(), 1.0)
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    precision = config.train.precision
    plain: dict[str, float] = {}
    if precision in LOW:
        low = build_model(config, LOW[precision] if whole_module_low else torch.float32)
        cast = contextlib.nullcontext() if whole_module_low else torch.autocast("cpu", LOW[precision])
        scale = loss_scale(config)
        _backward(low, batch, packed, cast, scale)
        found = {name: value.grad for name, value in low.named_parameters() if name in gradients}
        plain = {name: error(gradient.double() / scale, gradients[name]) for name, gradient in found.items()}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Reference(batch, weights, parameters, gradients, loss, tokens, norm, plain)


def loss_scale(config: Config) -> float:
    return 1024.0 if config.train.precision == "fp16" else 1.0


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """‖Δ‖/‖ref‖; infinite if anything is not a number."""
    value = float((found.double() - truth).norm() / truth.norm())
    return value if math.isfinite(value) else math.inf


def _backward(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    packed: bool,
    cast: contextlib.AbstractContextManager[object],
    scale: float,
) -> tuple[float, int]:
    """→ the summed loss and the number of valid labels; leaves gradients of their quotient times `scale`."""
    tokens = int((batch["labels"] != IGNORE).sum())
    if packed:  # each document alone
        pieces = [piece for row in range(len(batch["labels"])) for piece in _documents(batch, row)]
    else:
        pieces = [(batch["input_ids"], batch["labels"])]
    total = 0.0
    for inputs, labels in pieces:
        with cast:
            logits = model(input_ids=inputs, use_cache=False).logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        (loss * scale / tokens).backward()
        total += float(loss.detach())
    return total, tokens


def _documents(batch: dict[str, torch.Tensor], row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    positions = batch["position_ids"][row]
    starts = [*torch.where(positions == 0)[0].tolist(), len(positions)]
    return [
        (batch["input_ids"][row : row + 1, a:b], batch["labels"][row : row + 1, a:b])
        for a, b in itertools.pairwise(starts)
    ]
