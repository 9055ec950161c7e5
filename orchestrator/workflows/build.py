"""The image of a job, built and pushed where that is still to be done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import image, packages, registry
from orchestrator.context import HashCache
from orchestrator.errors import OrchError, UsageError
from orchestrator.specs import ImageRef

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.config.schema import Target

Report = Callable[[str], None]


@dataclass(frozen=True)
class BuildResult:
    """The image and what was done for it; `to_json` is the object of `orch build --json`."""

    image: ImageRef
    built: bool
    pushed: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.image.pinned,
            "tag": self.image.tag,
            "digest": self.image.digest,
            "built": self.built,
            "pushed": self.pushed,
            "seconds": round(self.seconds, 3),
        }


def variant(config: Config, target: Target | None = None) -> str:
    """`cpu` or `cuda`: image.variant, else what the target's GPUs say.

    A target with `gpus: 0` gets the small CPU image; where nothing is said of GPUs the image has CUDA, which
    trains on a CPU as well. With no target given and none as default, all targets have to agree on the CPU.
    """
    if config.image.variant:
        return config.image.variant
    if target is None:
        try:
            target = config.target()
        except UsageError:
            known = list(config.targets.values())
            return "cpu" if all(one.gpus == 0 for one in known) else "cuda"
    return "cpu" if target.gpus == 0 or target.backend == "local" else "cuda"


def build_plan(config: Config, target: Target | None = None) -> image.BuildPlan:
    """What would be built for `config`. Reads files, contacts nothing.

    Raises ConfigError, BuildError.
    """
    section = config.image
    inventories = [one.inventory for one in config.targets.values()]
    apart = [config.path, config.run.env_file, config.run.secrets_file, *inventories]
    cache = HashCache(_state() / "hashes.json")
    plan = image.plan(
        repository=config.repository(),
        root=section.context,
        variant=variant(config, target),
        base=section.base,
        dockerfile=section.dockerfile,
        platform=section.platform,
        build_args=section.build_args,
        wheels=section.wheels,
        exclude=[path for path in apart if path],
        cache=cache,
    )
    cache.save()
    return plan


def content_ref(config: Config, target: Target | None = None) -> ImageRef:
    """The image that a deploy would use, tag only; contacts nothing. Raises ConfigError, BuildError."""
    if config.image.ref:
        return registry.parse_ref(config.image.ref)
    return build_plan(config, target).image


def ensure_image(
    config: Config,
    *,
    push: bool = True,
    build: bool = True,
    target: Target | None = None,
    plan: image.BuildPlan | None = None,
    report: Report = lambda _line: None,
) -> ImageRef:
    """The image of `config`, built and pushed if it was not there, pinned by digest. See `build_image`."""
    return build_image(config, push=push, build=build, target=target, plan=plan, report=report).image


def build_image(
    config: Config,
    *,
    push: bool = True,
    build: bool = True,
    force: bool = False,
    target: Target | None = None,
    plan: image.BuildPlan | None = None,
    report: Report = lambda _line: None,
) -> BuildResult:
    """Does what is left to do: nothing if the registry has the content tag, a push if only the engine has it.

    `plan` is what `build_plan` gave, where it has been asked before: the image announced is then the one that is made.
    `build=False` refuses to build; `force` builds and pushes in any case (for a base that has moved on).
    Raises UsageError (`build=False` and no image), BuildError, RegistryError, ConfigError.
    """
    started = time.monotonic()
    if config.image.ref:
        return BuildResult(_as_is(config.image.ref, report), False, False, time.monotonic() - started)
    plan = plan or build_plan(config, target)
    # The registry comes first: if it is down, that should be said before minutes of building.
    found = registry.digest(plan.image) if push else None
    if found and not force:
        return BuildResult(_pinned(plan.image, found), False, False, time.monotonic() - started)
    deps = plan.deps.tag if plan.deps else ""
    here = image.present(plan.image.tagged, image.DEFAULT_BASE, image.LOCAL_BASE, *filter(None, [deps]))
    built = force or plan.image.tagged not in here
    if built:
        if not build:
            raise UsageError(
                f"the image {plan.image.tagged} has not been built",
                hint="`orch build`, or leave out --no-build",
            )
        _build(config, plan, here & {image.DEFAULT_BASE, image.LOCAL_BASE} if force else here, report)
    digest = None
    if push:
        report(f"pushing {plan.image.tagged}")
        digest = registry.push(plan.image)
    return BuildResult(_pinned(plan.image, digest), built, push, time.monotonic() - started)


def _as_is(text: str, report: Report) -> ImageRef:
    """image.ref, pinned by digest where its registry can be asked, so that all nodes run the same image."""
    ref = registry.parse_ref(text)
    if ref.digest:
        return ref
    try:
        found = registry.digest(ref)
    except OrchError as error:
        report(f"{text} is not pinned by its digest: {error}")
        return ref
    if found is None:
        report(f"{text} is not pinned by its digest: its registry does not know it, or not to you")
    return _pinned(ref, found)


def _build(config: Config, plan: image.BuildPlan, here: set[str], report: Report) -> None:
    """Builds what of `plan` is not `here` in the engine."""
    section = config.image
    sources = packages.discover_sources(
        os.environ,
        ca_bundle=section.ca_bundle,
        index_url=section.index_url,
        extra_index_url=section.extra_index_url,
        wheels=section.wheels,
    )
    if section.base is None and image.DEFAULT_BASE not in here and image.LOCAL_BASE in here:
        plan = plan.on_base(image.LOCAL_BASE)
    for note in plan.notes:
        report(note)
    if plan.deps and plan.deps.tag not in here:
        if plan.deps.args["VARIANT"] == "cpu" and sources.default_only:
            report("torch comes from the default index, perhaps with CUDA (GBs): docs/images.md, CPU and CUDA")
        report(f"building the layers below the code ({plan.deps.tag}) on {plan.base}")
        image.build(plan.deps, sources)
    report(f"building {plan.image.tagged}")
    image.build(plan.code, sources)


def _pinned(ref: ImageRef, digest: str | None) -> ImageRef:
    return ImageRef(ref.repository, ref.tag, digest)


def _state() -> Path:
    """The operator's state folder."""
    return Path(os.environ.get("ORCH_STATE") or Path.home() / ".local/state/orch")
