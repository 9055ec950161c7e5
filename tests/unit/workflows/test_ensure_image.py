"""An image that was announced is the image that is made: its plan is used, not made again."""

from __future__ import annotations

import pytest

from orchestrator import registry
from orchestrator.config import Config
from orchestrator.image import Build, BuildPlan
from orchestrator.specs import ImageRef
from orchestrator.workflows import build

REF = ImageRef("localhost:5001/job", "abc")
PLAN = BuildPlan(REF, Build(REF.tagged, (), "Dockerfile"))


def test_the_plan_that_was_announced_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_plan", lambda *_: pytest.fail("hashed a second time"))
    monkeypatch.setattr(registry, "digest", lambda ref: "sha256:1" if ref == REF else None)
    assert build.ensure_image(Config(), plan=PLAN) == ImageRef(REF.repository, REF.tag, "sha256:1")
