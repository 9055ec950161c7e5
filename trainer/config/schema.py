"""The typed sections of a recipe. Each belongs to the component that reads it.

Checks that need one section only stand with it; those that need several, or the number of ranks, are in
`checks.py`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TASKS = sorted(path.stem for path in (Path(__file__).parent.parent / "tasks").glob("[a-z]*.py"))
"""One per module of trainer/tasks."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class SparseConfig(Section):
    """Masked linear layers (models/sparse.py)."""

    mask: Literal["none", "threshold", "learned", "bitnet"] = Field(
        "none", description="how weights are masked; bitnet: ternary weights (b1.58); none: dense"
    )
    file: str | None = Field(None, description="YAML or JSON file with these keys, instead of them")
    final_density: float = Field(0.5, gt=0, le=1, description="share of weights kept at the end")
    start_step: int = Field(0, ge=0, description="optimizer step at which the density begins to fall")
    end_step: int = Field(1000, ge=0, description="optimizer step at which it is final_density")
    temperature: float = Field(1.0, gt=0, description="of a learned mask's sigmoid, at the start")
    final_temperature: float = Field(0.1, gt=0, description="and at end_step")
    init_logit: float = Field(3.0, description="a learned mask's logits at the start")
    include: list[str] = Field(["*.self_attn.*", "*.mlp.*"], description="patterns of the linear layers")
    exclude: list[str] = Field(["*lm_head*"], description="patterns that stay dense")


class LoraConfig(Section):
    rank: int = Field(0, ge=0, description="LoRA rank (peft); 0: train all weights")
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="names of the linear layers that get an adapter",
    )


class ModelConfig(Section):
    architecture: str = Field(
        "llama", description="transformers model type with random weights: llama, qwen2, qwen3, gpt2, …"
    )
    pretrained: str | None = Field(
        None, description="folder or hub name with weights and configuration, instead of architecture and sizes"
    )
    revision: str | None = Field(None, description="branch, tag or commit of pretrained on the hub")
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int | None = Field(384, gt=0, description="width of the MLP; null: the architecture's own")
    num_hidden_layers: int = Field(4, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int | None = Field(2, gt=0, description="of keys and values; null: the architecture's own")
    vocab_size: int | None = Field(None, gt=0, description="rows of the embedding; default: the tokenizer's size")
    tie_word_embeddings: bool = True
    initializer_range: float = Field(0.02, gt=0)
    extra: dict[str, Any] = Field({}, description="further keys of the transformers configuration: rope_theta, …")
    attention: Literal["auto", "eager", "sdpa", "flash", "varlen"] = Field(
        "auto", description="auto: varlen on GPUs for packed documents, else sdpa"
    )
    loss: Literal["auto", "plain", "chunked"] = Field(
        "auto", description="chunked: the logits are never whole in memory; auto: on GPUs where it can"
    )
    sparse: SparseConfig = SparseConfig()
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        heads = self.num_attention_heads
        if "head_dim" not in self.extra and (self.hidden_size % heads or (self.hidden_size // heads) % 2):
            raise ValueError(
                f"hidden_size={self.hidden_size} is not an even multiple of num_attention_heads={heads}"
                f" (try {max(1, round(self.hidden_size / (2 * heads))) * 2 * heads})"
            )
        if self.num_key_value_heads and heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={heads} is not divisible by num_key_value_heads={self.num_key_value_heads}"
            )
        return self


class TokenizerConfig(Section):
    path: str | None = Field(None, description="folder or hub name; default: model.pretrained's, else one is trained")
    vocab_size: int = Field(2048, ge=260, description="tokens of the byte-level BPE that is trained")


class DataConfig(Section):
    source: str = Field("pydoc_topics", description="a registered loader (trainer/data/sources)")
    path: str | None = Field(None, description="local file or folder; with remote: the node's cache of it")
    remote: str | None = Field(None, description="mds: where shards are fetched from: s3://…, or a path")
    name: str | None = Field(None, description="hub: name of the data set")
    subset: str | None = Field(None, description="hub: its configuration")
    split: str = Field("train", description="split of a data set; of MDS: a subfolder, if it exists")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    column: str | None = Field(None, description="column with the text, tokens or messages; default: found by itself")
    limit: int | None = Field(None, gt=0, description="use only the first documents")
    seq_len: int = Field(128, ge=2, description="tokens per row")
    strategy: Literal["pack", "fit", "overflow", "trunc"] = Field(
        "pack",
        description="pack: joined, none dropped; fit: the same, none cut that fits a row; overflow: windows with"
        " stride; trunc: first window",
    )
    stride: int = Field(128, ge=0, description="overflow: tokens that a window repeats as context of the next")
    cross_document: bool = Field(False, description="let packed documents attend to each other")
    holdout: float = Field(0.05, ge=0, lt=1, description="share of the documents kept for evaluation")
    shuffle: bool = Field(True, description="new order of documents in each epoch")
    workers: int = Field(0, ge=0, description="loader processes per rank; 0: in the training process")
    prefetch: int = Field(2, ge=1, description="steps that loader processes prepare ahead")
    cache_limit: str | None = Field(None, description="mds with remote: most bytes of a node's cache, as 100gb")
    predownload: int = Field(8, ge=0, description="mds with remote: documents per lane whose shards are fetched ahead")
    prepare_timeout: float = Field(600, gt=0, description="seconds to wait for the node's rank 0 to prepare data")


class ParallelConfig(Section):
    strategy: Literal["ddp", "full_shard", "shard_grad_op", "hybrid"] = Field(
        "ddp", description="data parallelism: ddp, or FSDP2 in full, gradients and optimizer only, or within groups"
    )
    replicate: int | None = Field(
        None, gt=0, description="hybrid: copies of the sharded model; default: one per node"
    )
    tensor: int = Field(1, gt=0, description="ranks that share each layer (keep within a node)")
    sequence: bool = Field(False, description="shard activations between tensor-parallel layers along the sequence")
    loss: bool = Field(True, description="tensor parallel: compute the loss on sharded logits")
    pipeline: int = Field(1, gt=0, description="ranks that each hold some of the layers")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="order of the pipeline's micro-batches; zero_bubble: ZBV"
    )
    stages_per_rank: int = Field(2, gt=1, description="interleaved: model pieces on each rank")


class TrainConfig(Section):
    steps: int = Field(160, ge=0, description="optimizer steps in all")
    global_batch: int = Field(32, gt=0, description="rows per optimizer step, over all ranks")
    micro_batch: int = Field(8, gt=0, description="rows per forward pass and rank; the rest is accumulated")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="bf16, fp16: compute in it, with fp32 parameters, optimizer and reductions"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    activation_checkpoint: Literal["none", "full", "selective"] = Field(
        "none", description="recompute in backward: whole layers, or all but the matrix products and attention"
    )
    compile: bool = Field(False, description="torch.compile each layer (not with zero_bubble)")
    compile_backend: str = Field("inductor", description="torch.compile's backend")
    deterministic: bool = Field(False, description="only deterministic kernels; slower")
    non_finite: Literal["skip", "stop"] = Field("skip", description="a step whose gradient norm is NaN or infinite")
    max_bad_steps: int = Field(3, ge=0, description="skip: such steps in a row before the run fails")


class OptimConfig(Section):
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd", "two_phase"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then decay_steps down; two_phase: two lines via lr_mid"
    )
    warmup_steps: int = Field(20, ge=0, description="optimizer steps of linear warm-up")
    decay_steps: int | None = Field(None, gt=0, description="wsd: steps of the final decay; default: a fifth")
    lr_mid: float | None = Field(None, gt=0, description="two_phase: rate at half time; no weight decay after it")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="rate at the end, as a share of lr")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only, never on norms and biases")
    no_decay: list[str] = Field([], description="patterns of further parameters without decay, as *embed_tokens*")
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0: no clipping")
    state_dtype: Literal["fp32", "bf16"] = Field("fp32", description="of AdamW's moments; bf16 halves their memory")
    fused: bool | None = Field(None, description="torch's fused AdamW; default: where it exists")


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    micro_batch: int = Field(16, gt=0)
    source: str | None = Field(None, description="a registered loader; default: the held-out share of data")
    path: str | None = Field(None, description="its file or folder, for example of save_to_disk")
    name: str | None = Field(None, description="hub: name of the data set")
    subset: str | None = Field(None, description="hub: its configuration")
    split: str = Field("validation", description="its split")
    column: str | None = Field(None, description="its column with the text")
    max_rows: int | None = Field(None, gt=0, description="evaluate at most so many rows, drawn with the seed")


