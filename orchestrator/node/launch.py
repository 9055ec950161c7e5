"""Runs one node's part of a job: `python3 launch.py RUNDIR`, in a container, a venv or a Slurm step.

Needs Linux, Python >= 3.9 and nothing else; the host side reads this file and never imports it.

    launch.py RUNDIR                 the launcher: one per node
    └── torch.distributed.run …      torchrun, in a session of its own (absent with launcher "none")
        └── launch.py --rank SOCKET  one per rank: gives its rank's output to the launcher as one pipe
            └── the user's command

The launcher alone interprets exits: the rank processes tell it every exit code over SOCKET and end
only when it says "bye", so torchrun never knows of a failure, or of a checkpoint's 75, before it does.
The formats (job.json, secrets.env, log, stop, result.json) are described in docs/launcher.md.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback

try:
    import ctypes

    LIBC = ctypes.CDLL(None)
except (ImportError, OSError):  # a Python built without libffi: the kernel's help against orphans is missing
    LIBC = None

PREEMPTED, NOT_STARTABLE, NOT_FOUND, STOPPED = 75, 4, 127, 143
PIECE = 64 * 1024  # longest line in the log, bytes
RECENT = 16 * 1024  # how much of each rank's last output is kept for result.json, bytes
DRAIN = 2.0  # seconds for the last output after the last rank's end
FAIL_GRACE = 3.0  # seconds for the other ranks of this node after the first failure
LINGER = 2.0  # seconds that the head keeps the rendezvous after its ranks were preempted
SUBREAPER, PARENT_DEATH_SIGNAL = 36, 1  # options of prctl(2)


class Refused(Exception):
    """The job cannot be started here: exit code, reason, hint."""

    def __init__(self, code: int, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason, self.hint = code, reason, hint


# ---- processes ---------------------------------------------------------------------------------


def prctl(option: int, value: int) -> None:
    if LIBC is not None:
        LIBC.prctl(option, value, 0, 0, 0)


def spawn(argv: list, env: dict, output: int) -> subprocess.Popen:
    """Starts `argv` in its own session, its stdout and stderr on `output`; it dies with this process."""
    parent = os.getpid()

    def die_with_parent() -> None:
        prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def descendants(root: int) -> list:
    """The pids of all living processes below `root` (zombies left out)."""
    children: dict = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/" + name + "/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            children.setdefault(int(parent), []).append((int(name), state))
    found, queue = [], [root]
    while queue:
        for pid, state in children.get(queue.pop(), ()):
            queue.append(pid)
            if state not in (b"Z", b"X"):
                found.append(pid)
    return found


def reap() -> dict:
    """Collects every ended child: pid → exit code, negative for signals."""
    ended = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def kill_tree(root: int, deadline: float = 5.0) -> dict:
    """SIGKILL to everything below `root`, until nothing is left; the children that were reaped."""
    until, ended = time.monotonic() + deadline, reap()
    while time.monotonic() < until:
        pids = descendants(root)
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        ended.update(reap())
    return ended


def wake_on_signals(*signals: int) -> socket.socket:
    """A socket from which the numbers of arriving signals are read, one byte each."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN: children would inherit that
    return reader


def oom_kills() -> int:
    """How many processes of this cgroup (v2, v1; else of this machine) the kernel killed for memory."""
    files = []
    try:
        with open("/proc/self/cgroup") as file:
            for line in file:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                if not controllers:
                    files += ["/sys/fs/cgroup" + path + "/memory.events", "/sys/fs/cgroup/memory.events"]
                elif "memory" in controllers.split(","):
                    folder = "/sys/fs/cgroup/memory"
                    files += [folder + path + "/memory.oom_control", folder + "/memory.oom_control"]
    except OSError:
        pass
    for name in [*files, "/proc/vmstat"]:
        try:
            with open(name) as file:
                found = re.search(r"^oom_kill (\d+)$", file.read(), re.M)
        except OSError:
            continue
        if found:
            return int(found.group(1))
    return 0


# ---- network -----------------------------------------------------------------------------------


def interfaces() -> list:
    """(interface, address) of every address of this machine, IPv4 with secondary ones, then IPv6."""
    found = []
    size = 40 if struct.calcsize("P") == 8 else 32
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        room = array.array("B", bytes(size * 1024))
        request = struct.pack("iP", len(room), room.buffer_info()[0])
        length = struct.unpack("iP", fcntl.ioctl(probe, 0x8912, request))[0]  # SIOCGIFCONF
        for start in range(0, length, size):
            entry = room[start : start + size].tobytes()
            name = entry[:16].split(b"\0", 1)[0].decode().partition(":")[0]
            found.append((name, socket.inet_ntoa(entry[20:24])))
    try:
        with open("/proc/net/if_inet6") as file:
            rows = [line.split() for line in file]
    except OSError:
        rows = []
    return found + [(row[5], socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0]))) for row in rows]


