"""What becomes of a rank's bytes: whole lines, progress bars, long lines, secrets, tracebacks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.node.launch import PIECE, Lines, Tracebacks, split_long


def feed(*chunks: bytes, secrets: tuple[bytes, ...] = (), step: float = 0.0) -> list[bytes]:
    """The log lines for `chunks` that arrive `step` seconds apart, without the rank."""
    lines, out = Lines("3", list(secrets)), b""
    for count, chunk in enumerate(chunks):
        out += lines.tick(count * step) + lines.feed(chunk, count * step)
    out += lines.end()
    assert out == b"" or out.endswith(b"\n")
    rows = out.split(b"\n")[:-1]
    assert all(row.startswith(b"3\t") for row in rows)
    return [row[2:] for row in rows]


def test_lines_are_whole_however_the_bytes_arrive() -> None:
    assert feed(b"al", b"pha\nbe", b"ta\n", b"gam") == [b"alpha", b"beta", b"gam"]


def test_an_unfinished_line_waits_for_its_end() -> None:
    lines = Lines("0", [])
    assert lines.feed(b"loading ...", 0.0) == b""
    assert lines.tick(60.0) == b""
    assert lines.feed(b" done\n", 61.0) == b"0\tloading ... done\n"


@given(st.lists(st.binary(max_size=40)), st.integers(1, 7))
def test_no_byte_is_lost_or_changed(parts: list[bytes], size: int) -> None:
    text = b"".join(parts).replace(b"\r", b"")
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    rows = text.split(b"\n")
    expected = rows[:-1] if rows[-1].strip() == b"" else rows
    assert feed(*chunks) == expected


def test_bytes_that_are_no_utf8_stay_as_they_are() -> None:
    assert feed(b"\xff\xfe caf\xc3\xa9\0\n") == [b"\xff\xfe caf\xc3\xa9\0"]


def test_a_long_line_is_cut_into_pieces() -> None:
    rows = feed(b"x" * (3 * PIECE + 5) + b"\nnext\n")
    assert [len(row) for row in rows] == [PIECE, PIECE, PIECE, 5, 4]


def test_a_long_line_that_never_ends_is_cut_as_it_comes() -> None:
    lines = Lines("0", [])
    text = lines.feed(b"y" * (2 * PIECE + 9), 0.0)
    assert [len(row) - 2 for row in text.split(b"\n")[:-1]] == [PIECE, PIECE]
    assert lines.feed(b"\n", 0.0) == b"0\t" + b"y" * 9 + b"\n"


def test_a_piece_does_not_end_inside_a_character() -> None:
    text = ("a" + "é" * PIECE).encode()
    rows = split_long(text + b"\n").split(b"\n")[:-1]
    assert b"".join(rows) == text
    assert all(len(row) <= PIECE and row.decode() for row in rows)


def test_a_progress_bar_shows_at_most_once_a_second_and_at_its_end() -> None:
    bar = [b"\r%3d%%|##|" % percent for percent in range(0, 101)]
    rows = feed(*bar, b"\nend\n", step=0.1)
    assert rows[-2:] == [b"100%|##|", b"end"]
    assert 10 <= len(rows) - 2 <= 11


def test_the_last_update_of_a_bar_is_kept_without_a_newline() -> None:
    assert feed(b"10%\r", b"20%\r", b"30%\r") == [b"10%", b"30%"]
    assert feed(b"10%\r", b"20%\r", b"\n", b"end\n") == [b"10%", b"20%", b"end"]


def test_a_bar_that_is_wiped_leaves_its_last_update() -> None:
    assert feed(b"\r 10%\r 90%\r", b"     \r\n") == [b" 90%"]


def test_a_held_update_is_written_when_its_second_is_over() -> None:
    lines = Lines("0", [])
    assert lines.feed(b"1%\r", 0.0) == b"0\t1%\n"
    assert lines.feed(b"2%\r", 0.5) == b""
    assert lines.tick(0.9) == b""
    assert lines.tick(1.1) == b"0\t2%\n"


def test_windows_line_ends_are_line_ends() -> None:
    assert feed(b"a\r\nb\r", b"\nc\r\n") == [b"a", b"b", b"c"]


def test_secrets_are_masked_also_across_chunks_and_in_long_lines() -> None:
    secret = b"hf_0123456789"
    assert feed(b"token hf_0123", b"456789!\n", secrets=(secret,)) == [b"token ***!"]
    long = b"z" * (PIECE - 5) + secret + b"z" * PIECE
    chunks = [long[start : start + 1000] for start in range(0, len(long), 1000)]
    joined = b"".join(feed(*chunks, secrets=(secret,)))
    assert joined == b"z" * (PIECE - 5) + b"***" + b"z" * PIECE


def test_the_last_lines_are_kept() -> None:
    lines = Lines("0", [])
    for number in range(100):
        lines.feed(b"line %d \xff\n" % number, 0.0)
    assert lines.last_lines(2) == ["line 98 \ufffd", "line 99 \ufffd"]
    assert len(lines.last_lines()) == 20


PLAIN = """Traceback (most recent call last):
  File "/app/train.py", line 9, in <module>
    main()
  File "/app/train.py", line 5, in main
    raise ValueError("bad: value")
