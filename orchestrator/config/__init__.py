"""orch.yaml: found, validated, and turned into a job.

`load` reads the file into a `Config`; `job_spec` joins it with the command line into the `JobSpec` that backends plan.
"""

from __future__ import annotations

from orchestrator.config.job import job_name, job_spec, parse_sets, recipe_argument, recipes
from orchestrator.config.load import load
from orchestrator.config.schema import Config, Image, Target

__all__ = [
    "Config",
    "Image",
    "Target",
    "job_name",
    "job_spec",
    "load",
    "parse_sets",
    "recipe_argument",
    "recipes",
]
