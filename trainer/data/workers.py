"""An iterator that runs ahead in a process of its own.

torch's DataLoader is not used: its processes die of the SIGTERM with which a scheduler asks the whole job to
save and stop, it draws from the training's random numbers, and it hands tensors over in shared memory.
Here a pipe is all that lies between, so nothing survives a kill.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from trainer.errors import DataError, DeadlineError, TrainerError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1


class Ahead(Generic[T]):
    """The items of `items()`, made by a forked process that is up to about `ahead` of them ahead.

    An item that takes longer than `timeout` seconds is a DeadlineError; a TrainerError in the process is
    raised here, any other end of it is a DataError. Call from the main thread: the kernel ends the process
    when the thread that forked it ends.
    """

    def __init__(self, items: Callable[[], Iterator[T]], *, ahead: int, timeout: float, what: str) -> None:
        context = multiprocessing.get_context("fork")
        self._timeout, self._what = timeout, what
        self._results, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(items, sender, ahead, os.getpid()), daemon=True)
        self._process.start()
        sender.close()  # only the process holds it: its death is the end of the file
        # before multiprocessing's own handler, which would wait for a process that ignores SIGTERM
        atexit.register(self.close)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._results.poll(self._timeout):
            raise DeadlineError(
                f"waited {self._timeout:g} s for {self._what}",
                hint="The data may be unreachable, or far too slow: look at data.remote and data.workers.",
            )
        try:
            item = self._results.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            if not code:
                raise StopIteration from None
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise DataError(f"{self._what} {how}", hint="Often memory: lower data.workers or data.prefetch.") from None
        if isinstance(item, TrainerError):
            raise item
        return item

    def close(self) -> None:
        """Kills the process: it has no state of its own."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.join()
        self._results.close()


def _serve(items: Callable[[], Iterator[object]], sender: Connection, ahead: int, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    # a stop is the parent's affair: it saves, and ends this process with itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()  # what was inherited is never collected here, where its destructors could do harm
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ready: queue.Queue[object] = queue.Queue(ahead)
    threading.Thread(target=_send, args=(ready, sender), daemon=True).start()
    try:
        for item in items():
            ready.put(item)
    except TrainerError as error:
        ready.put(error)
    except BaseException as error:
        traceback.print_exc()
        ready.put(DataError(f"reading the data failed: {type(error).__name__}: {error}"))
    ready.put(_END)
    threading.Event().wait()  # until the parent, or its end, ends this process


_END = object()


def _send(ready: queue.Queue[object], sender: Connection) -> None:
    try:
        while (item := ready.get()) is not _END:
            sender.send(item)
    except OSError:  # the parent is gone
        pass
    os._exit(0)
