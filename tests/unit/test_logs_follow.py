"""Following over connections that break: no line lost, none repeated."""

from __future__ import annotations

import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.connect.base import Stream
from orchestrator.errors import ConnectError, ConnectionLost, HostKeyError, OrchError
from orchestrator.logs import FoldView, Follower, Result, Sink, Source, Tail, View, follow, wants_color
from orchestrator.logs.sink import SinkClosed, write_all

LOST = ConnectionLost("connection reset")

Act = bytes | None | Exception | int
"""What a read does: give bytes (b"" is the end), be quiet, raise, or end with an exit code."""


class FakeStream:
    """Plays back what it was given."""

    def __init__(self, acts: Iterator[Act]) -> None:
        self._acts = acts
        self.returncode: int | None = None
        self.stderr = "tail: gone\n"
        self.closed = False

    def read(self, timeout: float | None = None) -> bytes | None:
        act = next(self._acts, 0)
        if isinstance(act, Exception):
            raise act
        if isinstance(act, int):
            self.returncode = act
            return b""
        return act

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeNode:
    """A node whose log is `data`; each connection does what `script(data from the offset on)` says."""

    data: bytes
    script: Callable[[bytes], Iterator[Act]]
    refuse: Callable[[], Exception | None] = lambda: None
    opened: list[int] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)

    def open(self, offset: int) -> Stream:
        self.opened.append(offset)
        if error := self.refuse():
            raise error
        self.streams.append(FakeStream(self.script(self.data[offset:])))
        return self.streams[-1]


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.now += seconds


@dataclass
class Outcome:
    result: Result
    out: bytes
    events: list[tuple[str, str, Exception | None]]
    clock: Clock


def run(nodes: dict[str, FakeNode], view: View | FoldView | None = None, **options: object) -> Outcome:
    out, events, clock = io.BytesIO(), [], Clock()
    follower = Follower(
        [Source(name, index, node.open) for index, (name, node) in enumerate(nodes.items())],
        options.pop("sink", None) or Sink.to(out),  # type: ignore[arg-type]
        on_event=lambda *event: events.append(event),
        stop=options.pop("stop", None) or threading.Event(),  # type: ignore[arg-type]
        view=view,
        clock=clock,
        sleep=clock.sleep,
        **options,  # type: ignore[arg-type]
    )
    follower.start()
    result = follower.join()
    assert not follower.running
    return Outcome(result, out.getvalue(), events, clock)


def whole(data: bytes) -> Iterator[Act]:
    yield data
    yield 0


def kinds(outcome: Outcome) -> list[tuple[str, str]]:
    return [(node, kind) for node, kind, _ in outcome.events]


def cut_once(place: int) -> Callable[[bytes], Iterator[Act]]:
    """The first connection breaks after `place` bytes, the next ones hold."""
    first = iter([True])

    def script(data: bytes) -> Iterator[Act]:
        if next(first, False):
            yield data[:place] or None
            yield LOST
        yield data
        yield 0

    return script


RAW = View(raw=True, prefix=False)
DATA = "0\tépée █\n1\t\n-\tstopping\n10\tlast \x1b[31mline\x1b[0m\n".encode()


def test_a_cut_at_every_byte_loses_and_repeats_nothing() -> None:
    view = View(names=("n1",), world=11)
    expected = view.formatter("n1")(DATA)
    for place in range(len(DATA) + 1):
        node = FakeNode(DATA, cut_once(place))
        outcome = run({"n1": node}, view)
        assert outcome.out == expected, place
        assert outcome.result == Result({"n1": len(DATA)})
        assert node.opened == [0, DATA.rfind(b"\n", 0, place) + 1], "reopens at the start of a line"
        assert kinds(outcome) == [("n1", "reconnecting"), ("n1", "reconnected")]
        assert all(stream.closed for stream in node.streams)


