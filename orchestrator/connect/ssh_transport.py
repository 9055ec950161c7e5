"""One authenticated SSH connection. The only file that imports paramiko; import it lazily.

paramiko does the protocol; what is ours is the host-key policy, deadlines on every step, answers
to several global requests at once, a liveness probe that a frozen sshd cannot satisfy, and the
exit code of a command that died of a signal.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # paramiko names ciphers that cryptography calls outdated
    import paramiko
    from paramiko import common as wire
    from paramiko.packet import Packetizer

from orchestrator.connect import known_hosts, ssh_errors
from orchestrator.connect.endpoint import Endpoint, with_includes
from orchestrator.connect.known_hosts import HostKey
from orchestrator.errors import AuthError, ConfigError, ConnectError, HostKeyError

logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)
# paramiko logs tracebacks of its reader thread; every error reaches the user as ours instead.

PROBE_EVERY, PROBE_LIMIT = 3.0, 9.0
"""Seconds of silence before the server is asked for a sign of life; seconds it then has to answer."""

_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
"""Signature algorithms of a key type where they are not called the same. (No SHA-1.)"""


class Refused(Exception):
    """The server would not open another channel (its MaxSessions, or it allows no shell)."""


class _Packetizer(Packetizer):
    # RFC 4344 allows 2^32 blocks under one AES key; paramiko's 512 MB would rekey in each image pull.
    REKEY_BYTES = 2**34
    REKEY_PACKETS = 2**30

    def start_handshake(self, timeout: float) -> None:
        """paramiko's timer is a thread that is no daemon and delays exit; `connect` has a deadline."""


class Transport(paramiko.Transport):
    """A client connection; see the module's text for what differs from paramiko's own."""

    _preferred_ciphers = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes192-ctr",
        "aes256-ctr",
    )
    _CLIENT_ID = "orch"

    def __init__(self, sock: Any) -> None:
        super().__init__(sock, packetizer_class=_Packetizer)
        self._asked: deque[Callable[[Any], None]] = deque()
        self._asking = threading.Lock()
        self._probe_sent = 0.0
        self._held: list[Any] = []
        self._listeners: dict[int, Callable[[Any], None]] = {}
        self._handler_table[wire.MSG_REQUEST_SUCCESS] = lambda m: self._answered(m)
        self._handler_table[wire.MSG_REQUEST_FAILURE] = lambda m: self._answered(None)
        self._channel_handler_table = {
            **paramiko.Transport._channel_handler_table,
            wire.MSG_CHANNEL_REQUEST: _channel_request,
        }
        self._tcp_handler = self._forwarded

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Only plain host keys: certificates are not checked, so they are not asked for."""
        return self._filter_algorithm("keys")

    # ---- global requests: answered in the order in which they were asked (RFC 4254, 4)

    def ask(self, kind: str, *data: object, timeout: float) -> Any:
        """The server's answer (a Message) or None if it refuses. Raises TimeoutError, ConnectionError."""
        answers: list[Any] = []
        done = threading.Event()
        self._ask(kind, data, lambda m: (answers.append(m), done.set()))
        deadline = time.monotonic() + timeout
        while not done.wait(0.1):
            if not self.is_active():
                raise ConnectionError("the connection broke")
            if time.monotonic() > deadline:
                raise TimeoutError
        return answers[0]

    def _ask(self, kind: str, data: tuple, then: Callable[[Any], None]) -> None:
        message = paramiko.Message()
        message.add_byte(wire.cMSG_GLOBAL_REQUEST)
        message.add_string(kind)
        message.add_boolean(True)
        if data:
            message.add(*data)
        with self._asking:
            self._asked.append(then)
            self._send_user_message(message)

    def _answered(self, message: Any) -> None:
        if self._asked:
            self._asked.popleft()(message)

    # ---- liveness

    def watch(self) -> None:
        """From now on a server that says nothing for about 12 s, though asked, counts as dead."""
        self.packetizer.set_keepalive(PROBE_EVERY, self._probe)

    def _probe(self) -> None:
        """Called by the reader thread, while nothing arrives."""
        now = time.monotonic()
        if not self._probe_sent:
            self._probe_sent = now
            self._ask("keepalive@openssh.com", (), lambda m: setattr(self, "_probe_sent", 0.0))
        elif now - self._probe_sent > PROBE_LIMIT - 0.5:
            raise EOFError

    # ---- sending while keys are exchanged

    def _send_user_message(self, data: Any) -> None:
        """As paramiko's, but the reader thread never waits for what only it can receive."""
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            self._held.append(data)
            return
        super()._send_user_message(data)

    def _parse_newkeys(self, m: Any) -> None:
        super()._parse_newkeys(m)
        held, self._held = self._held, []
        for data in held:
            super()._send_user_message(data)

    # ---- commands and forwards

    def start_command(self, command: str, *, window: int, timeout: float) -> Any:
        """A channel with `command` started on it; its output is not read yet.

        The answer to the request is not awaited (a round trip less): a server that refuses it
        closes the channel without an exit status. Raises Refused, TimeoutError, ConnectionError.
        """
        try:
            channel = self.open_session(window_size=window, timeout=timeout)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._not_opened(error) from error
        channel._event_pending()
        self._request(channel, "exec", command, answer=True)
        return channel

    def send_signal(self, channel: Any, name: str) -> None:
        """Asks the server to send SIG`name` to the process group of the channel's command."""
        self._request(channel, "signal", name, answer=False)

    def _request(self, channel: Any, kind: str, value: str, *, answer: bool) -> None:
        message = paramiko.Message()
        message.add_byte(wire.cMSG_CHANNEL_REQUEST)
        message.add_int(channel.remote_chanid)
        message.add_string(kind)
        message.add_boolean(answer)
        message.add_string(value)
        self._send_user_message(message)

    def open_tunnel(self, host: str, port: int, timeout: float) -> Any:
        """A channel to `host:port` as the server sees it (a jump host's work). Raises as above."""
        try:
            return self.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._not_opened(error) from error

    def _not_opened(self, error: Exception) -> Exception:
        """Why no channel was opened. With several threads, paramiko gives the reason to one of them only."""
        if not self.is_active():
            return ConnectionError(str(error))
        if "imeout" in str(error):
            return TimeoutError(str(error))
        return Refused(error.text if isinstance(error, paramiko.ChannelException) else "refused")

    def listen(self, port: int, accept: Callable[[Any], None], timeout: float) -> int | None:
        """Makes the server listen on its 127.0.0.1:`port` (0: any); the port, or None if it refuses."""
        if port in self._listeners:
            return None
        answer = self.ask("tcpip-forward", "127.0.0.1", port, timeout=timeout)
        if answer is None:
            return None
        port = port or answer.get_int()
        self._listeners[port] = accept
        return port

    def unlisten(self, port: int, timeout: float) -> None:
        self._listeners.pop(port, None)
        self.ask("cancel-tcpip-forward", "127.0.0.1", port, timeout=timeout)

    def _forwarded(self, channel: Any, origin: tuple[str, int], server: tuple[str, int]) -> None:
        accept = self._listeners.get(server[1])
        # Closing needs the channel to be known to this thread only; nothing waits here.
        accept(channel) if accept else channel.close()