class CheckpointConfig(Section):
    type: Literal["auto", "full", "shard", "local"] = Field(
        "auto", description="full: one whole copy; shard: DCP, any world size; local: per rank, same layout only"
    )
    every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end and on a stop")
    at_end: bool = Field(True, description="also after the last step; a stop always writes one")
    keep_last: int = Field(2, ge=1, description="newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="and each whose step is a multiple of this; 0: none")
    asynchronous: bool = Field(True, description="write while training goes on")
    resume: str = Field("auto", description="auto: newest that verifies on any node; none; or a step_… folder")
    skip_optimizer: bool = Field(False, description="resume with new moments and loss scale")
    remote: str | None = Field(None, description="also upload to s3://… or a mounted path, as <remote>/<name>")
    on_failure: Literal["warn", "stop"] = Field("warn", description="when writing fails, for example on a full disk")


class LogConfig(Section):
    every: int = Field(10, gt=0, description="steps between console lines")
    tensorboard: bool = True
    wandb: str | None = Field(None, description="project on Weights & Biases; WANDB_API_KEY comes as a secret")
    heartbeat: float = Field(10, gt=0, description="seconds between heartbeat events of every rank")
    profile: tuple[int, int] | None = Field(None, description="first and last step to trace with torch.profiler")
    hang_factor: float = Field(20, ge=0, description="dump all stacks after so many usual step times; 0: never")
    hang_floor: float = Field(120, gt=0, description="but not before so many seconds")


class SampleConfig(Section):
    prompt: str = Field("The", description="start of the text generated at the end")
    max_new_tokens: int = Field(60, ge=0, description="0: no sample")
    temperature: float = Field(0.8, ge=0, description="0: greedy")


class DistributedConfig(Section):
    timeout: float = Field(600, gt=0, description="seconds until a collective gives up")


class Config(Section):
    """One training run, complete."""

    name: str = Field(
        "train", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="run folder without ORCH_RUN_DIR"
    )
    task: str = Field("pretrain", description="one of trainer/tasks")
    seed: int = Field(1234, ge=0)
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    distributed: DistributedConfig = DistributedConfig()

    @field_validator("task")
    @classmethod
    def _task_exists(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r} (valid: {', '.join(TASKS)})")
        return task

    def hash(self) -> str:
        """16 hex digits that change with any value of the configuration."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
