"""Attention back-ends, and documents of a packed row that do not see one another.

Position ids say where documents begin: wherever they do not go up by one. `eager` and `sdpa` get a dense mask from
transformers; `flash` (package flash-attn) and `varlen` get cumulative lengths, computed once per batch on entry
to the base model and handed to every layer as keyword arguments, so that recomputation, compiled layers and
pipeline stages see the same. `varlen` is torch's own variable-length kernel on GPUs in half precision, and
elsewhere SDPA for one document at a time: exact, and never across documents.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.config import Config
from trainer.data.packing import PACKED
from trainer.errors import ConfigError
from trainer.models.memory import base_model

VARLEN = "varlen"
_HALF = (torch.bfloat16, torch.float16)
_TRANSFORMERS_NAMES = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2", "varlen": VARLEN}


def back_end(config: Config, model_config: Any, model_class: type, device: torch.device) -> str:
    """transformers' name of the back-end for `config.model.attention`.

    Raises ConfigError where it cannot be had. `auto` is `varlen` on the CPU, and on GPUs where it has a kernel, else
    `sdpa`: transformers makes a dense (B, L, L) mask for that from any position ids, packed or not.
    """
    wanted = config.model.attention
    half = config.train.precision in ("bf16", "fp16")
    obstacle = _varlen_obstacle(model_config, model_class)
    if wanted == "auto":
        return VARLEN if obstacle is None and (half or device.type == "cpu") else "sdpa"
    if wanted == "varlen" and (obstacle or (device.type == "cuda" and not half)):
        reason = obstacle or f"its kernel computes in half precision, not {config.train.precision}"
        raise ConfigError(f"model.attention=varlen: {reason}", hint="Set model.attention=sdpa.")
    if wanted == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                "model.attention=flash needs the package flash-attn, which is not installed",
                hint="Set model.attention=varlen (torch's own kernels), or add flash-attn to the image.",
            )
        if device.type != "cuda" or not half:
            raise ConfigError(
                f"model.attention=flash computes on GPUs in half precision, this is {device.type} in"
                f" {config.train.precision}",
                hint="Set train.precision=bf16 on a GPU, or model.attention=sdpa.",
            )
    return _TRANSFORMERS_NAMES[wanted]


def keeps_apart(config: Config) -> bool:
    """Whether rows hold several documents that must not see one another."""
    return config.data.strategy in PACKED and not config.data.cross_document


def check_isolation(config: Config, model_class: type) -> None:
    """Raises ConfigError if documents are to be kept apart and the class of transformers cannot.

    Those that can take their mask from `create_causal_mask`, which looks at position ids; all others that were
    tried (OPT, Falcon, BLOOM, MPT, StableLM, …) let packed documents attend to each other without a word.
    """
    if keeps_apart(config) and not hasattr(sys.modules[model_class.__module__], "create_causal_mask"):
        raise ConfigError(
            f"{model_class.__name__} of transformers cannot keep packed documents apart",
            hint="Set data.cross_document=true, or data.strategy=trunc, or use another model.architecture.",
        )


def _varlen_obstacle(model_config: Any, model_class: type) -> str | None:
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"{model_class.__name__} of transformers has attention of its own"
    for key in ("attention_dropout", "attn_pdrop"):
        if getattr(model_config, key, 0):
            return f"it has no dropout, and the model's {key} is {getattr(model_config, key)}"
    for key in ("attn_logit_softcapping", "attention_sink"):
        if getattr(model_config, key, None):
            return f"it cannot compute the model's {key}"
    heads = getattr(model_config, "num_attention_heads", 1)
    width = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    if width > 256 or width % 8:
        return f"its kernel takes heads of a multiple of 8 up to 256, not {width}"
    return None


def document_lengths(position_ids: torch.Tensor) -> dict[str, Any]:
    """(B, L) position ids → the keyword arguments that flash and varlen attention read, under transformers' names.

    `cu_seq_lens_q`, `cu_seq_lens_k`: (documents + 1,) int32, where each begins in the B·L tokens, and B·L;
    `max_length_q`, `max_length_k`: the longest, rounded up to a power of two (at most L), so that compiled
    layers see few values. A row always begins a document. Waits for the GPU if `position_ids` lies on one.
    """
    rows, length = position_ids.shape
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=rows * length).to(torch.int32)
    longest = int(bounds.diff().max())
    longest = min(length, 1 << (longest - 1).bit_length())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def install(model: nn.Module, apart: bool) -> None:
    """Makes the base model of a transformers causal LM hand document lengths to its layers, if they want them.

    Not for rows whose documents may see one another: their attention is causal and nothing else.
    """
    if apart and model.config._attn_implementation in (VARLEN, "flash_attention_2"):  # type: ignore[union-attr]
        base_model(model).register_forward_pre_hook(_add_lengths, with_kwargs=True)


def _add_lengths(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Not with a cache or a mask of the caller's: that is generation, which goes through SDPA."""
    cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache")
    if cached or kwargs.get("attention_mask") is not None or "cu_seq_lens_q" in kwargs:
        return None
    positions = kwargs.get("position_ids")
    if positions is None:
        rows = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        positions = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
    return args, kwargs | document_lengths(positions)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, heads, L, D), keys and values perhaps with fewer heads → (B, L, heads, D).

    Without document lengths (generation) it is transformers' SDPA with `attention_mask`.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows, heads, length, width = query.shape
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    # (B·L, heads, D): rows one after another
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if _has_kernel(query):
        output = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=key.shape[1] != heads,
        )
    else:
        output = _one_by_one(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    return output.view(rows, length, heads, width), None


def _has_kernel(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in _HALF


@torch.compiler.disable
def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each document, for any device and dtype; (tokens, heads, D) → the same."""
    sizes = bounds.diff().tolist()
    pieces = []
    for q, k, v in zip(*(x.transpose(0, 1).split(sizes, dim=1) for x in (query, key, value)), strict=True):
        n = q.shape[1]
        mask = None
        if window is not None and n > window:
            mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        pieces.append(
            F.scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=k.shape[0] != q.shape[0],
            )[0]
        )
    return torch.cat(pieces, dim=1).transpose(0, 1)


def _varlen_mask(
    batch_size: int,
    cache_position: torch.Tensor,
    kv_length: int,
    kv_offset: int = 0,
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for training rows (transformers forbids `is_causal` for all that have position ids), unless a window
    is narrower than the row: without document lengths only a mask knows of it. SDPA's for generation."""
    whole = local_size is None or kv_length <= local_size
    if attention_mask is None and not allow_is_causal_skip and cache_position.shape[0] == kv_length and whole:
        return None
    return sdpa_mask(
        batch_size,
        cache_position,
        kv_length,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        **kwargs,
    )


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, _varlen_mask)
