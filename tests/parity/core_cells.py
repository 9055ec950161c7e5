"""Cells of the matrix without pipeline: data and tensor parallelism, and faults that they must notice."""

from __future__ import annotations

from tests.parity.cells import Cell


def _model(architecture: str, tied: bool = False) -> tuple[str, ...]:
    return (f"model.architecture={architecture}", *(["model.tie_word_embeddings=true"] if tied else []))


FSDP = ("parallel.strategy=full_shard",)
GRAD_OP = ("parallel.strategy=shard_grad_op",)
HYBRID = ("parallel.strategy=hybrid", "parallel.replicate=2")
TP = ("parallel.tensor=2",)
WHOLE_LOSS = ("parallel.loss=false",)
SEQUENCE = ("parallel.sequence=true",)
UNEVEN = (
    "model.hidden_size=36",
    "model.intermediate_size=44",
    "model.num_attention_heads=6",
    "model.num_key_value_heads=2",
    "model.vocab_size=90",
)
"""Shards of different sizes, and biases and norms of which the last of four ranks has nothing."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "ddp2": (2, ()),
    "fsdp2": (2, FSDP),
    "grad_op2": (2, GRAD_OP),
    "hybrid2x1": (2, HYBRID),
    "tp2": (2, TP),
    "tp2-whole_loss": (2, TP + WHOLE_LOSS),
    "tp2+sp": (2, TP + SEQUENCE),
    "ddp4": (4, ()),
    "fsdp4": (4, FSDP),
    "hsdp2x2": (4, HYBRID),
    "tp4": (4, ("parallel.tensor=4",)),
    "fsdp2×tp2": (4, FSDP + TP),
    "fsdp2×tp2+sp": (4, FSDP + TP + SEQUENCE),
    "grad_op2×tp2": (4, GRAD_OP + TP),
    "ddp2×tp2": (4, TP),
    "ddp2×tp2+sp": (4, TP + SEQUENCE),
    "hsdp2x2×tp2+sp": (8, HYBRID + TP + SEQUENCE),
}


def _cell(layout: str, *more: str, name: str = "", **fields: object) -> Cell:
    world, overrides = LAYOUTS[layout]
    accumulate = fields.get("accumulate", 3)
    tag = "-".join(filter(None, [layout, name, f"acc{accumulate}"]))
    shape = "model.num_hidden_layers=2"
    return Cell(tag.replace("×", "x"), world, (shape, *overrides, *more), **fields)  # type: ignore[arg-type]


def _core_cells() -> list[Cell]:
    cells = [_cell(layout, accumulate=1) for layout, (world, _) in LAYOUTS.items() if world < 8]
    cells += [_cell(layout) for layout in LAYOUTS]
    cells += [_cell(layout, name="packed", packed=True) for layout in ("one", "ddp2", "fsdp2", "tp2", "fsdp2×tp2+sp")]
    for family, layouts in {
        "qwen2": ("tp2+sp", "fsdp2×tp2"),
        "qwen3": ("tp2", "tp2+sp", "fsdp2×tp2+sp", "ddp2×tp2+sp"),
    }.items():
        cells += [_cell(layout, *_model(family), name=family) for layout in layouts]
    cells += [_cell(layout, *_model("gpt2", tied=True), name="gpt2") for layout in ("one", "ddp2", "fsdp2", "hsdp2x2")]
    cells += [_cell(layout, "model.lora.rank=4", name="lora") for layout in ("one", "ddp2", "fsdp2")]
    for layout in ("ddp2", "fsdp2", "grad_op2", "tp2", "tp2+sp", "fsdp2×tp2", "ddp2×tp2+sp"):
        cells.append(_cell(layout, *_model("llama", tied=True), name="tied"))
    cells += [_cell(layout, *UNEVEN, name="uneven") for layout in ("fsdp4", "hsdp2x2", "tp2", "fsdp2×tp2")]
    for precision in ("fp32", "bf16", "fp16"):
        for layout in ("one", "ddp2", "fsdp2", "tp2+sp", "fsdp2×tp2+sp"):
            cells.append(_cell(layout, f"train.precision={precision}", name=precision))
    cells.append(_cell("ddp2×tp2", "train.precision=bf16", name="bf16"))
    for mode in ("full", "selective"):
        for layout in ("ddp2", "fsdp2", "tp2+sp"):
            cells.append(_cell(layout, f"train.activation_checkpoint={mode}", name=f"checkpoint_{mode}"))
    compiled = ("train.compile=true", "train.compile_backend=aot_eager")
    cells += [_cell(layout, *compiled, name="compiled") for layout in ("ddp2", "fsdp2", "tp2+sp")]
    return cells


def _broken_cells() -> list[Cell]:
    """One for each mutation, on the layout where it would do harm."""
    faults = {
        "ddp_average": "ddp2",
        "fsdp_average": "fsdp2",
        "hybrid_no_all_reduce": "hsdp2x2",
        "replicate_average": "ddp2×tp2",
        "mean_of_means": "one",
        "no_sync_never": "ddp2",
        "norm_counts_replicas": "tp2",
        "norm_not_reduced": "fsdp2",
        "norms_gradient_partial": "tp2+sp",
        "every_rank_counts": "tp2",
        "tie_lost": "tp2",
    }
    cells = []
    for mutation, layout in faults.items():
        more = _model("llama", tied=True) if mutation == "tie_lost" else ()
        cells.append(_cell(layout, *more, name=f"broken-{mutation}", mutation=mutation))
    heads = _cell("tp2", *_model("qwen3"), name="broken-head_norms_partial", mutation="norms_gradient_partial")
    leak = _cell("ddp2", name="broken-documents_leak", packed=True, mutation="documents_leak")
    return [*cells, heads, leak]


CELLS: list[Cell] = [*_core_cells(), *_broken_cells()]
