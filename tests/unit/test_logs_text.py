"""What of a job's text reaches the terminal, `--since`, and the last lines."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.logs import Tail, offset_since, parse_since, sanitize

PIECES = [
    b"\x1b", b"[", b"]", b"31m", b"2J", b"0;title", b"\x07", b"\x1b\\", b"\r", b"\b", b"\x00", b"\xc2",
    b"\x9b", b"\xc2\x9b", b"\xc2\x9d", b"\x9c", b"\xc3\xa9", b"abc", b"\t", b"\xe2\x96\x88", b"P", b"(B",
    b"?25l", b">4m",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "plain", "colored"),
    [
        (b"loss 2.31\tok", b"loss 2.31\tok", b"loss 2.31\tok"),
        ("é █ naïve".encode(), "é █ naïve".encode(), "é █ naïve".encode()),
        ("« guillemets » ©".encode(), "« guillemets » ©".encode(), "« guillemets » ©".encode()),
        (b"\x1b[31mred\x1b[0m", b"red", b"\x1b[31mred\x1b[0m"),
        (b"\x1b[1;38;5;9mopen", b"open", b"\x1b[1;38;5;9mopen\x1b[0m"),
        (b"\x1b[2J\x1b[Hcleared", b"cleared", b"cleared"),
        (b"\x1b[Aup\x1b[3D\x1b[K", b"up", b"up"),
        (b"\x1b[?25lhidden\x1b[?1049h", b"hidden", b"hidden"),
        (b"\x1b[>4mkeys", b"keys", b"keys"),
        (b"\x1b]0;my title\x07text", b"text", b"text"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", b"link", b"link"),
        (b"\x1b]52;c;aGk=\x07copied", b"copied", b"copied"),
        (b"\x1b]no end, text stays", b"no end, text stays", b"no end, text stays"),
        (b"\x1bPq#0;2\x1b\\sixel", b"sixel", b"sixel"),
        (b"\x1bcreset\x1b7\x1b(Bx", b"resetx", b"resetx"),
        (b"bell\x07 back\b\bspace \x7f\x00", b"bell backspace ", b"bell backspace "),
        (b"\xc2\x9b2Jc1\xc2\x85", b"c1", b"c1"),
        (b"\xc2\x07\x9b2J", b"\xef\xbf\xbd\x9b2J", b"\xef\xbf\xbd\x9b2J"),
        (b"trailing\r", b"trailing", b"trailing"),
        (b"10%\r 50%\r100%", b"100%", b"100%"),
        (b"\r 10%|#  |\r 50%|## |\r", b" 50%|## |", b" 50%|## |"),
        (b"frame\r\x1b[K", b"frame", b"frame"),
        (b"a\r\x1b[32mb", b"b", b"\x1b[32mb\x1b[0m"),
        (b"\x1b", b"", b""),
        (b"", b"", b""),
    ],
)
def test_sanitize(text: bytes, plain: bytes, colored: bytes) -> None:
    assert sanitize(text) == plain
    assert sanitize(text, color=True) == colored


@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join))
def test_nothing_but_colours_ever_passes(text: bytes) -> None:
    allowed = re.compile(rb"\x1b\[[0-9;:]*m")
    plain, colored = sanitize(text), sanitize(text, color=True)
    for out in (plain, allowed.sub(b"", colored)):
        assert not re.search(rb"[\x00-\x08\x0a-\x1f\x7f]|\xc2[\x80-\x9f]", out)
    assert b"\x1b" not in colored or colored.endswith(b"\x1b[0m")
    assert sanitize(plain) == plain


@given(st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs"))))
def test_printable_text_is_untouched(text: str) -> None:
    assert sanitize(text.encode()) == sanitize(text.encode(), color=True) == text.encode()


def test_a_hostile_line_takes_no_quadratic_time() -> None:
    start = time.process_time()
    for piece in (b"\xc2\x9d", b"\x1b]", b"\x1b[0;", b"\x1b[ ", b"\xc2", b"\r"):
        sanitize(piece * (65536 // len(piece)))
    assert time.process_time() - start < 5


def test_durations_count_back_from_now() -> None:
    assert parse_since("90s", now=1000.0) == 910.0
    assert parse_since("10m", now=1000.0) == 400.0
    assert parse_since(" 1h30m ", now=10_000.0) == 4600.0
    assert parse_since("0.5d", now=100_000.0) == 56_800.0
    assert parse_since("9w", now=10.0) == 0.0
    assert abs(parse_since("1m") - (time.time() - 60)) < 5


def test_times_are_local_unless_they_name_a_zone() -> None:
    assert parse_since("2026-01-01T10:00") == datetime(2026, 1, 1, 10).timestamp()
    assert parse_since("2026-01-01 10:00:30") == datetime(2026, 1, 1, 10, 0, 30).timestamp()
    assert parse_since("2026-01-01") == datetime(2026, 1, 1).timestamp()
    assert parse_since("2026-01-01T10:00Z") == datetime(2026, 1, 1, 10, tzinfo=UTC).timestamp()
    east = timezone(timedelta(hours=2))
    assert parse_since("2026-01-01T10:00+02:00") == datetime(2026, 1, 1, 10, tzinfo=east).timestamp()


@pytest.mark.parametrize("text", ["", "10", "yesterday", "10 minutes", "-5m", "2026-13-01", "1h5", "m", "20260101"])
def test_what_is_no_time_says_what_would_be(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the time") as caught:
        parse_since(text)
    assert "10m" in (caught.value.hint or "")


INDEX = "100.000 0\n101.250 500\n105.000 900\n"


@pytest.mark.parametrize(
    ("t", "offset"),
    [(0.0, 0), (100.0, 0), (101.2, 0), (101.25, 500), (104.9, 500), (105.0, 900), (1e9, 900)],
)
def test_offset_since(t: float, offset: int) -> None:
    assert offset_since(INDEX, t) == offset


def test_offset_since_survives_what_is_damaged() -> None:
    assert offset_since("", 5.0) == 0
    assert offset_since("100.0 7\n105.0 90", 200.0) == 7, "a torn last entry is not one"
    assert offset_since("rubbish\n100.0 7\n\nx y\n", 200.0) == 7
    assert offset_since("100 7\n", 100.5) == 0, "whole seconds may be rounded down"
    assert offset_since("100 7\n", 101.0) == 7
    assert offset_since("nan 7\n", 101.0) == 0
    assert offset_since("100.0 0\n50.0 10\n200.0 20\n", 60.0) == 0, "a clock set back: rather too much"


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), max_size=40), st.floats(0, 120))
def test_no_line_at_or_after_t_is_missed(steps: list[tuple[float, int]], t: float) -> None:
    """A launcher that writes as the index is specified, simulated line by line."""
    index, now, size, last = "", 1.0, 0, None
    written: list[tuple[float, int]] = []
    for pause, length in steps:
        now = round(now + pause, 3)
        if last is None or now - last >= 1:
            index, last = index + f"{now:.3f} {size}\n", now
        written.append((now, size))
        size += length
    offset = offset_since(index, t)
    assert all(place >= offset for when, place in written if when >= t)
    older = [when for when, place in written if place >= offset and when < t]
    assert not older or older[-1] - older[0] < 1, "no more than a second's worth of older output"


def test_tail_keeps_each_ranks_last_lines_in_order() -> None:
    tail = Tail(2)
    tail.feed("n1", b"0\ta\n0\tb\n-\thello\n0\tc\n1\t\x1b[31mx\x1b[0m\n")
    tail.feed("n2", b"2\tonly")
    tail.feed("n1", b"damaged\n?\tq\n")
    assert tail.lines("n1", "0") == ("b", "c")
    assert tail.lines("n1", "1") == ("x",)
    assert tail.lines("n1", "-") == ("hello",)
    assert tail.lines("n1", "?") == ("damaged", "?\tq")
    assert tail.lines("n2", "2") == ("only",)
    assert tail.lines("n2", "9") == tail.lines("n9", "0") == ()
    assert tail.ranks() == [("n1", "0"), ("n1", "-"), ("n1", "1"), ("n1", "?"), ("n2", "2")]


def test_tail_bounds_its_memory() -> None:
    tail = Tail(1)
    tail.feed("n1", b"0\t" + b"x" * 60_000 + b"\n")
    assert len(tail.lines("n1", "0")[0]) == 4096