def find_interface(address: str, owned: list) -> str:
    """The interface that owns `address`, an IP address or a host name; raises Refused."""
    try:
        answers = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        wanted = {answer[4][0].partition("%")[0] for answer in answers}
    except OSError as error:
        reason = f"the address {address} of this node does not resolve here ({error})"
        raise Refused(
            NOT_STARTABLE, reason, "give the node's IP address as `private:` in the inventory"
        ) from None
    for name, own in owned:
        if own in wanted and (name != "lo" or own == address):
            return name
    if address in wanted and address.startswith("127."):
        return "lo"
    have = ", ".join(f"{own} on {name}" for name, own in owned if name != "lo") or "none"
    other = "" if wanted == {address} else " ({} here)".format(", ".join(sorted(wanted)))
    reason = f"no interface of this node owns {address}{other}; it has {have}"
    hint = "set `private:` of this node in the inventory to the address that the other nodes reach"
    raise Refused(NOT_STARTABLE, reason, hint)


def check_port(port: int) -> None:
    """Raises Refused unless `port` can be bound on all addresses, as torchrun's store will."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is no obstacle
            probe.bind(("", port))
            probe.listen(1)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is taken by another process on this node" if taken else "cannot be used: " + error.strerror
        hint = "choose another port with `run.port` in orch.yaml, or end the process that holds it"
        raise Refused(NOT_STARTABLE, f"rendezvous port {port} {why}", hint) from None


def answers(endpoint: str) -> str:
    """ "" if something listens at `host:port`, else why not."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


# ---- output ------------------------------------------------------------------------------------

HEADER = re.compile(r"^(.{0,60}?)(?:\+ Exception Group )?Traceback \(most recent call last\):\s*$")
EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*)(?::\s?(.*))?$")
CHAIN = ("The above exception was", "During handling of the above")


class Tracebacks:
    """Finds the last Python traceback in a rank's lines, with torch's `[rank0]: ` prefix or without."""

    def __init__(self) -> None:
        self.last: dict = {}  # type, message, traceback, time_ns
        self.open: list = []  # the lines of an unfinished one
        self.earlier: list = []  # the traceback that the next one is chained to
        self.prefix = ""
        self.strays = 0

    @staticmethod
    def concerns(block: bytes) -> bool:
        return b"Traceback (" in block or b'  File "' in block or b" above exception" in block

    def feed(self, line: str) -> None:
        header = HEADER.match(line) if "Traceback (" in line else None
        if header or (not self.open and line.startswith('  File "')):  # a SyntaxError has no header
            self.prefix = header.group(1) if header else ""
            self.open, self.earlier, self.strays = [*self.earlier, line[len(self.prefix) :]], [], 0
            return
        own = line.startswith(self.prefix)
        text = line[len(self.prefix) :] if own else line
        if not self.open:
            if self.last and text.startswith(CHAIN):
                self.earlier = [*self.last["traceback"].split("\n"), "", text, ""]
            return
        exception = EXCEPTION.match(text)
        if (not own and self.prefix.startswith("[rank")) or not text or text[0].isspace() or text[0] in "|+":
            if own or text[:1].isspace():
                self.open.append(text)
        elif exception and ("Traceback" in "".join(self.open) or exception.group(1).endswith("Error")):
            kind, message = exception.group(1).rpartition(".")[2], exception.group(2) or ""
            lines = "\n".join([*self.open, text])
            self.last = {"type": kind, "message": message, "traceback": lines, "time_ns": time.time_ns()}
            self.open = []
            return
        else:
            self.strays += 1  # another thread's line
        if self.strays > 20 or len(self.open) > 2000:
            self.open = []


