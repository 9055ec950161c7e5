"""One module per task, each with `run(context) -> Outcome`; a recipe names its task."""
