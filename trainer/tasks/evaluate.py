"""Perplexity of a model without training: `model.pretrained` on `eval.source`, or on the held-out share of `data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trainer.assemble import (
    Session,
    evaluate_and_report,
    held_out_rows,
    open_data,
    open_model,
    open_session,
    pretrained_folder,
)
from trainer.config import Config
from trainer.context import Context, Outcome
from trainer.errors import ConfigError
from trainer.models.lora import SETTINGS


def run(context: Context) -> Outcome:
    """Raises ConfigError if there is no whole model, or nothing to evaluate on."""
    config = context.config
    if not config.model.pretrained:
        raise ConfigError("task=evaluate needs a model", hint="Set model.pretrained to a folder or a name on the hub.")
    if not config.eval.source and not config.data.holdout:
        raise ConfigError("there is nothing to evaluate on", hint="Set eval.source, or data.holdout above 0.")
    session = open_session(context)
    result = _evaluate(dataclasses.replace(session, context=dataclasses.replace(context, config=_narrow(config))))
    session.close()
    return result


def _narrow(config: Config) -> Config:
    """The documents of eval.source alone, all of them: no training data are opened. No new adapters."""
    model = config.model.model_copy(update={"lora": config.model.lora.model_copy(update={"rank": 0})})
    config = config.model_copy(update={"model": model})
    if not config.eval.source:
        return config
    chosen = config.eval.model_dump(include={"source", "path", "name", "subset", "split", "column"})
    rest = {"remote": None, "limit": None, "shuffle": False, "holdout": 0.0}
    data = config.data.model_copy(update=chosen | rest)
    return config.model_copy(update={"data": data, "eval": config.eval.model_copy(update={"source": None})})


def _evaluate(session: Session) -> Outcome:
    config = session.config
    folder = pretrained_folder(session)
    _check_whole(folder)
    data = open_data(session, folder)
    if data.held_out is None:  # all of eval.source
        data = dataclasses.replace(data, held_out=data.train)
    model = open_model(session, data.tokenizer, folder)
    if model.sparse is not None:
        model.sparse.step(config.train.steps)  # as at the end of training
    result = evaluate_and_report(session, model.parallel, held_out_rows(session, data), 0)
    assert result is not None
    if not result.tokens:
        raise ConfigError("no token of the data is a target", hint="Look at eval.source and its documents.")
    return Outcome("succeeded", 0, result.loss)


def _check_whole(folder: Path | None) -> None:
    if folder is not None and (folder / SETTINGS).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.pretrained={folder} is an adapter, not a whole model",
            hint=f"Merge it first: python -m trainer merge --adapter {folder} --out FOLDER",
        )
