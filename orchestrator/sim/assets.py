"""Where the files lie that the simulated cluster is made of: beside this package, in a checkout as in a wheel."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orchestrator.errors import PreflightError

NODE_FILES = ("node.Dockerfile", "node-entrypoint.sh", "node-sshd.conf", "node-registry.yml")
_ROOT = Path(__file__).resolve().parents[2]


def asset(relative: str) -> Path:
    """The file or folder `images/…` or `compose/…`. Raises PreflightError if this installation lacks it."""
    path = _ROOT / relative
    if path.exists():
        return path
    raise PreflightError(
        f"this installation of orch lacks {relative}", hint="install orch again, or run it from a checkout"
    )


def node_image() -> str:
    """The node image's name; its tag is a hash of everything it is made of."""
    digest = hashlib.sha256()
    for name in NODE_FILES:
        data = asset(f"images/{name}").read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return f"orch-node:{digest.hexdigest()[:12]}"
