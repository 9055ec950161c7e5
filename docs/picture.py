"""Draws the terminal sessions of README.md: a command really run in a pseudo-terminal, then its bytes as SVG.

    python docs/picture.py record out.ansi -- orch deploy --nodes 2 --gpus 0 --procs 2 --recipe demo
    python docs/picture.py draw out.ansi docs/images/deploy.svg --title "orch deploy" --keep 24 --keep-end 22

`record` keeps every byte that the terminal got, behind a prompt line with the command. `draw` leaves out only
what lies between the first `--keep` and the last `--keep-end` lines, and says so in a line of its own.
"""

from __future__ import annotations

import argparse
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

COLUMNS = 110
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
    code = child.wait()
    return shown + PROMPT.encode() + b"echo $?\r\n%d\r\n" % code


def trimmed(text: str, keep: int, keep_end: int) -> str:
    """The first `keep` and the last `keep_end` lines, and between them how many are left out."""
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    left_out = len(lines) - keep - keep_end
    if left_out <= 1:
        return "\n".join(lines)
    note = f"\x1b[2m  … {left_out} lines left out …\x1b[0m"
    return "\n".join([*lines[:keep], note, *lines[-keep_end:]])


def draw(text: str, title: str, columns: int = COLUMNS) -> str:
    """`text`, with its ANSI colours, as an SVG of a terminal window."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for line in text.split("\n"):
        console.print(Text.from_ansi(line), overflow="fold", highlight=False)
    return console.export_svg(title=title, unique_id="orch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recorder = actions.add_parser("record")
    recorder.add_argument("output", type=Path)
    recorder.add_argument("--columns", type=int, default=COLUMNS)
    recorder.add_argument("command", nargs=argparse.REMAINDER)
    drawer = actions.add_parser("draw")
    drawer.add_argument("session", type=Path)
    drawer.add_argument("svg", type=Path)
    drawer.add_argument("--title", default="orch")
    drawer.add_argument("--keep", type=int, default=1000)
    drawer.add_argument("--keep-end", type=int, default=1000)
    drawer.add_argument("--columns", type=int, default=COLUMNS)
    said = parser.parse_args()
    if said.action == "record":
        command = said.command[1:] if said.command[:1] == ["--"] else said.command
        said.output.write_bytes(record(command, said.columns))
    else:
        text = trimmed(said.session.read_text(errors="replace"), said.keep, said.keep_end)
        said.svg.write_text(draw(text, said.title, said.columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
