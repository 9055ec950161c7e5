"""Building the model: a transformers class with random weights, the same on every rank."""

from __future__ import annotations

import torch

# The class's own module: the same import time as `from transformers import …`, without its lazy lookup.
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from trainer.config import Config
from trainer.data.tokenizer import BOS_ID, EOS_ID, PAD_ID


def build_model(config: Config, vocab_size: int, device: torch.device) -> LlamaForCausalLM:
    """A Llama-architecture causal LM, initialised from `config.seed`, on `device`, in train mode.

    Weights are drawn on the CPU in fp32 whatever the device and precision are, so that the seed alone
    decides them.
    """
    model_config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=config.data.seq_len,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        use_cache=False,
        **config.model.model_dump(exclude={"architecture"}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(model_config)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    return model.to(device=device, dtype=dtype).train()


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
