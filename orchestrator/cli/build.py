"""`orch build`."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Json, On


def build(
    on: On = None,
    push: Annotated[bool, typer.Option("--push/--no-push", help="Push to image.repository's registry.")] = True,
    force: Annotated[
        bool,
        typer.Option("--force", help="Build and push even if the tag exists (for a base that has moved on)."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the tag and the build commands; contact nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Build the job's image and push it; prints REPOSITORY@DIGEST.

    The tag is a hash of what goes in (your files, requirements, base, our trainer), so nothing that is
    unchanged is built or pushed again. Heavy layers lie below the code: an edit moves kilobytes. Progress
    goes to stderr.

    Package sources are those that pip uses here (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CERT, pip.conf) or
    the keys image.index_url, image.wheels and image.ca_bundle in orch.yaml. They reach the build as secrets and mounts
    and are never part of the image.
    """
    from orchestrator.cli import output
    from orchestrator.cli.state import state
    from orchestrator.workflows import build as workflow

    config = state().config()
    target = state().target(on) if on else None
    if dry_run:
        ref = workflow.content_ref(config, target)
        commands = [] if config.image.ref else workflow.build_plan(config, target).commands()
        if json:
            output.emit_json({"image": ref.tagged, "tag": ref.tag, "commands": commands})
        else:
            print("\n".join([*commands, ref.tagged]))
        return
    result = workflow.build_image(config, push=push, force=force, target=target, report=output.say)
    if json:
        output.emit_json(result.to_json())
        return
    if not (result.built or result.pushed):
        output.say("nothing to do: the image is up to date")
    print(result.image.pinned)