def flaky(rng: random.Random) -> Callable[[bytes], Iterator[Act]]:
    def script(data: bytes) -> Iterator[Act]:
        place = 0
        while place < len(data):
            roll = rng.random()
            if roll < 0.1:
                yield None
            elif roll < 0.2:
                yield LOST
            elif roll < 0.23:
                yield 137
            step = rng.randint(1, 40)
            yield data[place : place + step]
            place += step
        yield 0

    return script


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.text(max_size=15)), max_size=40),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_any_cuts_on_several_nodes_give_each_ranks_own_log(
    lines: list[tuple[int, str]], count: int, rng: random.Random
) -> None:
    nodes: dict[str, FakeNode] = {}
    expected: dict[str, bytes] = {}
    for index in range(count):
        mine = [(rank + 4 * index, text.replace("\n", "")) for rank, text in lines]
        data = "".join(f"{rank}\t{text}\n" for rank, text in mine).encode()
        own = random.Random(rng.random())
        refuse = lambda own=own: ConnectError("refused") if own.random() < 0.3 else None  # noqa: E731
        nodes[f"n{index}"] = FakeNode(data, flaky(own), refuse)
        for rank, text in mine:
            label = f"n{index}/{rank} "
            expected[label] = expected.get(label, b"") + text.encode() + b"\n"
    outcome = run(nodes, View(raw=True), reconnect_deadline=1e9)
    got: dict[str, bytes] = {}
    for line in outcome.out.split(b"\n")[:-1]:
        label, _, text = line.partition(b" ")
        got[f"{label.decode()} "] = got.get(f"{label.decode()} ", b"") + text + b"\n"
    assert got == expected
    assert outcome.result == Result({name: len(node.data) for name, node in nodes.items()})


def test_pieces_of_64_kib_and_long_lines() -> None:
    rng = random.Random(1)
    text = ("é" * 40_000).encode()
    data = b"".join(b"%d\t" % rng.randint(0, 7) + text[: 2 * rng.randint(0, 32_000)] + b"\n" for _ in range(60))
    cuts = iter([100_001, 131_071, 65_537, 3] + [10**9] * 5)

    def script(rest: bytes) -> Iterator[Act]:
        limit = next(cuts)
        for place in range(0, min(limit, len(rest)), 65_536):
            yield rest[place : min(place + 65_536, limit)]
        yield LOST if limit < len(rest) else 0

    outcome = run({"n1": FakeNode(data, script)}, RAW)
    assert outcome.out == b"".join(line.partition(b"\t")[2] + b"\n" for line in data.split(b"\n")[:-1])
    assert kinds(outcome).count(("n1", "reconnecting")) == 4


def test_a_log_that_ends_in_half_a_line_is_shown_and_counted() -> None:
    outcome = run({"n1": FakeNode(b"0\ta\n0\tkilled he", whole)}, View(names=("n1",)))
    assert outcome.out == b"n1/0 a\nn1/0 killed he\n"
    assert outcome.result.cursors == {"n1": 15}


def test_a_source_begins_at_its_offset() -> None:
    node, out = FakeNode(DATA, whole), io.BytesIO()
    sources = [Source("n1", 0, node.open, offset=DATA.index(b"-"))]
    result = follow(sources, Sink.to(out), on_event=lambda *_: None, stop=threading.Event(), view=RAW)
    assert node.opened == [DATA.index(b"-")]
    assert out.getvalue() == b"stopping\nlast \x1b[31mline\x1b[0m\n"
    assert result.cursors == {"n1": len(DATA)}


def test_a_node_that_stays_away_is_given_up_after_the_deadline_and_the_others_go_on() -> None:
    def gone(data: bytes) -> Iterator[Act]:
        yield data[:8]
        yield LOST

    tries = iter([None])
    away = FakeNode(b"0\tx\n0\tyyyyyy\n", gone, lambda: next(tries, ConnectError("no route to host")))
    outcome = run({"n1": away, "n2": FakeNode(b"1\tz\n", whole)}, View(names=("n1", "n2")), reconnect_deadline=10.0)
    assert sorted(outcome.out.splitlines()) == [b"n1/0 x", b"n2/1 z"]
    assert outcome.result.cursors == {"n1": 4, "n2": 4}
    error = outcome.result.errors["n1"]
    assert isinstance(error, ConnectionLost) and error.exit_code == 3
    assert str(error) == "n1: the log could not be read for 10 s: no route to host"
    assert outcome.events == [("n1", "reconnecting", LOST), ("n1", "lost", error)]
    assert outcome.clock.slept[:5] == [0.2, 0.4, 0.8, 1.6, 2.0]
    assert sum(outcome.clock.slept) == pytest.approx(10.0)


