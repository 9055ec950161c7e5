"""The local registry of `orch registry up`: one container, for people who build without a simulated cluster."""

from __future__ import annotations

from orchestrator.sim import engine, health, image, objects, plugins
from orchestrator.sim.process import Say, docker, say, wait_until

CONTAINER = "orch-registry"


def up(port: int = 5001, say: Say = say) -> str:
    """Starts the registry on 127.0.0.1:`port` unless it runs there; gives `localhost:PORT`.

    Raises PreflightError (engine, port) or DeadlineError.
    """
    engine.ensure_engine(say)
    plugins.ensure_plugins(say)
    name = image.ensure_node_image(say)
    if _published() != port:
        objects.check_port(port, CONTAINER, "--port")  # before the one that runs elsewhere is given up
        docker("rm", "-f", CONTAINER, check=False)
        argv = ["run", "-d", "--name", CONTAINER, "--init", "--restart", "unless-stopped"]
        argv += ["--label", "orch.registry=1", "--publish", f"127.0.0.1:{port}:5000"]
        docker(*argv, "--volume", f"{CONTAINER}:/var/lib/registry", name, "registry", what="start the registry")
    hint = f"docker logs {CONTAINER}"
    wait_until(lambda: health.registry_answers(port), f"the registry on port {port}", deadline=30, hint=hint)
    return f"localhost:{port}"


def down(volumes: bool = False, say: Say = say) -> bool:
    """Removes the registry and, with `volumes`, the images in it. False if there was none."""
    had = engine.answers() and docker("rm", "-f", CONTAINER, check=False).stdout.strip() == CONTAINER
    if volumes and engine.answers():
        docker("volume", "rm", CONTAINER, check=False)
    say("the registry is gone" if had else "there was no registry")
    return had


def _published() -> int | None:
    """The port of this machine on which the registry runs, or None."""
    asked = docker("port", CONTAINER, "5000/tcp", check=False)
    return int(asked.stdout.split()[0].rpartition(":")[2]) if asked.returncode == 0 and asked.stdout.strip() else None
