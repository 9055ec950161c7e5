"""Cutting, prefixing, filtering and folding of lines."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.logs import FoldView, View, compress_nodes, compress_ranks, fold, parse_ranks, sanitize
from orchestrator.logs.view import LIMIT, LineCutter, split_lines

LOG = b"-\tstarting\n0\ta\tb\n1\t\n11\tz\n"


def test_prefixes_are_padded_to_one_width() -> None:
    view = View(names=("n1", "n10"), world=12)
    assert view.formatter("n1")(LOG) == b"n1/-   starting\nn1/0   a\tb\nn1/1   \nn1/11  z\n"
    assert view.formatter("n10")(b"7\tx\n") == b"n10/7  x\n"


def test_colours_by_rank_and_a_dimmed_launcher() -> None:
    out = View(names=("n1",), world=2, color=True).formatter("n1")(b"-\thi\n0\ta\n1\tb\n10\tc\n")
    assert out == (b"\x1b[2mn1/- hi\x1b[0m\n\x1b[36mn1/0\x1b[0m a\n\x1b[33mn1/1\x1b[0m b\n\x1b[36mn1/10\x1b[0m c\n")


def test_plain_output_has_no_escape_sequence() -> None:
    out = View(names=("n1",)).formatter("n1")(b"0\t\x1b[31mred\x1b[0m\n0\t\x1b[2Jx\n0\t1%\r2%\n")
    assert out == b"n1/0 red\nn1/0 x\nn1/0 2%\n"


def test_a_job_s_colour_does_not_run_on() -> None:
    out = View(names=("n1",), color=True).formatter("n1")(b"0\t\x1b[31mred\n1\tx\n")
    assert out == b"\x1b[36mn1/0\x1b[0m \x1b[31mred\x1b[0m\n\x1b[33mn1/1\x1b[0m x\n"


def test_raw_text_is_untouched() -> None:
    text = b"\x1b[2J\r\x07\xc2\x9bx"
    assert View(raw=True, prefix=False).formatter("n1")(b"0\t" + text + b"\n-\tx\n") == text + b"\nx\n"
    assert View(raw=True, names=("n1",)).formatter("n1")(b"3\t" + text + b"\n") == b"n1/3 " + text + b"\n"


@pytest.mark.parametrize("extra", [b"", b"0\t\x07dirty\n", b"damaged\n"])
def test_rank_filter(extra: bytes) -> None:
    shown = View(names=("n1",), ranks={"0", "-"}, world=12).formatter("n1")(LOG + extra)
    assert shown.startswith(b"n1/-  starting\nn1/0  a\tb\n")
    assert b"n1/1" not in shown and b"damaged" not in shown
    assert View(ranks={"5"}).formatter("n1")(LOG) == b""


def test_node_filter() -> None:
    assert View().shows("n1") and View(nodes={"n1"}).shows("n1") and not View(nodes={"n1"}).shows("n2")


def test_damaged_lines_are_shown_whole() -> None:
    out = View(names=("n1",)).formatter("n1")(b"no rank\n0\tx\n?\ty\n\n-1\tz\nunfinished")
    assert out == b"n1/? no rank\nn1/0 x\nn1/? ?\ty\nn1/? \nn1/? -1\tz\nn1/? unfinished\n"


def test_parse_ranks() -> None:
    assert parse_ranks("0,4-6, -") == {"0", "4", "5", "6", "-"}
    assert parse_ranks("007") == {"7"}
    for text in ("", "a", "3-1", "1-", "0,,1", "-3", "0-99999999", "²"):
        with pytest.raises(UsageError, match="cannot read ranks"):
            parse_ranks(text)


RANKS = st.sampled_from([b"-", b"0", b"1", b"12"])
TEXTS = st.one_of(
    st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"")), st.just(b"step"), st.just(b"\x1b[31mx")
)
LINES = st.lists(st.tuples(RANKS, TEXTS), max_size=30)


@given(LINES, st.booleans(), st.booleans())
def test_any_chunking_formats_alike_and_as_defined(lines: list[tuple[bytes, bytes]], color: bool, raw: bool) -> None:
    view = View(names=("n1",), world=13, color=color, raw=raw)
    data = b"".join(rank + b"\t" + text + b"\n" for rank, text in lines)
    expected = b"".join(
        view.label("n1", rank.decode())
        + (text if raw else sanitize(text, color=color))
        + (b"\x1b[0m" if color and rank == b"-" else b"")
        + b"\n"
        for rank, text in lines
    )
    assert view.formatter("n1")(data) == expected
    one_by_one = view.formatter("n1")
    assert b"".join(one_by_one(rank + b"\t" + text + b"\n") for rank, text in lines) == expected


@given(st.binary(max_size=200), st.randoms(use_true_random=False))
def test_the_cutter_gives_whole_lines_and_loses_nothing(data: bytes, rng: random.Random) -> None:
    data = data.replace(b"\x00", b"\n")
    cutter, out, place = LineCutter(), [], 0
    while place < len(data):
        step = rng.randint(1, 9)
        out.append(cutter.feed(data[place : place + step]))
        place += step
    assert all(not piece or piece.endswith(b"\n") for piece in out)
    rest = cutter.rest()
    assert b"\n" not in rest and b"".join(out) + rest == data
    assert cutter.rest() == b""


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    cutter, piece = LineCutter(), b"x" * 65536
    out = b"".join(cutter.feed(piece) for _ in range(40))
    assert len(out) >= LIMIT and len(out) + len(cutter.rest()) == 40 * 65536


def test_compression_of_names() -> None:
    assert compress_nodes({"n1", "n2", "n3", "n5"}) == "n[1-3,5]"
    assert compress_nodes({"n1"}) == "n1"
    assert compress_nodes({"gpu08", "gpu09", "gpu10", "gpu11"}) == "gpu[08-11]"
    assert compress_nodes({"n09", "n100", "n10"}) == "n100,n[09-10]"
    assert compress_nodes({"head", "n2", "n1"}) == "head,n[1-2]"
    assert compress_nodes({"rack1-n1", "rack1-n2", "rack2-n1"}) == "rack1-n[1-2],rack2-n1"
    assert compress_nodes({"n1.lan", "n2.lan"}) == "n[1-2].lan"
    assert compress_nodes(set()) == ""
    assert compress_ranks({"3"}) == "3"
    assert compress_ranks({"0", "1", "2", "10", "9"}) == "[0-2,9-10]"
    assert compress_ranks({"-"}) == "-"
    assert compress_ranks({""}) == ""


def test_fold_of_the_same_text_from_all_ranks() -> None:
    items = [(f"n{1 + rank // 2}", str(rank), text) for text in ("ready", "done") for rank in range(4)]
    assert fold(items) == [("n[1-2]/[0-3]", "ready"), ("n[1-2]/[0-3]", "done")]


def test_fold_keeps_what_differs_apart_and_in_place() -> None:
    first = [("n1", "0", text) for text in ("start", "loss 3", "loss 2", "", "end")]
    second = [("n2", "1", text) for text in ("start", "warning", "", "end")]
    expected = [
        ("n[1-2]/[0-1]", "start"),
        ("n2/1", "warning"),
        ("n1/0", "loss 3"),
        ("n1/0", "loss 2"),
        ("n[1-2]/[0-1]", ""),
        ("n[1-2]/[0-1]", "end"),
    ]
    assert fold(first + second) == expected
    mixed = [item for pair in zip(first, second, strict=False) for item in pair] + [first[-1]]
    assert fold(mixed) == expected, "whole logs one after the other, or as they arrive"


def test_fold_never_merges_the_launcher_with_a_rank_nor_a_rank_with_itself() -> None:
    items = [("n1", "-", "x"), ("n2", "-", "x"), ("n1", "0", "x"), ("n1", "0", "x")]
    assert fold(items) == [("n1/0", "x"), ("n1/0", "x"), ("n[1-2]/-", "x")]


def test_fold_of_a_command_s_output_per_node() -> None:
    items = [("n1", "", "Linux"), ("n2", "", "Linux"), ("n3", "", "Darwin")]
    assert fold(items) == [("n3", "Darwin"), ("n[1-2]", "Linux")]


def test_a_blank_line_is_no_landmark() -> None:
    first = [("n1", "0", f"only here {number}") for number in range(50)] + [
        ("n1", "0", ""),
        ("n1", "0", "end"),
    ]
    second = [("n2", "1", ""), ("n2", "1", "only here 3"), ("n2", "1", "end")]
    assert fold(first + second)[4] == ("n[1-2]/[0-1]", "only here 3")
    assert fold(first + second)[-1] == ("n[1-2]/[0-1]", "end")


@given(st.lists(st.tuples(st.sampled_from("012-"), st.sampled_from(["a", "b", "c", ""])), max_size=60))
def test_fold_keeps_every_line_of_every_rank_in_order(lines: list[tuple[str, str]]) -> None:
    from orchestrator.logs.fold import merge

    items = [("n1" if rank in "0-" else "n2", rank, text) for rank, text in lines]
    own: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, rank, text in items:
        own[node, rank].append(text)
    folded: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group in merge(items):
        assert len(set(group.members)) == len(group.members)
        for member in group.members:
            folded[member].append(str(group.text))
    assert folded == own


def test_fold_view_collects_and_renders() -> None:
    fold_view = FoldView(View(names=("n1", "n2"), world=2, ranks={"0", "1"}, nodes={"n1", "n2"}))
    assert fold_view.shows("n1") and not fold_view.shows("n3")
    assert fold_view.formatter("n2")(b"1\tstart\n-\tignored\n1\t\x1b[31mboom\n") == b""
    assert fold_view.formatter("n1")(b"0\tstart\n0\tfine\n") == b""
    assert fold_view.render() == b"n[1-2]/[0-1] start\nn2/1         boom\nn1/0         fine\n"


def test_fold_view_in_colour_and_without_prefix() -> None:
    for view, expected in (
        (View(color=True), b"\x1b[2mn1/- up\x1b[0m\n\x1b[36mn1/0\x1b[0m x\n"),
        (View(prefix=False), b"up\nx\n"),
    ):
        fold_view = FoldView(view)
        fold_view.formatter("n1")(b"-\tup\n0\tx\n")
        assert sorted(fold_view.render().splitlines()) == sorted(expected.splitlines())


def test_split_lines() -> None:
    assert list(split_lines(b"0\ta\nx\n-\tb")) == [("0", b"a"), ("?", b"x"), ("-", b"b")]
