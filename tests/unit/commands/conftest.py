"""A machine of stubs: generated text is run by the real shells, with commands that the test writes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)] or ["sh"]


class Machine:
    """`command` puts a stub on the PATH, `run` runs text with this machine's home as HOME."""

    def __init__(self, root: Path, shell: str) -> None:
        self.shell = shell
        self.home = root / "ho me"
        self.bin = root / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        self.env = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "LOG": str(root / "argv"),
        }
        self.root = root
        self.command("docker", "echo 'sh: 1: docker: not found' >&2; exit 127")

    def command(self, name: str, text: str) -> None:
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def recording(self, name: str, then: str = "") -> None:
        """A stub that keeps the words it was given; `words` gives them back."""
        self.command(name, f'printf \'%s\\0\' "{name}" "$@" "" >> "$LOG"\n{then}')

    @property
    def words(self) -> list[list[str]]:
        """Each recorded call, as its words."""
        text = (self.root / "argv").read_text() if (self.root / "argv").exists() else ""
        calls: list[list[str]] = [[]]
        # a call ends with an empty word; no test gives one to a recording stub
        for word in text.split("\0")[:-1]:
            if word:
                calls[-1].append(word)
            else:
                calls.append([])
        return calls[:-1]

    def popen(self, script: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self.shell, "-c", script],
            env=self.env,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def run(self, script: str, stdin: bytes = b"", timeout: float = 20) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.shell, "-c", script], env=self.env, cwd=self.home, input=stdin, capture_output=True, timeout=timeout
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)
        )


@pytest.fixture(params=SHELLS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path, request.param)
