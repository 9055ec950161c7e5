"""Floating-point operations of a training step, by the strict count, and the peaks they are held against."""

from __future__ import annotations

from typing import Any

import torch

PEAK_FLOPS = {
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation, from the vendors' data sheets, by a part of the device's name.

The first that matches counts. MFU is given for these only: a guessed peak would make it a guessed number.
"""

GATED = ("llama", "qwen2", "qwen3", "mistral")
"""Model types whose MLP has three matrices: gate, up and down. GPT-2's has two."""


def flops_per_token(model: Any, seq_len: int, *, context: float | None = None, frozen: bool = False) -> float | None:
    """Training FLOPs per token of a transformers configuration `model`; None for a family that is not known.

    Strict: a multiplication and an addition are two operations; matrix products only, no embedding look-up, no
    recomputation; attention over the positions that causality allows. With h hidden size, a = heads · head size,
    k = key-value heads · head size, i MLP width, V vocabulary, n layers:

        matrices  = n · (h·a + 2·h·k + a·h + m·h·i) + h·V       m = 3 gated (Llama, Qwen), 2 for GPT-2
        attention = n · 2 · a · context                          q·kᵀ and weights·v, one multiplication each
        per token = 6 · matrices + 6 · attention                 forward 2, backward 4

    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, without its embeddings; causal half as in torchtitan's and
    PaLM's strict form.) `context` is the mean number of positions a token attends to: seq_len / 2 unless given, less
    for packed documents that do not see each other. `frozen` (LoRA): no weight gradients, so 4 · matrices.
    """
    kind = model.model_type
    if kind == "gpt2":
        width, matrices = model.n_inner or 4 * model.hidden_size, 2
    elif kind in GATED:
        width, matrices = model.intermediate_size, 3
    else:
        return None
    hidden, heads, layers = model.hidden_size, model.num_attention_heads, model.num_hidden_layers
    size = getattr(model, "head_dim", None) or hidden // heads
    inner = heads * size
    shared = (getattr(model, "num_key_value_heads", None) or heads) * size
    layer = 2 * hidden * inner + 2 * hidden * shared + matrices * hidden * width
    weights = layers * layer + hidden * model.vocab_size
    attention = layers * 2 * inner * (seq_len / 2 if context is None else context)
    return (4 if frozen else 6) * weights + 6 * attention


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a device, or of a name of one; None if it is not in the table."""
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    name = device.lower()
    return next((peak for key, peak in PEAK_FLOPS.items() if key.lower() in name), None)
