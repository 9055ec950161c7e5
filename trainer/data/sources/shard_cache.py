"""Shards of a remote MDS data set in one cache folder of this node, shared by all its processes and runs.

No process holds state that another relies on: a shard is in the cache if its file is there, since files appear
by a rename after size and hash were checked. flocks, which die with their holder, keep two processes from
fetching the same shard; whoever finds a shard gone (evicted by another process) fetches it again.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trainer.data.streaming_import import CloudDownloader, MDSReader, bytes_to_int, decompress, get_hash, is_hash
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.locks import locked

ATTEMPTS = 3
"""Downloads of one shard before giving up; the cloud libraries repeat single requests by themselves."""
BACKOFF = 0.5
"""Seconds before the second attempt; doubled before each further one."""
REQUEST_TIMEOUT = 60.0
"""Seconds without an answer before one request fails."""
_STRIPES = 64
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_TOUCH = 10.0
"""Seconds between two notes that a shard is in use."""


class ShardCache:
    """`limit` (as "100gb") bounds the bytes under `folder`: the shards not read for longest are deleted.

    Raises ConfigError if the limit cannot hold the two largest shards: fewer would be fetched again and again.
    """

    def __init__(
        self,
        remote: str,
        folder: Path,
        shards: Sequence[MDSReader],
        *,
        limit: str | None,
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self._remote, self._folder, self._shards = remote.rstrip("/"), folder, shards
        self._timeout, self._say = timeout, say
        self._limit = _bytes(limit)
        largest = max(shard.get_max_size() for shard in shards)
        if self._limit is not None and self._limit < 2 * largest:
            raise ConfigError(
                f"data.cache_limit={limit} is less than two shards of {remote}",
                hint=f"Set data.cache_limit to {-(-2 * largest // 1024)}kb or more.",
            )
        self._touched: dict[int, float] = {}
        self._ahead = Ahead(self)

    def note_use(self, shard: int) -> None:
        """Keeps a shard that is being read from counting as old."""
        now = time.monotonic()
        if self._limit is not None and now - self._touched.get(shard, -_TOUCH) >= _TOUCH:
            self._touched[shard] = now
            with suppress(FileNotFoundError):  # evicted meanwhile: the reader will notice
                os.utime(self.path(shard))

    def path(self, shard: int) -> Path:
        return self._folder / self._shards[shard].raw_data.basename

    def has(self, shard: int) -> bool:
        try:
            return self.path(shard).stat().st_size == self._shards[shard].raw_data.bytes
        except FileNotFoundError:
            return False

    def fetch(self, shard: int) -> None:
        """Returns once the whole shard is in the cache. Raises DataError, DeadlineError."""
        name = self._shards[shard].raw_data.basename
        with ExitStack() as held:
            for lock in self._locks(shard):
                what = f"another process of this node to fetch {name} of {self._remote}"
                held.enter_context(locked(self._folder / ".locks" / lock, self._timeout, self._say, what))
            if self.has(shard):
                return
            target = self.path(shard)
            target.parent.mkdir(parents=True, exist_ok=True)
            for leftover in target.parent.glob(f".{target.name}.part*"):
                leftover.unlink(missing_ok=True)  # of a killed process: we hold this shard's lock
            target.unlink(missing_ok=True)  # here only if its size is wrong
            if self._limit is not None:
                self._evict(self._limit - self._shards[shard].get_max_size())
            self._download(shard, target)

    def expect(self, shards: Sequence[int]) -> None:
        """Fetches these in the background, in this order, as far as half the limit holds them."""
        room = float("inf") if self._limit is None else self._limit / 2
        wanted = []
        for shard in shards:
            room -= self._shards[shard].get_raw_size()
            if room < 0 and wanted:
                break
            wanted.append(shard)
        self._ahead.want(wanted)

    def _locks(self, shard: int) -> Iterator[str]:
        yield f"{shard % _STRIPES:02}"
        if self._limit is not None:
            yield "room"  # one at a time, so that two together cannot pass the limit

    def _evict(self, room: int) -> None:
        """Deletes what was read longest ago until at most `room` bytes remain."""
        files = []
        for folder, _, names in os.walk(self._folder):
            for name in names:
                try:
                    status = os.stat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime_ns, status.st_size, os.path.join(folder, name)))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= room:
                return
            if size:  # not the lock files
                Path(path).unlink(missing_ok=True)
                used -= size

    def _download(self, shard: int, target: Path) -> None:
        reader = self._shards[shard]
        info = reader.zip_data or reader.raw_data
        part = target.with_name(f".{target.name}.part-{os.getpid()}-{threading.get_ident()}")
        source = f"{self._remote}/{info.basename}"
        for attempt in range(ATTEMPTS):
            try:
                download(source, part)
                data = part.read_bytes()
                _verify(data, info.bytes, info.hashes, source)
                if reader.zip_data is not None:
                    data = decompress(reader.compression, data)
                    _verify(data, reader.raw_data.bytes, reader.raw_data.hashes, f"{source}, decompressed")
                    part.write_bytes(data)
                os.rename(part, target)
                return
            except Exception as error:  # each cloud library has its own
                part.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in _DISK:
                    raise DataError(
                        f"cannot write {target}: {error.strerror}", hint="Free space, or set data.cache_limit."
                    ) from None
                if attempt + 1 == ATTEMPTS:
                    text = error.message if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
                    raise DataError(f"{source}: {text} ({ATTEMPTS} attempts)") from error
                time.sleep(BACKOFF * 2**attempt)


class Ahead:
    """One background thread per process that fetches what was asked for last.

    A failure here is left to the reader, who meets it again where it can be raised.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._pid = -1

    def want(self, shards: Sequence[int]) -> None:
        if self._pid != os.getpid():  # a forked process has neither the thread nor a usable lock
            self._pid = os.getpid()
            self._changed = threading.Condition()
            self._queue: deque[int] = deque()
            threading.Thread(target=self._work, name="shards-ahead", daemon=True).start()
        with self._changed:
            self._queue = deque(shards)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                shard = self._queue.popleft()
            try:
                if not self._cache.has(shard):
                    self._cache.fetch(shard)
            except TrainerError:
                continue


def download(source: str, target: Path) -> None:
    """One file from s3://…, gs://…, … or a path, by streaming's downloader with credentials of the environment."""
    with _downloader(source) as downloader:
        downloader.download(source, str(target), REQUEST_TIMEOUT)


_clients = threading.local()


@contextmanager
def _downloader(source: str) -> Iterator[CloudDownloader]:
    """The downloader of this thread and process; connections cannot be shared with forked processes."""
    key = (os.getpid(), source.partition("://")[0] if "://" in source else "")
    known: dict[tuple[int, str], CloudDownloader] = _clients.__dict__.setdefault("known", {})
    if key not in known:
        known[key] = CloudDownloader.get(source)
    try:
        yield known[key]
    except BaseException:
        known.pop(key).clean_up()
        raise


def _verify(data: bytes, size: int, hashes: dict[str, str], name: str) -> None:
    if len(data) != size:
        raise DataError(f"{len(data)} bytes, its index says {size}")
    for algorithm, expected in hashes.items():
        if is_hash(algorithm) and get_hash(algorithm, data) != expected:
            raise DataError(f"its {algorithm} is not what the index of {name} says")


def _bytes(limit: str | None) -> int | None:
    try:
        return None if limit is None else bytes_to_int(limit)
    except ValueError:
        raise ConfigError(f"data.cache_limit={limit} is no size", hint="Write it as 500mb, 100gb or 2tb.") from None
