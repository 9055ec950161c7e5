"""The node image: built when its files have changed, and what the engine allows it to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from orchestrator.errors import BuildError
from orchestrator.sim import assets, base, machine
from orchestrator.sim.process import Say, docker, say


def ensure_node_image(say: Say = say) -> str:
    """Builds the node image unless it is there; gives its name. Raises BuildError or PreflightError."""
    name = assets.node_image()
    if base.has_image(name):
        return name
    reference = base.ensure_base(base.NODE, say)
    say(f"building the node image {name} (half a minute)")
    folder = assets.asset("images")
    argv = ["buildx", "build", "--load", "--progress", "plain", "--tag", name]
    argv += ["--build-arg", f"BASE_IMAGE={reference}", "--label", "orch.node-image=1"]
    argv += ["--file", str(folder / "node.Dockerfile"), str(folder)]
    docker(*argv, timeout=900, error=BuildError, what="build the node image")
    return name


def allows_privileged(image: str, engine: str, say: Say = say) -> bool:
    """Whether the engine with the id `engine` starts privileged containers; tried once, then remembered."""
    memory = machine.state_dir() / "sim-privileged.json"
    try:
        answers = json.loads(memory.read_text())
    except (OSError, ValueError):
        answers = {}
    if engine not in answers:
        argv = ["run", "--rm", "--privileged", "--cgroupns", "private", "--network", "none", image, "true"]
        answers[engine] = docker(*argv, check=False, timeout=60).returncode == 0
        if not answers[engine]:
            say("this engine refuses privileged containers: the nodes get the capabilities they need one by one")
        memory.write_text(json.dumps(answers))
    return answers[engine]


def remove_images() -> None:
    """Removes what was built here: the images of nodes and jobs, the base images, and the engine's build cache."""
    listed = []
    for label in ("orch.node-image=1", "orch.content"):
        listed += docker("image", "ls", "-q", "--filter", f"label={label}").stdout.split()
    for name in [*dict.fromkeys(listed), base.JOB.local, base.NODE.local]:
        docker("image", "rm", "-f", name, check=False, timeout=120)
    docker("builder", "prune", "--force", check=False, timeout=300)
    (machine.state_dir() / "sim-privileged.json").unlink(missing_ok=True)


def disk_free(path: Path) -> int:
    """Free bytes of the file system on which `path`, or its nearest existing parent, lies."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
