"""docs/configuration.md names every key that exists, and none that does not."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from orchestrator.config.load import parse
from orchestrator.config.schema import Config, Image, LocalSection, RunSection, StorageSection, Target
from orchestrator.inventory import _KEYS

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def test_every_key_of_orch_yaml_has_its_row():
    sections = {"image": Image, "run": RunSection, "storage": StorageSection, "local": LocalSection}
    expected = {f"{name}.{key}" for name, model in sections.items() for key in model.model_fields} | {"name"}
    expected |= {"targets.default"} | {f"targets.NAME.{key}" for key in Target.model_fields if key != "name"}
    assert set(sections) | {"name", "targets", "default_target"} == set(Config.model_fields)
    cells = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")]
    written = {key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)}
    slurm = {"container", "shared", "prologue", "sbatch"}  # share a row with `login`
    assert expected - {f"targets.NAME.{key}" for key in slurm} <= written and slurm <= written
    assert {key for key in written if "." in key} <= expected


def test_every_key_of_a_node_has_its_row():
    for key in _KEYS:
        assert f"\n| `{key}` |" in TEXT, key


def test_the_example_is_valid():
    example = next(block for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S) if "targets:" in block)
    parse(yaml.safe_load(example), None, root=Path("/x"))