def test_success_starts_the_deadline_and_the_pauses_anew() -> None:
    def script(data: bytes) -> Iterator[Act]:
        yield from (data[:4], LOST) if len(data) > 4 else (data, 0)

    refusals = iter([None, ConnectError("x"), ConnectError("x"), None, ConnectError("x"), None])
    node = FakeNode(b"0\ta\n0\tb\n0\tc\n", script, lambda: next(refusals))
    outcome = run({"n1": node}, RAW, reconnect_deadline=1.5)
    assert outcome.out == b"a\nb\nc\n" and not outcome.result.errors
    assert outcome.clock.slept == [0.2, 0.4, 0.8, 0.2, 0.4]
    assert kinds(outcome) == [("n1", "reconnecting"), ("n1", "reconnected")] * 2


def test_a_quiet_connection_counts_as_back() -> None:
    acts = iter([[LOST], [None, None, 0]])
    outcome = run({"n1": FakeNode(b"", lambda _: iter(next(acts)))})
    assert kinds(outcome) == [("n1", "reconnecting"), ("n1", "reconnected")]


def test_a_changed_host_key_is_not_tried_again() -> None:
    node = FakeNode(b"", whole, lambda: HostKeyError("the host key has changed"))
    outcome = run({"n1": node})
    assert node.opened == [0] and kinds(outcome) == [("n1", "lost")]
    assert isinstance(outcome.result.errors["n1"], HostKeyError)


def test_a_reading_command_that_fails_is_retried_a_few_times() -> None:
    node = FakeNode(b"", lambda _: iter([127]))
    outcome = run({"n1": node})
    assert node.opened == [0] * 4
    assert str(outcome.result.errors["n1"]) == "n1: the command that reads the log ended with 127: tail: gone"


def test_a_bug_in_a_transport_is_reported_not_swallowed() -> None:
    outcome = run({"n1": FakeNode(b"", lambda _: iter([KeyError("oops")]))})
    assert "KeyError" in str(outcome.result.errors["n1"])
    assert type(outcome.result.errors["n1"]) is OrchError


def test_stop_ends_a_quiet_log_and_a_pause() -> None:
    stop = threading.Event()

    def quiet(_: bytes) -> Iterator[Act]:
        yield b"0\ta\n0\tunfinish"
        stop.set()
        while True:
            yield None

    outcome = run({"n1": FakeNode(b"", quiet)}, RAW, stop=stop)
    assert outcome.out == b"a\n" and outcome.result == Result({"n1": 4})
    stop.clear()

    def refuse() -> Exception:
        stop.set()
        return ConnectError("down")

    outcome = run({"n1": FakeNode(b"", whole, refuse)}, stop=stop)
    assert outcome.result == Result({"n1": 0}) and outcome.events == []


def test_a_closed_pipe_ends_following_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)

    def endless(_: bytes) -> Iterator[Act]:
        while True:
            yield b"0\tx\n"

    with os.fdopen(write_end, "wb", buffering=0) as stream:
        sink = Sink.to(stream)
        outcome = run({"n1": FakeNode(b"", endless), "n2": FakeNode(b"", endless)}, sink=sink)
    assert outcome.result == Result({"n1": 0, "n2": 0}, closed=True)
    assert outcome.events == []
    with pytest.raises(SinkClosed):
        sink.write(b"more")


def test_a_full_disk_is_an_error() -> None:
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    outcome = run({"n1": FakeNode(b"0\tx\n", whole)}, sink=Sink(full))
    assert "No space left" in str(outcome.result.errors["n1"]) and outcome.result.cursors == {"n1": 0}


