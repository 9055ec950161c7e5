"""Quoting, through the real /bin/sh: whatever goes in comes out, and never runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.commands.shell import (
    Raw,
    assign,
    chain,
    export,
    join,
    lines,
    login,
    path,
    quote,
    script,
    sh,
    tethered,
)
from orchestrator.errors import UsageError

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
hostile = [
    "",
    "it's",
    'say "x"',
    "$(touch /tmp/pwned)",
    "`id`",
    "a\nb\n",
    "\\",
    "\\n",
    "-n",
    "~",
    "~root",
    "*",
    "a=b",
    "!x",
    "{a,b}",
    "é\u2028ß",
    "'\"'\"'",
    "\x01\x02\x03",
    "a;b|c&d>e",
]


def run(command: str, **env: str) -> str:
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env={"PATH": os.environ["PATH"], **env})
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.decode()


def printed(command: str) -> str:
    """What `command`, an echo of its arguments, prints: each ended by `|`."""
    return run(command)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=12))
@example(hostile)
def test_any_text_comes_out_as_it_went_in(words: list[str]) -> None:
    assert printed(join(["printf", "%s|", *words])) == "".join(f"{word}|" for word in words)


@settings(max_examples=60, deadline=None)
@given(texts)
@example("".join(hostile))
def test_a_value_survives_assignment_export_and_a_shell_in_a_shell(text: str) -> None:
    kept = "X"  # $(…) drops newlines at the end, so something must follow
    command = lines(assign("a", text), export({"b": text}), sh('printf "%s%s" "$b" "$1"', text + kept))
    assert printed(command + 'printf "%s" "$a"') == text * 2 + kept + text


@settings(max_examples=60, deadline=None)
@given(texts)
@example("".join(hostile[:-2]))
@example("a\\b\n!c'd\"")
def test_a_command_reaches_the_shell_behind_a_login_shell(text: str) -> None:
    assert run(login(join(["printf", "%s", text + "."]))) == text + "."


def test_login_quoting_is_what_other_login_shells_read_too() -> None:
    command = join(["printf", "%s", "a\\'b\n!c\"$(x)`y`\\\\."])
    shells = [shell for shell in ("bash", "dash", "zsh", "fish", "tcsh", "csh") if shutil.which(shell)]
    assert shells
    for shell in shells:
        done = subprocess.run([shell, "-c", login(command)], capture_output=True, text=True)
        assert done.stdout == "a\\'b\n!c\"$(x)`y`\\\\.", shell


@pytest.mark.parametrize("name", ["a b", "it's", "$HOME", "x\ny", "-rf", "a", ".hidden"])
def test_a_path_in_the_home_there_or_as_written(name: str, tmp_path: Path) -> None:
    home = tmp_path / "the home"
    home.mkdir()
    run(f"printf x > {path('~/' + name)}", HOME=str(home))
    assert [entry.name for entry in home.iterdir()] == [name]
    (home / name).unlink()
    run(f"cd {path(str(home))} && printf x > {path(name)} && cat {path(name)}", HOME="/nonexistent")
    assert [entry.name for entry in home.iterdir()] == [name]


def test_the_home_itself() -> None:
    assert run(f"printf %s {path('~')}", HOME="/a b") == "/a b"
    assert run(f"printf %s {path('~/')}", HOME="/a b") == "/a b/"


def test_a_command_word_is_never_an_assignment_or_a_keyword() -> None:
    for word in ("a=b", "if", "~/x", "{"):
        done = subprocess.run(["/bin/sh", "-c", join([word, "x"])], capture_output=True, text=True)
        assert done.returncode == 127, (word, done)


def test_plain_words_stay_readable() -> None:
    assert join(["docker", "run", "--name=x", "a/b:c@d", Raw('"$HOME"'), "a b"]) == (
        "docker run --name=x a/b:c@d \"$HOME\" 'a b'"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: quote("a\0b"),
        lambda: join(["a\0"]),
        lambda: quote("\ud800"),
        lambda: path(""),
        lambda: path("~bob/x"),
        lambda: join([]),
        lambda: assign("1x", "a"),
        lambda: assign("a b", "a"),
        lambda: login("a\0b"),
    ],
)
def test_what_cannot_be_said_in_shell_is_refused(make) -> None:
    with pytest.raises(UsageError):
        make()


def test_a_script_stops_at_its_first_failure() -> None:
    done = subprocess.run(["/bin/sh", "-c", script("echo a", "", "false", "echo b")], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("a\n", 1)
    done = subprocess.run(["/bin/sh", "-c", script('echo "$unset_thing"')], capture_output=True, text=True)
    assert done.returncode != 0
    assert run(chain("true", "", "echo yes")) == "yes\n"


def test_a_tethered_command_keeps_its_code_and_ends_with_its_input() -> None:
    done = subprocess.run(["/bin/sh", "-c", tethered("echo a; exit 5")], stdin=subprocess.PIPE, capture_output=True)
    assert done.returncode in (5, 143)  # input ended at once: whichever came first
    child = f"{sys.executable} -c 'import time; print(1, flush=True); time.sleep(60)'"
    process = subprocess.Popen(
        ["/bin/sh", "-c", tethered(child)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"1\n"
    process.stdin.close()
    assert process.wait(10) == 143
    assert process.stdout.read() == b""  # nobody holds the pipe any more
    process.stdout.close()


def test_a_tethered_command_that_ends_by_itself_gives_its_code() -> None:
    with subprocess.Popen(
        ["/bin/sh", "-c", tethered("exit 6")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(10) == 6
