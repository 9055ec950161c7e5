"""Loader processes: the same rows, and nothing of them outlives the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import DataConfig
from trainer.data.documents import Document
from trainer.data.stream import BatchStream
from trainer.errors import DataError, DeadlineError


class Random:
    """57 documents of up to 90 random tokens; `read` may be told to do something else first."""

    fingerprint = "r"

    def __init__(self, before: Callable[[int], None] = lambda index: None):
        self.before = before

    def __len__(self):
        return 57

    def order(self, epoch):
        return np.random.Generator(np.random.Philox(key=[1, epoch])).permutation(57)

    def read(self, index):
        self.before(index)
        draw = np.random.Generator(np.random.Philox(index))
        return Document(draw.integers(3, 100, draw.integers(1, 90)).astype(np.int32))

    def expect(self, indices):
        pass


def _stream(workers, documents=None, rank=0, size=1, timeout=30.0, **values) -> BatchStream:
    return BatchStream(
        documents or Random(), DataConfig(seq_len=16, workers=workers, **values), global_batch=12, micro_batch=2,
        data_rank=rank, data_size=size, pad_id=2, seed=1, timeout=timeout,
    )  # fmt: skip


def _pids(stream) -> list[int]:
    return [part._process.pid for part in stream._parts]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _gone(pids, seconds=5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _take(streams, steps) -> list[list[list[int]]]:
    taken = []
    for _ in range(steps):
        taken.append([row for stream in streams for batch in stream.peek() for row in batch["input_ids"].tolist()])
        for stream in streams:
            stream.advance()
    return taken


@pytest.mark.parametrize("strategy", ["pack", "overflow"])
def test_order_does_not_depend_on_the_number_of_workers_nor_on_their_change(strategy):
    values = {"strategy": strategy, "stride": 4}
    whole = _take([_stream(0, **values)], 20)
    state, taken = None, []
    # another number of workers and of ranks after each kill; what was prepared ahead must not count
    for workers, size, steps in ((3, 4, 4), (0, 2, 3), (1, 3, 5), (20, 1, 4), (2, 2, 4)):
        streams = [_stream(workers, rank=rank, size=size, **values) for rank in range(size)]
        for stream in streams if state else ():
            stream.load_state_dict(state)
        taken += _take(streams, steps)
        for stream in streams:
            stream.peek()
        state = BatchStream.merge([stream.state_dict() for stream in streams])
        pids = [pid for stream in streams if workers for pid in _pids(stream)]
        for stream in streams:
            stream.close()
        assert _gone(pids)
    assert taken == whole


def test_workers_are_no_more_than_lanes_and_go_on_after_a_stop_signal():
    stream = _stream(20)
    before = torch.random.get_rng_state()
    first = _take([stream], 2)
    pids = _pids(stream)
    assert len(pids) == 12 and torch.equal(before, torch.random.get_rng_state())
    for pid in pids:  # as a scheduler does to every process of the job
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    # far beyond what was made before the signals
    assert first + _take([stream], 400) == _take([_stream(0)], 402)
    stream.close()
    assert _gone(pids)


def test_kill_9_of_the_trainer_leaves_no_process_and_no_shared_memory():
    shared = set(os.listdir("/dev/shm"))
    reader, writer = os.pipe()
    trainer = os.fork()
    if not trainer:
        try:
            # some are blocked with full pipes, one is in the middle of a read
            stream = _stream(3, Random(lambda index: time.sleep(60 if index == 40 else 0)))
            stream._parts = stream._start()
            os.write(writer, " ".join(map(str, _pids(stream))).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    pids = [int(pid) for pid in os.read(reader, 100).split()]
    os.close(reader), os.close(writer)
    time.sleep(0.1)
    assert len(pids) == 3 and all(map(_alive, pids))
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    try:
        assert _gone(pids)
    finally:
        for pid in filter(_alive, pids):
            os.kill(pid, signal.SIGKILL)
    assert set(os.listdir("/dev/shm")) <= shared


def test_a_trainer_that_forgets_to_close_still_ends(tmp_path):
    script = tmp_path / "forget.py"
    script.write_text(
        "import itertools\n"
        "from trainer.data.workers import Ahead\n"
        "ahead = Ahead(lambda: itertools.count(), ahead=2, timeout=30, what='it')\n"
        "print(next(ahead), next(ahead), ahead._process.pid, flush=True)\n"
    )
    path = {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=20, env=os.environ | path)
    first, second, pid = map(int, done.stdout.split())
    assert (done.returncode, first, second) == (0, 0, 1) and _gone([pid])


def test_a_killed_worker_is_an_error_that_names_it():
    stream = _stream(2)
    stream.peek()
    os.kill(_pids(stream)[1], signal.SIGKILL)
    with pytest.raises(DataError, match="loader process 1 of 2 was killed by SIGKILL"):
        _take([stream], 100)
    stream.close()


def test_errors_of_a_worker_are_raised_here(capfd):
    def fail(error):
        def before(index):
            raise error

        return before

    with pytest.raises(DataError, match=r"^no such shard$") as caught:
        _stream(2, Random(fail(DataError("no such shard", hint="fetch it")))).peek()
    assert caught.value.hint == "fetch it"
    with pytest.raises(DataError, match="reading the data failed: KeyError: 'text'"):
        _stream(2, Random(fail(KeyError("text")))).peek()
    assert "Traceback" in capfd.readouterr().err


def test_a_worker_that_hangs_meets_the_deadline():
    stream = _stream(1, Random(lambda index: time.sleep(60)), timeout=0.1)
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for loader process 0 of 1"):
        stream.peek()
    pids = _pids(stream)
    stream.close()
    assert _gone(pids)


def test_a_worker_is_ahead_by_about_prefetch_and_no_more(tmp_path):
    made = tmp_path / "reads"
    made.touch()

    def count(index):
        with made.open("a") as file:
            file.write("x")

    def stream(prefetch):
        made.write_text("")
        return _stream(1, Random(count), prefetch=prefetch)

    near = stream(1)
    near.peek()
    sizes = [-1]
    while sizes[-1] != made.stat().st_size:  # until it waits
        sizes.append(made.stat().st_size)
        time.sleep(0.2)
    near.close()
    # a step takes four documents; some are in the pipe
    assert sizes[-1] < 4 * 100, sizes
    far = stream(400)
    far.peek()
    deadline = time.monotonic() + 20
    while made.stat().st_size < 4 * 300 and time.monotonic() < deadline:
        time.sleep(0.01)
    far.close()
    assert made.stat().st_size >= 4 * 300