class Lines:
    """Cuts one source's bytes into whole lines `RANK\\ttext`; masks secrets, thins progress bars."""

    def __init__(self, name: str, secrets: list) -> None:
        self.prefix = name.encode() + b"\t"
        self.secrets = secrets
        self.limit = PIECE + max([len(secret) for secret in secrets], default=0)
        self.tail = b""  # the unfinished line
        self.update = b""  # the last progress update (ended by \r), if it is not written yet
        self.in_row = False  # updates were seen since the last \n
        self.updated = float("-inf")
        self.recent = b""
        self.tracebacks = Tracebacks()

    def feed(self, data: bytes, now: float) -> bytes:
        """The log's text for `data`: whole lines only."""
        data = self.tail + data
        for secret in self.secrets:
            data = data.replace(secret, b"***")
        if self.in_row or b"\r" in data:
            block, self.tail = self._rows(data, now)
        else:
            cut = data.rfind(b"\n") + 1
            block, self.tail = data[:cut], data[cut:]
        block = split_long(block)
        while len(self.tail) >= self.limit:  # the last bytes stay back: a secret may begin there
            cut = piece_end(self.tail, 0)
            block, self.tail = block + self.tail[:cut] + b"\n", self.tail[cut:]
        return self._emit(block)

    def _rows(self, data: bytes, now: float) -> tuple:
        """What a terminal would show in the end: of a row's progress updates only the last one."""
        *rows, rest = data.replace(b"\r\n", b"\n").split(b"\n")
        block = b""
        for row in rows:
            final = self._overwrite(row)
            if final.strip() or not self.in_row:
                block += final + b"\n"
            elif self.update:
                block += self.update + b"\n"
            self.update, self.in_row = b"", False
        rest = self._overwrite(rest)
        return block + self._due(now), rest

    def _overwrite(self, row: bytes) -> bytes:
        """Keeps the last update of `row` that shows anything; what follows it."""
        *updates, final = row.split(b"\r")
        self.in_row = self.in_row or bool(updates)
        self.update = next((text for text in reversed(updates) if text.strip()), self.update)
        return final

    def _due(self, now: float) -> bytes:
        if not self.update or now - self.updated < 1.0:
            return b""
        line, self.update, self.updated = self.update + b"\n", b"", now
        return line

    def tick(self, now: float) -> bytes:
        """A progress update whose second is over."""
        return self._emit(self._due(now))

    def end(self) -> bytes:
        """The unfinished line, or else the last progress update."""
        rest = self.tail if self.tail.strip() else self.update
        self.tail = self.update = b""
        return self._emit(split_long(rest + b"\n")) if rest else b""

    def _emit(self, block: bytes) -> bytes:
        if not block:
            return b""
        self.recent = (self.recent + block[-RECENT:])[-RECENT:]
        if self.tracebacks.open or Tracebacks.concerns(block):
            for line in block.decode("utf-8", "replace").split("\n")[:-1]:
                self.tracebacks.feed(line)
        return self.prefix + block[:-1].replace(b"\n", b"\n" + self.prefix) + b"\n"

    def last_lines(self, count: int = 20) -> list:
        lines = self.recent.decode("utf-8", "replace").split("\n")[:-1]
        return [line[:2000] for line in lines[-count:]]


