"""The frame: lazy commands, global options, the one catch point, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import typer

from orchestrator import __version__
from orchestrator.cli import main as frame
from orchestrator.cli.state import state
from orchestrator.errors import ConnectError, Interrupted, NodesFailed, OrchError, Preempted

ROOT = Path(__file__).parents[3]


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        frame.main(argv)
    return caught.value.code


@pytest.fixture
def command(monkeypatch):
    """Puts a function or a group into the table as the command `probe`."""

    def put(found) -> None:
        module = ModuleType("probe_command")
        module.probe = found
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(frame.COMMANDS, "probe", ("Look", "probe_command:probe", "A probe."))

    return put


def orch(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


# --- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_none():
    code = (
        "import sys\nfrom orchestrator.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'rich', 'pydantic', 'yaml', 'paramiko', 'docker', 'fabric', 'logging', 'sqlite3', 'requests'}\n"
        "loaded = {name for name in sys.modules if name.split('.')[0] in heavy}\n"
        "ours = {name for name in sys.modules if name.startswith('orchestrator.')}\n"
        "assert not loaded, sorted(loaded)\n"
        "assert ours <= {'orchestrator.cli', 'orchestrator.cli.main', 'orchestrator.cli.state'}, sorted(ours)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name, (section, _, text) in frame.COMMANDS.items():
        assert f"  {name} " in done.stdout and f"{section}:" in done.stdout and text in done.stdout
    assert "Exit codes:" in done.stdout


@pytest.mark.parametrize("name", sorted(frame.COMMANDS))
def test_every_command_in_the_table_exists_and_explains_itself(name, capsys):
    module, _, attribute = frame.COMMANDS[name][1].partition(":")
    assert hasattr(import_module(module), attribute)
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert f"Usage: orch {name}" in text and "--config FILE" in text and "--debug" in text


def test_without_arguments_the_help_is_shown(capsys):
    assert run() == 0
    assert "Usage: orch" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"orch {__version__}\n"


# --- options and arguments -----------------------------------------------------------------------------------------


def test_global_options_stand_before_or_after_the_command(command):
    seen = []

    def probe(words: list[str] = typer.Argument(None)) -> None:
        now = state()
        seen.append((now.config_path, now.inventory_path, now.debug, words, now.command))

    command(probe)
    assert run("--config", "c", "--inventory", "i", "--debug", "probe") == 0
    assert run("probe", "--config", "c", "--inventory", "i", "--debug", "x", "--", "--config", "d e") == 0
    assert run("--config", "a", "probe", "--config", "c") == 0
    assert run("probe") == 0
    assert seen[0][:3] == ("c", "i", True)
    assert seen[1] == ("c", "i", True, ["x", "--config", "d e"], ("--config", "d e"))
    assert seen[2][0] == "c"
    assert seen[3][:3] == (None, None, False) and seen[3][4] is None


def test_groups_and_their_commands_take_them_too(command):
    app = typer.Typer()
    seen = []

    @app.command()
    def one() -> None:
        seen.append(state().config_path)

    @app.command()
    def two() -> None: ...

    command(app)
    assert run("probe", "one", "--config", "x") == 0
    assert run("probe", "--config", "y", "one") == 0
    assert seen == ["x", "y"]


def test_words_after_the_command_can_be_left_alone(command):
    seen = []

    def probe(words: list[str]) -> None:
        seen.append(words)

    probe.context_settings = {"allow_interspersed_args": False}
    command(probe)
    assert run("probe", "nvidia-smi", "-L", "--debug") == 0
    assert seen == [["nvidia-smi", "-L", "--debug"]]


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OrchError("bad", node="n1", hint="fix it"), 1, "error: n1: bad\nhint: fix it\n"),
        (Preempted("saved"), 75, "error: saved\n"),
        (Interrupted("stopped", signum=15), 143, "error: stopped\n"),
        (NodesFailed("x", {"a": ConnectError("y")}), 3, "error: x\n  a: y\n"),
        (ValueError("boom\nmore"), 1, "error: internal error: ValueError: boom; run again with --debug\n"),
        (ValueError(), 1, "error: internal error: ValueError; run again with --debug\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(7), 7, ""),
        (typer.Abort(), 130, ""),
    ],
)
def test_every_end_has_its_code_and_its_words(command, capsys, error, code, text):
    def probe() -> None:
        raise error

    command(probe)
    assert run("probe") == code
    captured = capsys.readouterr()
    assert captured.err == text and captured.out == ""


def test_debug_shows_the_traceback(command, capsys):
    def probe() -> None:
        raise OrchError("bad")

    command(probe)
    assert run("probe", "--debug") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["bild"], "error: unknown command 'bild'; did you mean 'build'?"),
        (["--nonsense"], "error: No such option: --nonsense\nhint: `orch --help`"),
        (["nodes", "lst"], "error: No such command 'lst'"),
        (["nodes", "check", "--gpus", "x"], "hint: `orch nodes check --help`"),
    ],
)
def test_wrong_usage_is_2_and_says_where_to_read(argv, text, capsys):
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert text in captured.err and captured.out == ""


def test_a_group_alone_shows_its_help(capsys):
    assert run("nodes") == 2
    error = capsys.readouterr().err
    assert error.startswith("Usage: orch nodes") and "error:" not in error


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b"" and process.returncode == 141


# --- completion ----------------------------------------------------------------------------------------------------


def complete(cwd: Path, line: str, **env: str) -> list[str]:
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator"],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_ORCH_COMPLETE": "complete_bash",
            "COMP_WORDS": "\n".join(words),
            "COMP_CWORD": str(len(words) - 1),
            **env,
        },
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def project(tmp_path):
    (tmp_path / "orch.yaml").write_text("targets: {default: sim, sim: {inventory: inv.yaml}, second: {}}\n")
    (tmp_path / "inv.yaml").write_text("nodes: {n1: , n2: }\ngroups: {pair: [n1]}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("orch de", ["deploy"]),
        ("orch nodes ", ["list", "check", "trust", "exec"]),
        ("orch nodes check n", ["n1", "n2"]),
        ("orch nodes exec --nodes n1,p", ["n1,pair"]),
        ("orch nodes check --on s", ["second", "sim"]),
        ("orch --inventory inv.yaml nodes list p", ["pair"]),
        ("orch --ver", ["--version"]),
        ("orch nodes check --con", ["--config"]),
    ],
)
def test_completion(project, line, expected):
    assert complete(project, line) == expected


def test_completion_of_run_ids_newest_first(project, monkeypatch):
    from orchestrator.cli.complete import runs
    from orchestrator.runs import History, Record
    from orchestrator.specs import Run, RunState

    monkeypatch.setenv("ORCH_STATE", str(project / "state"))
    assert runs("") == []
    history = History.open()
    for number in (1, 2):
        history.record(Record(Run(f"job-{number}", "job", RunState.FAILED, "ssh", (), float(number))))
    assert runs("job") == ["job-2", "job-1"] and runs("x") == []


def test_completion_of_recipes(project, monkeypatch):
    from orchestrator.cli.complete import recipes

    (project / "recipes").mkdir()
    (project / "recipes" / "mine.yaml").write_text("")
    monkeypatch.chdir(project)
    frame.reset()
    assert recipes("mi") == ["mine"]


@pytest.mark.parametrize("text", ["targets: [", "- a", "targets: {default: x, sim: {inventory: none.yaml}}"])
def test_completion_never_complains(project, text):
    (project / "orch.yaml").write_text(text)
    assert complete(project, "orch nodes check n") == []


def test_the_completion_script_names_this_program():
    done = orch("--show-completion", "bash")
    assert done.returncode == 0 and "_ORCH_COMPLETE=complete_bash" in done.stdout and "orch" in done.stdout
