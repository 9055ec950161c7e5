"""Draws the terminal sessions of README.md: a command really run in a pseudo-terminal, then its bytes as SVG.

    python docs/picture.py record out.ansi -- orch deploy --nodes 2 --gpus 0 --procs 2 --recipe demo
    python docs/picture.py draw docs/images/deploy.svg out.ansi --title "orch deploy" --keep 24 --keep-end 22

`record` keeps every byte that the terminal got, below a prompt line with the command. `draw` leaves out only what
lies between the first `--keep` and the last `--keep-end` lines, and says so in a line of its own. It knows colours
and nothing else of terminals: build the image before, because progress bars redraw their lines.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

COLUMNS = 114
PROMPT = "\x1b[1;32m$\x1b[0m "


def record(command: list[str], columns: int = COLUMNS) -> bytes:
    """Runs `command` in a pseudo-terminal of `columns` and gives all that it wrote, also to this terminal."""
    leader, follower = pty.openpty()
    # The size is what programs ask for; without it they would take the outer terminal's.
    subprocess.run(["stty", "rows", "50", "cols", str(columns)], stdin=follower, check=True)
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)}
    environment.pop("NO_COLOR", None)
    shown = PROMPT.encode() + shlex.join(command).encode() + b"\r\n"
    child = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:  # Linux: the last writer has closed its end
            break
        if not chunk:
            break
        shown += chunk
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
    child.wait()
    return shown


def trimmed(lines: list[str], keep: int, keep_end: int) -> list[str]:
    """The first `keep` and the last `keep_end` lines, and between them how many are left out."""
    left_out = len(lines) - keep - keep_end
    if left_out <= 1:
        return lines
    return [*lines[:keep], f"\x1b[2m     … {left_out} lines left out …\x1b[0m", *lines[-keep_end:]]


def draw(lines: list[str], title: str, columns: int = COLUMNS) -> str:
    """`lines`, with their ANSI colours, as an SVG of a terminal window."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for line in lines:
        text = Text.from_ansi(line)
        for row in text.divide(range(columns, len(text), columns)):  # as a terminal wraps: anywhere
            console.print(row, highlight=False)
    # The picture fetches no font from anywhere: every system has a monospaced one.
    form = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = form.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono")
    return console.export_svg(title=title, unique_id="orch", code_format=form)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recorder = actions.add_parser("record")
    recorder.add_argument("output", type=Path)
    recorder.add_argument("--columns", type=int, default=COLUMNS)
    recorder.add_argument("command", nargs=argparse.REMAINDER)
    drawer = actions.add_parser("draw")
    drawer.add_argument("svg", type=Path)
    drawer.add_argument("sessions", type=Path, nargs="+", help="what `record` wrote; several are joined")
    drawer.add_argument("--title", default="orch")
    drawer.add_argument("--keep", type=int, default=1000)
    drawer.add_argument("--keep-end", type=int, default=1000)
    drawer.add_argument("--columns", type=int, default=COLUMNS)
    said = parser.parse_args()
    if said.action == "record":
        command = said.command[1:] if said.command[:1] == ["--"] else said.command
        said.output.write_bytes(record(command, said.columns))
    else:
        text = "".join(path.read_text(errors="replace") for path in said.sessions)
        lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
        said.svg.write_text(draw(trimmed(lines, said.keep, said.keep_end), said.title, said.columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
