"""Any causal language model of transformers: its configuration from the recipe, and the model without its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trainer.config import Config
from trainer.errors import ConfigError, nearest
from trainer.models import attention
from trainer.models.loss import install_loss, loss_method

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
    "initializer_range",
)
"""Keys of `model` that are passed on, under transformers' standard names."""

_OTHER_NAMES = {"intermediate_size": ("n_inner", "ffn_dim")}
"""Names of architectures that transformers' own attribute maps do not cover."""


def model_config(
    config: Config,
    *,
    vocab_size: int,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    pretrained: Path | None = None,
) -> PretrainedConfig:
    """The transformers configuration of the recipe's model; `vocab_size` is the number of the tokenizer's ids.

    With `pretrained` (a folder) that of its config.json, else `model.architecture` with the recipe's sizes;
    `model.extra` on top. Sizes that the architecture does not have (GPT-2: grouped queries) are left out; a size
    of None is the architecture's own default. Raises ConfigError, naming the key, for what cannot be built or
    does not fit the layout.
    """
    if pretrained is not None:
        found = _read(pretrained)
        _add_extra(found, config)
    else:
        found = _from_sizes(
            config, vocab_size, {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
        )
    found.use_cache = False
    _check(found, config, vocab_size)
    return found


def _class_of(model_type: str, key: str) -> type[PretrainedConfig]:
    valid = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in valid:
        near = nearest(model_type, valid)
        raise ConfigError(
            f"{key}: transformers has no causal language model of type {model_type!r}"
            + (f"; did you mean {near!r}?" if near else ""),
            hint="Use a transformers model type, such as llama, qwen3, mistral or gpt2.",
        )
    return CONFIG_MAPPING[model_type]


def _from_sizes(config: Config, vocab_size: int, tokens: dict[str, int | None]) -> PretrainedConfig:
    model = config.model
    kind = _class_of(model.architecture, "model.architecture")
    default = kind()
    values: dict[str, Any] = dict(tokens)
    for key in _SIZES:
        name = _own_name(default, key)
        value = getattr(model, key)
        if name is not None and (value is not None or key == "num_key_value_heads"):
            values[name] = value
    if _own_name(default, "head_dim") and model.hidden_size % model.num_attention_heads == 0:
        values["head_dim"] = model.hidden_size // model.num_attention_heads  # not the default of a large model
    values["vocab_size"] = model.vocab_size or vocab_size
    positions = _own_name(default, "max_position_embeddings")
    if positions:
        values[positions] = config.data.seq_len
    for key, value in model.extra.items():
        values[_valid_extra(default, key)] = value
    try:
        return kind(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {kind.__name__} refuses these sizes: {' '.join(str(error).split())}") from None


def _own_name(default: PretrainedConfig, key: str) -> str | None:
    """The name under which the class keeps `key`, or None if it has no such thing."""
    for name in (default.attribute_map.get(key, key), *_OTHER_NAMES.get(key, ())):
        if name in vars(default) or name in ("tie_word_embeddings", "use_cache"):
            return name
    return None


def _valid_extra(default: PretrainedConfig, key: str) -> str:
    name = _own_name(default, key)
    if name is None:
        valid = [*(name for name in vars(default) if not name.startswith("_")), *default.attribute_map]
        near = nearest(key, valid)
        raise ConfigError(
            f"model.extra: {type(default).__name__} has no key {key!r}" + (f"; did you mean {near!r}?" if near else "")
        )
    return name


def _add_extra(found: PretrainedConfig, config: Config) -> None:
    default = type(found)()
    for key, value in config.model.extra.items():
        setattr(found, _valid_extra(default, key), value)


def _read(folder: Path) -> PretrainedConfig:
    try:
        values, _ = PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
        kind = _class_of(str(values.get("model_type")), f"model.pretrained ({folder}/config.json)")
        found = kind.from_dict(values)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained: {folder}: {' '.join(str(error).split())}") from None
    if getattr(found, "quantization_config", None):
        raise ConfigError(
            f"model.pretrained: the weights in {folder} are quantized", hint="Use the model's unquantized weights."
        )
    return found


def _check(found: PretrainedConfig, config: Config, vocab_size: int) -> None:
    parallel, settings = config.parallel, found.get_text_config()
    rows = settings.vocab_size
    if vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {vocab_size} ids, the model's embedding {rows} rows",
            hint="Use the model's own tokenizer (tokenizer.path)."
            if config.model.pretrained
            else f"Set model.vocab_size to at least {vocab_size}, or leave it out.",
        )
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and config.data.seq_len > positions:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is more than the model's {positions} positions",
            hint=f"Set data.seq_len={positions}.",
        )
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    if heads % parallel.tensor:
        fits = [str(size) for size in range(1, heads + 1) if heads % size == 0]
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} does not divide the model's {heads} heads of keys and values",
            hint=f"Set parallel.tensor to one of {', '.join(fits)}.",
        )
    if parallel.pipeline > 1 and settings.tie_word_embeddings:
        raise ConfigError(
            "the model ties its embeddings, which would lie on the first and the last pipeline stage",
            hint="Set parallel.pipeline=1.",
        )
    if parallel.pipeline > settings.num_hidden_layers:
        raise ConfigError(
            f"the model's {settings.num_hidden_layers} layers cannot be cut into"
            f" parallel.pipeline={parallel.pipeline} stages",
            hint=f"Set parallel.pipeline to at most {settings.num_hidden_layers}.",
        )


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, with which modules allocate weights, gives meta tensors; whatever else is computed stays real."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def on_meta(config: Config, settings: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """The model in train mode with its parameters on the meta device and its buffers, computed, on the CPU.

    Buffers are small and not part of checkpoints (rotary frequencies), so they are never to be lost to
    `to_empty`: models/weights.py moves them. `device` is where it will train: the attention back-end and the loss
    of the recipe are chosen for it and installed. Parameters are fp32, fp64 for `train.precision=fp64`.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    settings = copy.deepcopy(settings)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    attention.check_isolation(config, kind)
    name = attention.back_end(config, settings, kind, device)
    try:
        with _EmptyOnMeta():
            model = kind._from_config(settings, dtype=dtype, attn_implementation=name)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model: {kind.__name__} cannot be built: {' '.join(str(error).split())}") from None
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:  # made from ones or zeros
                module._parameters[key] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    model.tie_weights()
    attention.install(model, attention.keeps_apart(config))
    install_loss(model, loss_method(config, model, device))
    return model.train()


def count_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once, also where this rank holds only shards of them."""
    return sum(parameter.numel() for parameter in model.parameters())
