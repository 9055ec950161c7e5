"""What went wrong while a connection was opened, in words that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.connect.endpoint import Endpoint
from orchestrator.errors import AuthError, ConnectError, HostKeyError


def why_unusable(path: Path, error: Exception) -> str:
    """Why the private key in `path` could not be loaded, in words."""
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist"
    if isinstance(error, PermissionError):
        return f"{path} cannot be read"
    if "password" in str(error).lower() or "PasswordRequired" in type(error).__name__:
        return f"{path} is encrypted and not in the ssh-agent (ssh-add {path})"
    return f"{path} is not a private key that can be used"


def denied(endpoint: Endpoint, refused: Sequence[str], unusable: Sequence[str], why: str) -> AuthError:
    """No key was accepted: names those that were `refused`, those that were `unusable`, and `why` else."""
    if refused:
        message = f"{endpoint.where} does not accept {', '.join(refused)}"
        hint = f"put the public key into ~{endpoint.user}/.ssh/authorized_keys there; is the user right?"
    else:
        message = f"no key to log in to {endpoint.where} with"
        hint = "name one with `key:` in the inventory, or load one with ssh-add"
    notes = [*unusable, *([why] if why else [])]
    return AuthError(message + "".join(f"; {note}" for note in notes), node=endpoint.name, hint=hint)


def no_pinned_type(endpoint: Endpoint, types: Sequence[str]) -> HostKeyError:
    return HostKeyError(
        f"{endpoint.host}:{endpoint.port} no longer has a host key of the pinned type ({', '.join(types)})",
        node=endpoint.name,
        hint=f"if the machine was really reinstalled: orch nodes trust {endpoint.name} --replace",
    )


def no_answer(endpoint: Endpoint, waited: float, *, greeted: bool) -> ConnectError:
    """The server took the connection and then said nothing, from the start or after its greeting."""
    what = "stopped answering during the key exchange" if greeted else "accepts, but no SSH server speaks"
    return ConnectError(f"{endpoint.host}:{endpoint.port} {what} (waited {waited:.0f} s)", node=endpoint.name)


def no_session(endpoint: Endpoint, why: str, *, greeted: bool) -> ConnectError:
    hint = None if greeted else "too many connections at once (MaxStartups), or not an SSH server"
    return ConnectError(f"no SSH session with {endpoint.host}:{endpoint.port}: {why}", node=endpoint.name, hint=hint)