ValueError: bad: value
"""


def find(text: str) -> dict:
    tracebacks = Tracebacks()
    for line in text.splitlines():
        tracebacks.feed(line)
    return tracebacks.last


def test_a_traceback_gives_type_message_and_text() -> None:
    found = find("step 1\n" + PLAIN + "bye\n")
    assert (found["type"], found["message"]) == ("ValueError", "bad: value")
    assert found["traceback"] == PLAIN.rstrip("\n")
    assert found["time_ns"] > 0


def test_torchs_rank_prefix_is_taken_off() -> None:
    text = "".join(f"[rank3]: {line}\n" for line in PLAIN.splitlines())
    assert find(text)["traceback"] == PLAIN.rstrip("\n")


def test_a_foreign_line_inside_a_traceback_does_not_hide_it() -> None:
    lines = [f"[rank3]: {line}" for line in PLAIN.splitlines()]
    found = find("\n".join([*lines[:3], "step 12: loss 3.1", "[rank3]:[W1 x.cpp] warning", *lines[3:]]))
    assert (found["type"], found["message"]) == ("ValueError", "bad: value")
    assert "loss" not in found["traceback"]


def test_of_chained_tracebacks_the_last_exception_counts_and_all_text_is_kept() -> None:
    phrase = "\nThe above exception was the direct cause of the following exception:\n\n"
    second = PLAIN.replace("ValueError: bad: value", "pkg.errors.DataError: no shard")
    found = find(PLAIN + phrase + second)
    assert (found["type"], found["message"]) == ("DataError", "no shard")
    assert "ValueError: bad: value" in found["traceback"] and "direct cause" in found["traceback"]


def test_the_exception_of_a_loader_worker_is_found() -> None:
    text = PLAIN.replace(
        "ValueError: bad: value", "KeyError: Caught KeyError in DataLoader worker process 0."
    )
    found = find(text + "Original " + PLAIN.replace("ValueError: bad: value", "KeyError: 'text'"))
    assert (found["type"], found["message"]) == ("KeyError", "'text'")


def test_a_syntax_error_has_no_header() -> None:
    found = find(
        "  File \"/app/train.py\", line 1\n    def f(\n         ^\nSyntaxError: '(' was never closed\n"
    )
    assert (found["type"], found["message"]) == ("SyntaxError", "'(' was never closed")


def test_an_exception_without_a_message() -> None:
    found = find(PLAIN.replace("ValueError: bad: value", "KeyboardInterrupt"))
    assert (found["type"], found["message"]) == ("KeyboardInterrupt", "")


def test_the_last_of_several_tracebacks_counts() -> None:
    assert find(PLAIN + "retrying\n" + PLAIN.replace("bad: value", "worse"))["message"] == "worse"


def test_a_stack_dump_is_no_traceback() -> None:
    assert (
        find('Stack (most recent call last):\n  File "/a.py", line 1, in f\n    x()\nINFO: going on\n') == {}
    )