def test_the_hook_frames_each_write_and_the_lock_keeps_others_out() -> None:
    trace: list[str] = []

    def hook(data: bytes, write: Callable[[bytes], object]) -> None:
        trace.append("clear")
        write(data)
        trace.append("draw")

    sink = Sink(lambda data: trace.append(data.decode()), hook=hook)
    run({"n1": FakeNode(b"0\tx\n", whole)}, View(names=("n1",)), sink=sink)
    assert trace == ["clear", "n1/0 x\n", "draw"]
    with sink.lock:
        sink.write(b"y")
    assert trace[3:] == ["clear", "y", "draw"]


def test_lines_of_many_nodes_stay_whole() -> None:
    def small(data: bytes) -> Iterator[Act]:
        for place in range(0, len(data), 7):
            yield data[place : place + 7]
        yield 0

    nodes = {f"n{i}": FakeNode(b"%d\tabcdefghijklmn\n" % i * 50, small) for i in range(8)}
    lines = run(nodes, View(raw=True)).out.split(b"\n")
    assert sorted(lines[:-1]) == sorted(b"n%d/%d abcdefghijklmn" % (i, i) for i in range(8) for _ in range(50))


def test_filters_tail_and_fold_together() -> None:
    nodes = {name: FakeNode(b"-\tup\n0\ta\n1\tb\n", whole) for name in ("n1", "n2", "n3")}
    tail = Tail(1)
    outcome = run(nodes, View(names=("n1", "n2"), nodes={"n1", "n2"}, ranks={"1"}), tail=tail)
    assert sorted(outcome.out.splitlines()) == [b"n1/1 b", b"n2/1 b"]
    assert outcome.result.cursors == {"n1": 13, "n2": 13} and not nodes["n3"].opened
    assert tail.lines("n2", "0") == ("a",), "the summary knows also what is not shown"
    folded = FoldView(View(names=tuple(nodes)))
    run(nodes, folded)
    assert sorted(folded.render().splitlines()) == [b"n[1-3]/- up", b"n[1-3]/0 a", b"n[1-3]/1 b"]


def test_cursor_can_be_watched_while_following() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def script(data: bytes) -> Iterator[Act]:
        yield data[:6]
        reached.set()
        assert go_on.wait(5)
        yield data[6:]
        yield 0

    node = FakeNode(b"0\ta\n0\tb\n", script)
    follower = Follower(
        [Source("n1", 0, node.open)], Sink(lambda _: None), on_event=lambda *_: None, stop=threading.Event()
    )
    assert follower.cursor("n1") == 0
    follower.start()
    assert reached.wait(5)
    assert follower.cursor("n1") == 4 and follower.running
    go_on.set()
    assert follower.join(5).cursors == {"n1": 8}
    with pytest.raises(KeyError):
        follower.cursor("n9")


@pytest.mark.parametrize(
    ("terminal", "env", "color"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_wants_color(terminal: bool, env: dict[str, str], color: bool) -> None:
    assert wants_color(terminal, env) is color


def test_a_terminal_gets_colours_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out: list[bytes] = []
    run({"n1": FakeNode(b"0\tx\n", whole)}, sink=Sink(out.append, terminal=True))
    run({"n1": FakeNode(b"0\tx\n", whole)}, sink=Sink(out.append))
    assert out == [b"\x1b[36mn1/0\x1b[0m x\n", b"n1/0 x\n"]


def test_write_all_waits_for_a_slow_reader_on_a_non_blocking_pipe() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    got: list[bytes] = []

    def drain() -> None:
        while piece := os.read(read_end, 65536):
            got.append(piece)

    reader = threading.Thread(target=drain)
    data = os.urandom(300_000)
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            os.write(write_end, b"x" * 4096)
    reader.start()
    write_all(write_end, data)
    os.close(write_end)
    reader.join(10)
    os.close(read_end)
    assert b"".join(got).lstrip(b"x").endswith(data[100:])


def test_sink_to_a_text_stream_without_a_file() -> None:
    text = io.TextIOWrapper(io.BytesIO())
    sink = Sink.to(text)
    sink.write(b"abc\n")
    assert text.buffer.getvalue() == b"abc\n" and not sink.terminal  # type: ignore[attr-defined]
    text.close()
    with pytest.raises(SinkClosed):
        sink.write(b"more\n")