def _channel_request(channel: Any, message: Any) -> None:
    """`exit-signal` becomes exit code 128 + N; the rest is paramiko's."""
    position = message.packet.tell()
    if message.get_text() == "exit-signal":
        message.get_boolean()
        name = "SIG" + message.get_text()
        channel.exit_status = 128 + getattr(signal, name, signal.SIGKILL)
        channel.status_event.set()
        return
    message.packet.seek(position)
    channel._handle_request(message)


# ---- opening


def connect(endpoint: Endpoint, sock: Any, deadline: float, keys: KeyRing) -> Transport:
    """An authenticated transport over `sock`, before `deadline` (monotonic). Closes `sock` on failure.

    Raises ConnectError, HostKeyError or AuthError.
    """
    transport = _handshake(endpoint, sock, deadline, _wanted(endpoint))
    try:
        known_hosts.check(endpoint.alias, _host_key(transport), endpoint.known_hosts, node=endpoint.name)
        _authenticate(transport, endpoint, deadline, keys)
    except BaseException:
        transport.close()
        raise
    transport.watch()
    return transport


def scan(endpoint: Endpoint, open_sock: Callable[[], Any], deadline: float) -> list[HostKey]:
    """Every host key that the server has, without logging in: one short connection per key type."""
    found = []
    for algorithms in (("ssh-ed25519",), ("ecdsa-sha2-nistp256",), _ALGORITHMS["ssh-rsa"]):
        try:
            transport = _handshake(endpoint, open_sock(), deadline, algorithms)
        except HostKeyError:
            continue  # it has no key of this type
        found.append(_host_key(transport))
        transport.close()
    return found


def _wanted(endpoint: Endpoint) -> tuple[str, ...]:
    """The algorithms of the pinned key types only, as OpenSSH asks; empty: whatever there is."""
    types = known_hosts.pinned_types(endpoint.alias, endpoint.known_hosts)
    names = [name for kind in types for name in _ALGORITHMS.get(kind, (kind,))]
    return tuple(name for name in names if name in paramiko.Transport._preferred_keys)


