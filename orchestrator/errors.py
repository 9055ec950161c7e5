"""Every error that a user can meet, as one tree.

OrchError                      exit 1   the root; the command line catches it in one place
├── UsageError                 exit 2   a flag, a name or a value that cannot be used
│   └── ConfigError            exit 2   orch.yaml, an inventory or a recipe is wrong
├── UnreachableError           exit 3   something on the network does not answer
│   ├── ConnectError           exit 3   SSH: no route, refused, timed out
│   │   ├── AuthError          exit 3   SSH: the key was not accepted
│   │   └── HostKeyError       exit 3   SSH: the host key is unknown or has changed
│   ├── ConnectionLost         exit 3   an open connection broke
│   └── RegistryError          exit 3   the registry does not answer or refuses
├── DeadlineError              exit 3   something did not happen in its time
├── PreflightError             exit 4   a node is not fit for the run
│   └── LeaseError             exit 4   another run holds the node
├── RemoteError                exit 1   a command on a node failed
├── BuildError                 exit 1   the image could not be built
├── JobFailed                  exit 1   the job itself failed
├── Preempted                  exit 75  stopped after a checkpoint; resume is possible
├── Interrupted                exit 130 INT (143 for TERM)
│   └── Detached               exit 130 the operator's process leaves; the run goes on
└── NodesFailed                worst    several nodes failed; holds each node's error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class OrchError(Exception):
    """What failed, on which node, why (`message`, one line) and what to do next (`hint`).

    `lines` are the last lines of output that belong to the failure, if any.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        hint: str | None = None,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.node = node
        self.hint = hint
        self.lines = tuple(lines)

    def __str__(self) -> str:
        return f"{self.node}: {self.message}" if self.node else self.message

    def on(self, node: str) -> OrchError:
        """The same error, named for `node` unless it already names one."""
        self.node = self.node or node
        return self


class UsageError(OrchError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class UnreachableError(OrchError):
    exit_code = 3


class ConnectError(UnreachableError):
    pass


class AuthError(ConnectError):
    pass


class HostKeyError(ConnectError):
    pass


class ConnectionLost(UnreachableError):
    pass


class RegistryError(UnreachableError):
    pass


class DeadlineError(OrchError):
    exit_code = 3


class PreflightError(OrchError):
    exit_code = 4


class LeaseError(PreflightError):
    pass


class RemoteError(OrchError):
    pass


class BuildError(OrchError):
    pass


class JobFailed(OrchError):
    pass


class Preempted(OrchError):
    exit_code = 75


class Interrupted(OrchError):
    exit_code = 130

    def __init__(self, message: str, *, signum: int = 2, **rest) -> None:
        super().__init__(message, **rest)
        self.exit_code = 128 + signum


class Detached(Interrupted):
    """The operator's process leaves; the run goes on."""


class NodesFailed(OrchError):
    """Several nodes failed; `errors` keeps every node's own error, none hides another."""

    def __init__(self, message: str, errors: Mapping[str, OrchError], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errors = dict(errors)
        codes = [error.exit_code for error in self.errors.values()]
        self.exit_code = max(codes, key=lambda code: (code in (3, 4), code), default=1)


def nearest(word: str, valid: Sequence[str]) -> str | None:
    """The entry of `valid` that `word` most resembles, or None."""
    import difflib

    found = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(what: str, word: str, valid: Sequence[str]) -> str:
    """`unknown WHAT 'word'; did you mean 'x'? (valid: a, b)`, the one way to say it."""
    near = nearest(word, valid)
    guess = f"; did you mean {near!r}?" if near else ""
    listing = ", ".join(sorted(valid)) or "none"
    return f"unknown {what} {word!r}{guess} (valid: {listing})"
