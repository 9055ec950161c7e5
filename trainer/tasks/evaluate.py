"""Perplexity of a model on held-out data, without training: `model.pretrained` names its folder or hub name."""

from __future__ import annotations

from trainer.assemble import (
    evaluate_and_report,
    held_out_rows,
    open_data,
    open_model,
    open_session,
    pretrained_folder,
)
from trainer.context import Context, Outcome
from trainer.errors import ConfigError


def run(context: Context) -> Outcome:
    """Raises ConfigError if there is no model, or nothing to evaluate on."""
    config = context.config
    if not config.model.pretrained:
        raise ConfigError("task=evaluate needs a model", hint="Set model.pretrained to a folder or a name on the hub.")
    session = open_session(context)
    folder = pretrained_folder(session)
    data = open_data(session, folder)
    model = open_model(session, data.tokenizer, folder)
    result = evaluate_and_report(session, model.parallel, held_out_rows(session, data), 0)
    session.close()
    if result is None:
        raise ConfigError("there is nothing to evaluate on", hint="Set eval.source, or data.holdout above 0.")
    return Outcome("succeeded", 0, result.loss)