def _handshake(endpoint: Endpoint, sock: Any, deadline: float, algorithms: tuple[str, ...]) -> Transport:
    left = max(deadline - time.monotonic(), 0.1)
    transport = Transport(sock)
    if algorithms:
        transport._preferred_keys = algorithms
    else:
        transport._preferred_keys = tuple(
            name for name in transport._preferred_keys if name not in ("ssh-rsa", "ssh-dss")
        )
    transport.banner_timeout = left + 1
    done = threading.Event()
    try:
        transport.start_client(event=done)
        answered = done.wait(left)
        if answered and transport.is_active():
            return transport
        error = transport.get_exception()
        greeted = transport.remote_version
    except BaseException:
        transport.close()
        raise
    transport.close()
    sock.close()
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer) and "host key" in str(error):
        raise ssh_errors.no_pinned_type(endpoint, algorithms)
    if not answered:
        raise ssh_errors.no_answer(endpoint, left, greeted=bool(greeted))
    why = "the server closed the connection" if error is None or isinstance(error, EOFError) else str(error)
    raise ssh_errors.no_session(endpoint, why, greeted=bool(greeted)) from error


def _host_key(transport: Transport) -> HostKey:
    key = transport.host_key
    return HostKey(key.get_name(), key.get_base64())


class KeyRing:
    """Private keys, each file read once however many nodes use it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[Path, Any] = {}

    def load(self, path: Path) -> Any:
        """A key, or the exception that its file gave."""
        with self._lock:
            if path not in self._loaded:
                try:
                    self._loaded[path] = paramiko.PKey.from_path(path)
                except Exception as error:  # each crypto backend has errors of its own
                    self._loaded[path] = error
            return self._loaded[path]


def _authenticate(transport: Transport, endpoint: Endpoint, deadline: float, ring: KeyRing) -> None:
    """Offers keys in OpenSSH's order (agent, then files) until one is accepted."""
    refused: list[str] = []
    unusable: list[str] = []
    agent = paramiko.Agent() if os.environ.get("SSH_AUTH_SOCK") else None
    try:
        for label, key in _candidates(endpoint, agent, ring, unusable):
            transport.auth_timeout = max(deadline - time.monotonic(), 0.1)
            try:
                more = transport.auth_publickey(endpoint.user, key)
            except paramiko.BadAuthenticationType as error:
                raise AuthError(
                    f"{endpoint.where} accepts no keys, only: {', '.join(error.allowed_types) or 'nothing'}",
                    node=endpoint.name,
                    hint="allow PubkeyAuthentication in its sshd_config",
                ) from error
            except paramiko.AuthenticationException as error:
                if time.monotonic() >= deadline:
                    raise ConnectError("the login was not answered in time", node=endpoint.name) from error
                refused.append(label)
                if not transport.is_active():
                    break
                continue
            except (paramiko.SSHException, EOFError, OSError) as error:
                refused.append(label)
                if transport.is_active():
                    continue  # the key could not sign (a locked agent, an odd type)
                raise ssh_errors.denied(endpoint, refused, unusable, "the server hung up") from error
            if not more:
                return
            raise AuthError(
                f"{endpoint.where} wants a second factor ({', '.join(more)}) after the key",
                node=endpoint.name,
                hint="orch logs in with keys only",
            )
    finally:
        if agent:
            agent.close()
    raise ssh_errors.denied(endpoint, refused, unusable, "")


def _candidates(endpoint: Endpoint, agent: Any, ring: KeyRing, unusable: list[str]) -> Any:
    """(label, key) to offer. What cannot be used goes to `unusable` in words."""
    held = {key.asbytes(): key for key in agent.get_keys()} if agent else {}
    blobs = {_public_blob(path): path for path in endpoint.keys}
    for blob, key in held.items():
        path = blobs.get(blob)
        if path or not endpoint.only_keys:
            yield (f"{path} (agent)" if path else f"agent key {key.get_name()}"), key
    for path in endpoint.keys:
        if _public_blob(path) in held:
            continue
        key = ring.load(path)
        if isinstance(key, Exception):
            unusable.append(ssh_errors.why_unusable(path, key))
        else:
            yield str(path), key


def _public_blob(path: Path) -> bytes | None:
    try:
        return paramiko.PublicBlob.from_file(str(path) + ".pub").key_blob
    except Exception:  # absent or odd: then only the private file counts
        return None


def ssh_config(file: Path) -> Callable[[str], Mapping[str, Any]]:
    """The lookup of an ssh_config file, `Include` and `Match` honoured. Raises ConfigError."""
    try:
        config = paramiko.SSHConfig.from_text(with_includes(file))
    except Exception as error:
        raise ConfigError(f"cannot read {file}: {error}") from error

    def lookup(name: str) -> Mapping[str, Any]:
        try:
            return dict(config.lookup(name))
        except Exception as error:
            raise ConfigError(f"cannot read {file} for {name}: {error}") from error

    return lookup