def piece_end(data: bytes, start: int) -> int:
    """Where the piece of an overlong line that begins at `start` ends: not inside a UTF-8 character."""
    end = start + PIECE
    for cut in range(end, end - 4, -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return end


def split_long(block: bytes) -> bytes:
    """`block` with a newline put into every line that is longer than PIECE."""
    if len(block) <= PIECE:
        return block
    out, start = [], 0
    while len(block) - start > PIECE:
        cut = block.rfind(b"\n", start, start + PIECE + 1) + 1
        if cut:
            out.append(block[start:cut])
        else:
            cut = piece_end(block, start)
            out.append(block[start:cut] + b"\n")
        start = cut
    return b"".join(out) + block[start:]


class Log:
    """RUNDIR/log: collects, then appends in one write. A full disk costs lines, not the job.

    Beside it log.index, `<unix seconds> <byte offset>` at most once a second: where that moment begins.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.file, self.index = os.open(path, flags, 0o600), os.open(path + ".index", flags, 0o600)
        self.indexed = 0
        self.waiting: list = []
        self.lost = 0
        self.torn = False

    def put(self, block: bytes) -> None:
        if block:
            self.waiting.append(block)

    def say(self, text: str) -> None:
        self.put(b"-\t" + text.replace("\n", " ").encode("utf-8", "replace") + b"\n")

    def flush(self) -> None:
        if not self.waiting:
            return
        note = f"-\tthe log lost {self.lost} lines: it could not be written\n".encode() if self.lost else b""
        text, done = b"\n" * self.torn + note + b"".join(self.waiting), 0
        self.waiting = []
        try:
            now = int(time.time())
            if now > self.indexed:
                self.indexed = now
                os.write(self.index, b"%d %d\n" % (now, os.fstat(self.file).st_size))
            while done < len(text):
                done += os.write(self.file, memoryview(text)[done:])
            self.lost = 0
        except OSError:
            self.lost += text.count(b"\n", done)
        if done:
            self.torn = text[done - 1] != 10


# ---- the process around one rank ---------------------------------------------------------------


def resolve(command: list) -> tuple:
    """(argv, why it cannot be run). Options and *.py files go to this Python, the rest is a program."""
    first = command[0]
    contained = os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")
    place = "in the image" if contained else "here"
    if first.startswith("-"):
        return [sys.executable, *command], ""
    if first in ("python", "python3"):
        return [sys.executable, *command[1:]], ""
    if first.endswith(".py") or (os.path.isfile(first) and not os.access(first, os.X_OK)):
        if os.path.isfile(first):
            return [sys.executable, *command], ""
        names = sorted(name for name in os.listdir(".") if not name.startswith("."))
        listing = ", ".join(names[:20] + ["…"] * (len(names) > 20)) or "nothing"
        return [], f"{first}: not {place} (working directory {os.getcwd()} has: {listing})"
    found = shutil.which(first)
    return ([found, *command[1:]], "") if found else ([], f"{first}: no such program {place}")


def attend(child: subprocess.Popen, control: socket.socket, signals: socket.socket, path: str) -> tuple:
    """Waits for the rank; passes on signals and the launcher's orders. (exit code, signal passed on)"""
    held, passed = False, 0
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(signals, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is control:
                    order = control.recv(64)
                    if order == b"hold":  # a stop is under way: what torchrun wants no longer counts
                        held = True
                    elif order == b"term":
                        os.kill(child.pid, signal.SIGTERM)
                    elif obey(order, path):
                        ended = kill_tree(os.getpid())
                        if child.pid in ended:
                            return ended[child.pid], passed
                    continue
                for number in signals.recv(4096):
                    if number != signal.SIGCHLD and not held:
                        passed = number
                        os.kill(child.pid, number)
                        control.send(json.dumps({"passed": number}).encode())
            ended = reap()
            if child.pid in ended:
                return ended[child.pid], passed


def obey(order: bytes, path: str) -> bool:
    """Whether the rank's processes are to be killed; never returns when the launcher is gone."""
    if order:
        return order == b"kill"
    kill_tree(os.getpid())
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
    os._exit(1)


def run_rank(path: str, command: list) -> int:
    """The process that torchrun starts for each rank: runs `command`, tells the launcher how it went."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.connect(path)
    prctl(SUBREAPER, 1)
    signals = wake_on_signals(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    reader, writer = os.pipe()
    hello = {key.lower(): int(os.environ.get(key, "0")) for key in ("RANK", "LOCAL_RANK")}
    hello["started_ns"] = time.time_ns()
    socket.send_fds(control, [json.dumps(hello).encode()], [reader])
    os.close(reader)
    argv, missing = resolve(command)
    code, passed = NOT_FOUND, 0
    if not missing:
        try:
            child = spawn(argv, dict(os.environ), writer)
        except (OSError, subprocess.SubprocessError) as error:
            missing = f"{command[0]}: cannot be run ({error})"
    if missing:
        os.write(writer, missing.encode() + b"\n")
    os.close(writer)
    if not missing:
        code, passed = attend(child, control, signals, path)
    bye = {"code": code, "passed": passed, "missing": missing, "ended_ns": time.time_ns()}
    try:
        control.send(json.dumps(bye).encode())
        order = control.recv(64)
        while order != b"bye":
            if obey(order, path):
                kill_tree(os.getpid())
            order = control.recv(64)
    except OSError:
        obey(b"", path)
    return code if code >= 0 else 128 - code


# ---- the launcher ------------------------------------------------------------------------------


class Rank:
    """One rank of this node, from its hello to its exit."""

    def __init__(self, hello: dict, control: socket.socket, secrets: list) -> None:
        self.rank, self.local_rank = hello["rank"], hello["local_rank"]
        self.started_ns, self.control = hello["started_ns"], control
        self.lines = Lines(str(self.rank), secrets)
        self.code = None  # exit code, negative for signals
        self.ended_ns = 0
        self.ordered = ""  # "stop" or "peer": told to end, so that its exit says nothing about itself
        self.missing = ""
        self.oom = False
        self.dismissed = False

    def tell(self, order: bytes) -> None:
        with contextlib.suppress(OSError):
            self.control.send(order)

    def error(self, events: str, attempt: int) -> dict:
        """The rank's own error; empty if it has none."""
        if self.code in (0, None, PREEMPTED) or self.ordered == "stop":
            return {}
        recorded = event_error(events, attempt)
        if recorded:
            return recorded
        seen = self.lines.tracebacks.last
        fresh = seen and self.ended_ns - seen["time_ns"] < 30e9
        if seen and (self.code == 1 or (fresh and (self.code > 0 or self.code == -signal.SIGABRT))):
            return seen
        if self.ordered:
            return {}
        if self.code < 0:
            name = signal.Signals(-self.code).name if -self.code in list(signal.Signals) else str(-self.code)
            message = "killed by the kernel: out of memory" if self.oom else "killed by " + name
            kind = "OutOfMemory" if self.oom else name
        else:
            last = ([""] + [line for line in self.lines.last_lines() if line.strip()])[-1].strip()[:300]
            kind, message = "ExitCode", "exit code {}{}".format(self.code, ": " + last if last else "")
        return {"type": kind, "message": self.missing or message, "traceback": "", "time_ns": self.ended_ns}


def event_error(path: str, attempt: int) -> dict:
    """The first `error` event of this attempt in a trainer's event file; empty if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 22)))
            lines = [line for line in file if b'"error"' in line]
    except OSError:
        return {}
    for line in lines:
        try:
            event = json.loads(line)
            if event["kind"] == "error" and event.get("attempt", attempt) == attempt:
                moment = float(event.get("time", 0))
                return {
                    "type": str(event.get("type", "Error")),
                    "message": str(event.get("message", "")),
                    "traceback": str(event.get("traceback", "")),
                    "time_ns": int(moment if moment > 1e14 else moment * 1e9),
                }
        except (ValueError, KeyError, TypeError):
            continue
    return {}


# as `-m torch.distributed.run`, but without the working directory on the path: a user's `types.py` or
# `queue.py` there would break torchrun itself
AGENT = "import sys; sys.path[:] = filter(None, sys.path); from torch.distributed.run import main; main()"


class Launcher:
    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        with open(os.path.join(self.folder, "job.json"), encoding="utf-8") as file:
            self.job = json.load(file)
        self.head, self.nodes = self.job["index"] == 0, self.job["nodes"]
        self.torchrun = self.job["launcher"] == "torchrun"
        self.procs = self.job["procs"] if self.torchrun else 1
        options = dict(option.partition("=")[::2] for option in self.job["torchrun"])
        self.endpoint = options.get("--rdzv-endpoint", "")
        self.log = Log(os.path.join(self.folder, "log"))
        self.secrets: list = []
        self.ranks: dict = {}
        self.agent = None  # torchrun, or with launcher "none" the process around the one rank
        self.agent_code = None
        self.agent_lines = Lines("-", [])
        self.started, self.started_ns = time.monotonic(), time.time_ns()
        self.baseline = oom_kills()
        self.stop_at = self.stop_ns = 0  # when a stop was asked for
        self.stop_stage = ""  # "", "file", "term", "kill"
        self.failed_at = self.release_at = self.stage_at = self.kill_at = self.polled = 0.0
        self.signalled = 0  # SIGTERM and SIGINT
        self.notices = 1
        self.busy = 0
        self.refused = None
        self.selector = selectors.DefaultSelector()

    # -- start

    def environment(self) -> dict:
        """The ranks' environment: this process's, the job's, the secrets; deletes secrets.env."""
        env = dict(os.environ)
        env.update(self.job["env"])
        path = os.path.join(self.folder, "secrets.env")
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line for line in file if line.strip()]
            os.unlink(path)
        except FileNotFoundError:
            lines = []
        for line in lines:
            name, _, value = line.partition("=")
            try:
                env[name] = str(json.loads(value))
            except ValueError:
                raise Refused(NOT_STARTABLE, f"secrets.env: the value of {name} is no JSON string") from None
            parts = {part.encode("utf-8", "surrogateescape") for part in [env[name], *env[name].splitlines()]}
            self.secrets += [part for part in parts if len(part) >= 8]
        self.secrets.sort(key=len, reverse=True)
        self.agent_lines = Lines("-", self.secrets)
        env["PYTHONUNBUFFERED"] = "1"
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.procs)))
        patience = self.job["grace"] + self.job["stop_grace"] + 30
        env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(patience)  # it is the launcher that ends the ranks
        return env

    def network(self, env: dict) -> str:
        """Chooses the interface, checks the head's port; words for the log. Raises Refused."""
        address = self.job["address"]
        if self.nodes == 1 or not address:
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name need not resolve
            return "one node"
        chosen = "NCCL_SOCKET_IFNAME" in env and "GLOO_SOCKET_IFNAME" in env
        try:
            name = find_interface(address, interfaces())
            env.setdefault("NCCL_SOCKET_IFNAME", "=" + name)
            env.setdefault("GLOO_SOCKET_IFNAME", name)
        except Refused:
            if self.torchrun and not chosen:
                raise
            name = env.get("GLOO_SOCKET_IFNAME", "unknown")
        if self.torchrun and self.head:
            check_port(self.job["port"])
        return f"interface {name} ({address})"

    def start(self, env: dict) -> None:
        job = self.job
        interface = self.network(env)
        here = "{} (node {} of {})".format(job["node"], job["index"] + 1, self.nodes)
        world = f"{self.procs} ranks here, {self.procs * self.nodes} in all"
        at = f", rendezvous {self.endpoint}" if self.nodes > 1 and self.torchrun else ""
        self.log.say(f"run {job['run']} attempt {job['attempt']} on {here}: {world}, {interface}{at}")
        self.listener, self.socket_folder = listen(self.folder)
        self.selector.register(self.listener, selectors.EVENT_READ, self.on_connect)
        argv = [sys.executable, "-I", os.path.abspath(__file__), "--rank", self.listener.getsockname(), "--"]
        argv += job["command"]
        if self.torchrun:
            logs = "--log-dir=" + os.path.join(self.folder, "errors")
            argv = [sys.executable, "-c", AGENT] + job["torchrun"] + [logs, "--no-python"] + argv
        else:
            env.update(
                RANK=str(job["index"]), WORLD_SIZE=str(self.nodes), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"
            )
        reader, writer = os.pipe()
        self.agent = spawn(argv, env, writer)
        os.close(writer)
        self.add_pipe(reader, self.agent_lines)

    # -- events

    def add_pipe(self, pipe: int, lines: Lines) -> None:
        os.set_blocking(pipe, False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, 1031, 1 << 20)  # F_SETPIPE_SZ: fewer, larger reads
        self.selector.register(pipe, selectors.EVENT_READ, lambda: self.on_output(pipe, lines))

    def on_output(self, pipe: int, lines: Lines) -> None:
        try:
            data = os.read(pipe, 1 << 20)
        except BlockingIOError:
            return
        self.busy += len(data)
        text = lines.feed(data, time.monotonic()) if data else lines.end()
        # once ranks run, torchrun only speaks of failures and stops, which the launcher words itself
        if lines is not self.agent_lines or not (self.ranks or self.stop_at):
            self.log.put(text)
        if not data:
            self.selector.unregister(pipe)
            os.close(pipe)

    def on_connect(self) -> None:
        control, _ = self.listener.accept()
        self.selector.register(control, selectors.EVENT_READ, lambda: self.on_hello(control))

    def on_hello(self, control: socket.socket) -> None:
        self.selector.unregister(control)
        data, pipes, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            control.close()
            return
        rank = Rank(json.loads(data), control, self.secrets)
        self.ranks[rank.rank] = rank
        self.add_pipe(pipes[0], rank.lines)
        self.selector.register(control, selectors.EVENT_READ, lambda: self.on_exit(rank))
        if self.stop_at:
            self.order({"file": b"hold", "term": b"term"}.get(self.stop_stage, b"kill"), [rank])

    def on_exit(self, rank: Rank) -> None:
        """The rank's own word on how it ended; none if its process around it was killed."""
        data = rank.control.recv(65536)
        word = json.loads(data) if data else {"code": -9, "ended_ns": time.time_ns()}
        if "code" not in word:  # torchrun told it to end: another rank failed, or the rendezvous is lost
            rank.ordered = rank.ordered or "peer"
            self.failed_at = self.failed_at or time.monotonic()
        elif rank.code is None:
            rank.code, rank.ended_ns, rank.missing = word["code"], word["ended_ns"], word.get("missing", "")
            rank.oom = rank.code == -signal.SIGKILL and not rank.ordered and oom_kills() > self.baseline
            if rank.code == PREEMPTED:
                self.begin_stop(f"rank {rank.rank} returned 75")
            elif rank.code and not rank.ordered:
                self.failed_at = self.failed_at or time.monotonic()
        if not data:
            self.selector.unregister(rank.control)
            rank.control.close()
            rank.dismissed = True

    def on_signal(self) -> None:
        for number in self.signals.recv(4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                self.signalled, self.polled = self.signalled + 1, 0.0
                with contextlib.suppress(OSError), open(os.path.join(self.folder, "stop"), "a") as file:
                    file.write("kill\n" if self.signalled > 1 else "")
        ended = reap()
        if self.agent and self.agent.pid in ended:
            self.agent_code = self.agent.returncode = ended[self.agent.pid]

    # -- decisions

    def living(self) -> list:
        return [rank for rank in self.ranks.values() if rank.code is None]

    def order(self, order: bytes, ranks: list, why: str = "stop") -> None:
        for rank in ranks:
            rank.tell(order)
            if order != b"hold":
                rank.ordered = rank.ordered or why

    def all_ended(self) -> bool:
        return len(self.ranks) >= self.procs and not self.living()

    def kill_agent(self) -> None:
        """SIGKILL to torchrun, which would take its time; its ranks, if any, end with the launcher's tree."""
        if self.agent and self.agent_code is None:
            os.kill(self.agent.pid, signal.SIGKILL)

    def begin_stop(self, why: str) -> None:
        if not self.stop_at:
            self.stop_at = self.stage_at = time.monotonic()
            self.stop_ns, self.stop_stage = time.time_ns(), "file"
            self.log.say(why)
            self.order(b"hold", self.living())
            if not any(rank.code for rank in self.ranks.values()):
                self.failed_at = 0.0
            if not self.ranks:
                self.kill_agent()

    def poll_stop(self, now: float) -> None:
        """Reads RUNDIR/stop, and goes one stage further when a stage's time is over."""
        wanted = self.job["stop"] if self.signalled else ""
        with contextlib.suppress(OSError), open(os.path.join(self.folder, "stop"), "rb") as file:
            wanted = "kill" if b"kill" in file.read(64) else self.job["stop"]
        if self.signalled > 1:
            wanted = "kill"
        if wanted:
            self.begin_stop("stop requested")
        patience = {"file": self.job["stop_grace"], "term": self.job["grace"]}.get(self.stop_stage)
        late = patience is not None and now - self.stage_at >= patience and bool(self.living())
        if late:
            verb = "SIGTERM" if self.stop_stage == "file" else "SIGKILL"
            self.log.say(f"{patience} s after the request the ranks still run: {verb}")
        if (wanted == "kill" and self.stop_stage != "kill") or (late and self.stop_stage == "term"):
            self.stop_stage = "kill"
            self.order(b"kill", self.living())
        elif self.stop_stage == "file" and (late or wanted == "signal"):
            self.stop_stage, self.stage_at = "term", now
            self.order(b"term", self.living())

    def tick(self, now: float) -> None:
        """Everything that depends on time."""
        if now - self.polled >= 0.2:
            self.polled = now
            self.poll_stop(now)
        for rank in self.ranks.values():
            if rank.lines.update:
                self.log.put(rank.lines.tick(now))
        limit = self.job["grace"] if self.stop_at else FAIL_GRACE  # during a stop the others may be saving
        if self.failed_at and now - self.failed_at > limit and self.living():
            self.order(b"kill", self.living(), "peer")
            self.failed_at = now
        self.dismiss(now)
        if not self.ranks and self.torchrun and self.nodes > 1 and not self.stop_at and not self.refused:
            self.await_rendezvous(int(now - self.started))

    def dismiss(self, now: float) -> None:
        """Lets the processes around ended ranks go, which is how torchrun learns of the ends."""
        ended = [rank for rank in self.ranks.values() if rank.code is not None and not rank.dismissed]
        if any(rank.code == PREEMPTED for rank in ended):
            if not self.all_ended():
                return
            if not self.release_at:  # the other nodes' torchruns need the head's store while they save
                self.release_at = now + (LINGER if self.head and self.nodes > 1 else 0)
        if now < self.release_at:
            return
        for rank in ended:
            rank.dismissed = True
            rank.tell(b"bye")
        if (self.stop_at or self.failed_at) and self.all_ended() and self.agent_code is None:
            self.kill_at = self.kill_at or now + DRAIN
            if now > self.kill_at:
                self.kill_agent()

    def await_rendezvous(self, waited: int) -> None:
        limit = self.job["rendezvous_timeout"]
        where = f"the rendezvous at {self.endpoint} ({self.nodes} nodes)"
        if waited >= limit:
            why = "" if self.head else answers(self.endpoint)
            hint = "see the log of the nodes that did not come: `orch logs --node NODE`"
            if why:
                hint = (
                    f"is the head's container up, and port {self.job['port']} (`run.port`) open to this node?"
                )
                why = f": it does not answer here ({why})"
            self.refused = Refused(1, f"{where} did not come together within {limit} s{why}", hint)
            self.kill_agent()
        elif waited >= 15 * self.notices:
            self.notices += 1
            self.log.say(f"waiting for {where} since {waited} s; gives up after {limit} s")

    # -- the run

    def run(self) -> int:
        prctl(SUBREAPER, 1)
        self.signals = wake_on_signals(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self.selector.register(self.signals, selectors.EVENT_READ, self.on_signal)
        try:
            env = self.environment()
            self.poll_stop(time.monotonic())
            if not self.stop_at:
                self.start(env)
                while self.agent_code is None:
                    self.turn()
        except Refused as refused:
            self.refused = refused
        except Exception as error:  # a fault of the launcher itself must still end the job and say so
            traceback.print_exc()
            self.refused = Refused(1, f"the launcher failed: {type(error).__name__}: {error}")
        self.drain()
        return self.finish()

    def turn(self) -> None:
        self.tick(time.monotonic())
        self.busy = 0
        for key, _ in self.selector.select(0.05 if self.release_at else 0.2):
            key.data()
        self.log.flush()
        if 0 < self.busy < 32768:
            time.sleep(0.005)  # many small writes: let them gather instead of waking for each

    def drain(self) -> None:
        """Takes the last output, for at most DRAIN seconds; then nothing is left of the job."""
        self.order(b"kill", self.living(), "peer")
        until = time.monotonic() + DRAIN
        while len(self.selector.get_map()) > 2 and time.monotonic() < until:
            self.turn()
        kill_tree(os.getpid())
        for key in list(self.selector.get_map().values()):
            if key.data not in (self.on_connect, self.on_signal):
                key.data()
        for rank in self.ranks.values():
            self.log.put(rank.lines.end())
        if self.agent:
            self.listener.close()
            shutil.rmtree(self.socket_folder, ignore_errors=True)

    def agent_failure(self) -> Refused:
        """Why torchrun ended although no rank of this node gave a reason."""
        seen = self.agent_lines.tracebacks.last
        kind = seen.get("type", "")
        recent = [line for line in self.agent_lines.last_lines() if line.strip()]
        if kind == "ModuleNotFoundError" and "'torch'" in seen["message"]:
            hint = "use an image that has torch, or `--launcher none`"
            return Refused(NOT_FOUND, f"torch is not installed for {sys.executable}", hint)
        if kind.startswith(("Rendezvous", "Dist")):
            hint = "the other nodes' logs say why"
            why = "connection closed, its host has ended" if self.ranks else seen["message"]
            return Refused(1, f"rendezvous at {self.endpoint}: {why}", hint)
        if self.agent_code is not None and self.agent_code < 0:
            name = signal.Signals(-self.agent_code).name
            return Refused(1, f"torchrun was killed by {name}")
        last = "{}: {}".format(kind, seen["message"]) if kind else (recent or ["no output"])[-1].strip()
        return Refused(1, f"torchrun ended with exit code {self.agent_code}: {last}")

    def outcome(self, errors: dict) -> tuple:
        """(state, exit code, the rank that came to grief first or None)."""

        def moment(rank: Rank) -> int:
            return errors.get(rank.rank, {}).get("time_ns") or rank.ended_ns

        bad = [rank for rank in self.ranks.values() if rank.code == PREEMPTED or rank.rank in errors]
        first = min(bad, key=moment, default=None)
        codes = [rank.code for rank in self.ranks.values()]
        done = len(codes) >= self.procs and not any(codes) and None not in codes
        in_time = self.stop_stage in ("", "file") or all(
            r.ended_ns < self.stop_ns for r in self.ranks.values()
        )
        if self.refused:
            return "failed", self.refused.code, None
        if first and first.code == PREEMPTED:
            return "preempted", PREEMPTED, None
        if first and not (self.stop_at and self.job["stop"] != "file" and moment(first) > self.stop_ns):
            return "failed", NOT_FOUND if first.missing else 1, first
        if done and in_time:
            return "succeeded", 0, None
        if self.stop_at:
            return "stopped", STOPPED, None
        self.refused = self.agent_failure()
        if not self.refused.hint:
            for line in self.agent_lines.last_lines():
                self.log.say(line)
        return "failed", self.refused.code, None

    def finish(self) -> int:
        """The last line of the log, then result.json, which appears whole and last."""
        job = self.job
        ranks = [self.ranks[number] for number in sorted(self.ranks)]
        errors = {}
        for rank in ranks:
            events = os.path.join(self.folder, "events", f"rank-{rank.rank}.jsonl")
            error = rank.error(events, job["attempt"])
            if error:
                errors[rank.rank] = error
        state, code, first = self.outcome(errors)
        reason, hint = (self.refused.args[0], self.refused.hint) if self.refused else ("", "")
        if first:
            error = errors[first.rank]
            reason = first.missing
            hint = hint_for(first, error)
            why = " (rank {}: {}: {})".format(first.rank, error["type"], error["message"][:300])
        else:
            why = f" ({reason})" if reason else ""
        self.log.say(self.mask(f"finished: {state}{why}"))
        self.log.flush()
        result = {key: job[key] for key in ("schema", "run", "attempt", "node", "index")}
        result.update(host=socket.gethostname(), state=state, exit_code=code)
        result.update(started_ns=self.started_ns, ended_ns=time.time_ns(), reason=reason, hint=hint)
        result["ranks"] = [
            {
                "rank": rank.rank,
                "local_rank": rank.local_rank,
                "exit_code": rank.code,
                "started_ns": rank.started_ns,
                "ended_ns": rank.ended_ns,
                "error": errors.get(rank.rank),
                "last_lines": rank.lines.last_lines(),
            }
            for rank in ranks
        ]
        path = os.path.join(self.folder, "result.json")
        try:
            with open(path + ".new", "w", encoding="utf-8", errors="replace") as file:
                json.dump(self.mask(result), file, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(path + ".new", path)
        except OSError as error:  # the exit code is all that can still be told
            print(f"launch.py: {path}: {error}", file=sys.stderr)
        return code

    def mask(self, value):
        """`value` without the secrets, which messages of the trainer's own might hold."""
        if isinstance(value, dict):
            return {key: self.mask(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.mask(each) for each in value]
        if isinstance(value, str):
            for secret in self.secrets:
                value = value.replace(secret.decode("utf-8", "replace"), "***")
        return value


def hint_for(rank: Rank, error: dict) -> str:
    if rank.missing:
        return "is the file in the build context, and the working directory right? `orch exec` looks inside"
    if error["type"] == "OutOfMemory":
        return "the node's memory was used up: a smaller batch, fewer workers, or fewer processes per node"
    if error["type"] == "SIGBUS":
        return "most often too little shared memory: raise `run.shm`"
    return ""


def listen(folder: str) -> tuple:
    """A socket that only this user can reach, in a folder whose path is short enough for one (108 bytes)."""
    for parent in (tempfile.gettempdir(), "/tmp", "/dev/shm", folder):
        if len(parent) < 80 and os.access(parent, os.W_OK):
            own = tempfile.mkdtemp(prefix="orch-", dir=parent)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(os.path.join(own, "s"))
            listener.listen(1024)
            return listener, own
    raise Refused(NOT_STARTABLE, "no folder for a socket: neither /tmp nor /dev/shm can be written")


def main(argv: list) -> int:
    if len(argv) > 2 and argv[0] == "--rank":
        return run_rank(argv[1], argv[3:] if argv[2] == "--" else argv[2:])
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if sys.platform != "linux":
            raise OSError("the launcher needs Linux, this is " + sys.platform)
        launcher = Launcher(argv[0])
    except (OSError, ValueError, KeyError) as error:
        print(f"launch.py: {argv[0]}: {error}", file=sys.stderr)
        return NOT_STARTABLE
    return launcher.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
