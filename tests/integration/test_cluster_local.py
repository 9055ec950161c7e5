"""The local backend: the same command line without Docker and without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("ORCH_TRAINER_PYTHON", str(ROOT / ".venv-trainer" / "bin" / "python"))


class Here:
    """A project on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(Path(__file__).parent / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
        document = {
            "name": "here",
            "run": {"grace": 5},
            "local": {"python": PYTHON},
            "storage": {"runs": str(folder / "orch/runs"), "cache": str(folder / "orch/cache")},
            "targets": {"default": "local"},
        }
        (folder / "orch.yaml").write_text(yaml.safe_dump(document))
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("ORCH_")}
        self.env |= {"ORCH_STATE": str(folder / "state"), "PYTHONPATH": str(ROOT)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "orchestrator", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(argv, cwd=self.folder, env=self.env, text=True, **pipes)

    def orch(self, *words: str, code: int = 0) -> tuple[str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=180)
        assert process.returncode == code, f"{words}: {process.returncode}\n{out}\n{err}"
        return out, err

    def log(self, run: str) -> str:
        path = self.folder / "orch/runs" / run / "log"
        return path.read_text() if path.exists() else ""

    def until(self, ready, what: str) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline, what
            time.sleep(0.1)


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


def test_two_ranks_under_torchrun(here: Here) -> None:
    out, err = here.orch("deploy", "--procs", "2", "--", "jobs/echo.py", "a b")
    rows = [json.loads(line.partition(" ")[2]) for line in out.splitlines() if '"argv"' in line]
    assert sorted(row["env"]["RANK"] for row in rows) == ["0", "1"]
    assert {tuple(row["argv"]) for row in rows} == {("a b",)}
    assert "succeeded" in err
    assert sorted(here.orch("logs")[0].splitlines()) == sorted(out.splitlines())
    assert json.loads(here.orch("runs", "--json")[0])[0]["state"] == "succeeded"


def test_detach_follow_stop(here: Here) -> None:
    run = here.orch("deploy", "--detach", "--launcher", "none", "--", "jobs/hold.py")[0].strip()
    here.until(lambda: "ready rank" in here.log(run), "the job is ready")
    assert [row["id"] for row in json.loads(here.orch("ps", "--json")[0])] == [run]
    follower = here.start("logs", "-f")
    out, _ = here.orch("stop", "--json")
    assert json.loads(out)["state"] == "stopped"
    shown, _ = follower.communicate(timeout=60)
    assert "got signal 15" in shown and follower.returncode == 0
    assert json.loads(here.orch("ps", "--json")[0]) == []
    living = subprocess.run(["pgrep", "-f", f"launch.py {here.folder}"], capture_output=True, text=True, check=False)
    assert living.stdout == ""


def test_a_killed_operator_leaves_the_run_and_a_missing_program_is_127(here: Here) -> None:
    attached = here.start("deploy", "--launcher", "none", "--", "jobs/hold.py")
    runs = here.folder / "orch/runs"
    here.until(lambda: any("ready rank" in here.log(path.name) for path in runs.glob("*")), "the job is ready")
    (run,) = (path.name for path in runs.iterdir())
    attached.send_signal(signal.SIGKILL)
    attached.communicate(timeout=30)
    before = here.log(run).count("tick")
    here.until(lambda: here.log(run).count("tick") > before, "the run goes on")
    (runs / run / "go").touch()
    shown, _ = here.orch("logs", "-f")
    assert "gone on" in shown
    assert json.loads(here.orch("status", run, "--json")[0])["state"] == "succeeded"
    _, err = here.orch("deploy", "--launcher", "none", "--", "nosuch", code=127)
    assert "nosuch" in err
