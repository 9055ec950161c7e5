"""What is printed where."""

from __future__ import annotations

import io
import json
import logging

import pytest

from orchestrator.cli import output
from orchestrator.errors import ConnectError, NodesFailed, OrchError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0.0s"), (0.44, "0.4s"), (9.96, "10s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m")],
)
def test_duration(seconds, text):
    assert output.duration(seconds) == text


def test_ago():
    assert output.ago(100.0, now=285.0) == "3m05s ago" and output.ago(None) == "-"


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1.0 MB"), (2_340_000_000, "2.3 GB")],
)
def test_size(count, text):
    assert output.size(count) == text


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert output.style("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert output.style("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.style("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert output.style("x", "red", Terminal()) == "x"


def test_a_remote_machine_cannot_drive_the_terminal(capsys):
    output.say("a\x1b[2Jb\x07\x9bc\td")
    assert capsys.readouterr().err == "a\\x1b[2Jb\\x07\\x9bc\td\n"


def test_piped_tables_are_plain_and_whole(capsys):
    output.table(("NAME", "SIZE"), [("a" * 200, 1), (None, 22)], right=("SIZE",))
    name = "a" * 200
    assert capsys.readouterr().out == f"{'NAME':<200}  SIZE\n{name}     1\n{'-':<200}    22\n"


def test_tables_on_a_terminal_have_colours(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    output.table(("RUN", "STATE"), [("a[b]", "failed")])
    assert "a[b]" in screen.getvalue() and "\x1b[31mfailed" in screen.getvalue()


def test_json_is_alone_on_stdout(capsys):
    output.warn("careful")
    output.emit_json({"a": "é"})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": "é"} and captured.err == "warning: careful\n"


def test_an_error_says_where_why_and_what_next(capsys):
    output.print_error(OrchError("the engine is down", node="n1", hint="start it", lines=["last line"]))
    assert capsys.readouterr().err == "error: n1: the engine is down\n  last line\nhint: start it\n"


def test_every_nodes_error_is_printed_and_each_hint_once(capsys):
    errors = {
        "n1": ConnectError("refused", node="n1", hint="orch nodes trust n1"),
        "n2": ConnectError("refused", node="n2", hint="orch nodes trust n2"),
        "n3": OrchError("broken", node="n3", hint="mend n3", lines=["x"]),
    }
    output.print_error(NodesFailed("could not connect", errors, hint="mend n3"))
    assert capsys.readouterr().err.splitlines() == [
        "error: could not connect",
        "  n1: refused",
        "  n2: refused",
        "  n3: broken",
        "    x",
        "hint: n1, n2: orch nodes trust NODE",
        "hint: n3: mend n3",
    ]


def test_the_layers_warnings_reach_stderr_once(capsys):
    output.route_warnings()
    output.route_warnings()
    logging.getLogger("orch").warning("set %s aside", "it")
    assert capsys.readouterr().err == "warning: set it aside\n"


def test_nobody_to_ask_means_no(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert output.confirm("sure?") is False
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert output.confirm("sure?") is True
    monkeypatch.setattr("sys.stdin", Terminal("\n"))
    assert output.confirm("sure?") is False
