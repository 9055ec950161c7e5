"""Which backend a target needs; each is imported only when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.backends.base import Backend
    from orchestrator.config import Config
    from orchestrator.specs import ImageRef, Node, Secret


def make(name: str, config: Config, nodes: Sequence[Node], *, connect: bool = False) -> Backend:
    """The backend called `name`, ready to talk to `nodes`. Raises ConfigError for one that does not exist.

    With `connect` it connects to them in the background from now on; otherwise it contacts nothing until it is used.
    """
    if name == "ssh":
        from orchestrator.backends.ssh import SshBackend
        from orchestrator.connect.ssh import SshConnector

        connector = SshConnector({node.name: node for node in nodes})
        if connect:
            connector.open(nodes)
        return SshBackend(connector, credentials=_credentials)
    if name == "local":
        from orchestrator.backends.local import LocalBackend
        from orchestrator.connect.local import LocalConnector

        return LocalBackend(LocalConnector(), python=str(config.local.python), workdir=str(config.image.context))
    raise ConfigError(f"backend {name!r} is not available in this version (available: ssh, local)")


def _credentials(image: ImageRef) -> Secret | None:
    from orchestrator.registry import auth_config_json

    return auth_config_json(image.registry)
