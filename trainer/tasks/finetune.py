"""Fine-tuning a pretrained causal language model, on text or on conversations: training, then a folder to use.

The same loop as pretraining. What differs is where weights come from (`model.pretrained`), which of them train
(`model.lora`), which tokens are targets (data.source=chat: the assistant's), and that the model ends up in
`final/` beside the checkpoints: a whole model for `transformers` and serving engines, or an adapter for peft.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers.configuration_utils import PretrainedConfig

from trainer.assemble import Session, open_session
from trainer.checkpoints import Checkpointer, TrainingState
from trainer.checkpoints.formats.files import Reader
from trainer.checkpoints.formats.full import ADAPTER, WHOLE, Form
from trainer.checkpoints.state import Tensors
from trainer.config import Config
from trainer.context import Context, Outcome
from trainer.models import build, sparse
from trainer.tasks.pretrain import train

FINAL = "final"
"""Name of the folder, beside `step_…`."""


def run(context: Context) -> Outcome:
    """The whole task, on every rank."""
    session = open_session(context)
    outcome = train(session, finish=lambda state, checkpointer: export(session, state, checkpointer))
    session.close()
    return outcome


def export(session: Session, state: TrainingState, checkpointer: Checkpointer) -> None:
    """Writes `final/`. Collective. Raises CheckpointError on all ranks if it cannot be written."""
    form = form_of(session.config, state)
    folder = checkpointer.export(state, FINAL, form)
    session.reporter.say(f"the {'adapter' if form is ADAPTER else 'model'} is in {folder}")


def form_of(config: Config, state: TrainingState) -> Form:
    """Adapters as they are; a whole model in the type of its base, with its masks applied.

    Without a base it keeps its own type, fp32 (training holds parameters in it, whatever train.precision is).
    """
    if state.adapter is not None:
        return ADAPTER
    own = next(state.model.parts[0].parameters()).dtype
    dtype = stored_dtype(state.pretrained) if state.pretrained is not None else own
    cast = None if dtype == own else dtype
    if sparse.resolve(config.model.sparse).mask != "none":
        return Form(convert=Masks(config, state.hf_config, state.step), dtype=cast)
    return WHOLE if cast is None else Form(dtype=cast)


def stored_dtype(folder: Path) -> torch.dtype:
    """The type in which most of the weights in `folder` lie."""
    counts: Counter[torch.dtype] = Counter()
    for shape, dtype in Reader(sorted(folder.glob("model*.safetensors"))).shapes().values():
        counts[dtype] += torch.Size(shape).numel()
    return counts.most_common(1)[0][0]


class Masks:
    """Puts the masks of the last step into whole weights, as plain linear layers have them.

    Works on a copy of the model without memory, because no rank of a pipeline has all layers.
    """

    def __init__(self, config: Config, hf_config: PretrainedConfig, steps: int) -> None:
        """`steps`: finished ones; the last had the number before."""
        self._model = build.on_meta(config, hf_config, torch.device("cpu"))
        sparse.apply_sparse(self._model, config.model.sparse).step(max(steps - 1, 0))

    def __call__(self, tensors: Tensors) -> Tensors:
        return sparse.bake_state(self._model, tensors)
