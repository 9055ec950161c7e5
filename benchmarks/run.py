"""All figures, each side by side in one run: `make bench`, or one script alone.

    python benchmarks/run.py [--only NAME]… [--markdown | --json] [--sim NAME] [--quick]

About twenty-five minutes on two cores; `--only trainer`, which needs no cluster, takes half of
it. Ends with 1 if a figure misses its target. `--markdown` prints the table of docs/benchmarks.md, with the
machine and the day.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENCE = 1200
TRAINER = Path(os.environ.get("ORCH_TRAINER_PYTHON") or HERE.parent / ".venv-trainer/bin/python")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    figure: str
    ours: str
    other: str
    ratio: str
    target: str
    ok: bool | None = None
    """None where a figure has no target."""


def help_startup(result: dict) -> list[Row]:
    ours, base = result["best_wall_ms"]["orch --help"], result["best_wall_ms"]["python -c pass"]
    target = f"+ {result['limit_ms']:.0f} ms"
    said = f"{result['ratio']:.1f}× (+ {result['over_ms']:.0f} ms)"
    return [Row("`orch --help` / `python -c pass`", f"{ours:.0f} ms", f"{base:.0f} ms", said, target, result["ok"])]


def _compared(figure: str, result: dict) -> Row:
    target = "1.2× or + 0.5 s"
    said = f"{result['ratio']:.2f}× ({result['over_s']:+.2f} s)"
    return Row(figure, f"{result['orch_s']:.2f} s", f"{result['script_s']:.2f} s", said, target, result["ok"])


def deploy(result: dict) -> list[Row]:
    commands, floor = result["remote_commands"], result["floor_s"]
    return [
        _compared("warm `orch deploy`, to last container started / same by script", result),
        Row("… / bare `ssh docker run -d`", f"{result['orch_s']:.2f} s", f"{floor:.2f} s",
            f"{result['orch_s'] / floor:.2f}× ({result['orch_s'] - floor:+.2f} s)", ""),
        Row("… remote commands a node", str(commands), "", "", "3", commands <= 3),
    ]  # fmt: skip


def edit_to_step(result: dict) -> list[Row]:
    return [_compared("edit one line → first training step / same by script", result)]


def build_push(result: dict) -> list[Row]:
    rows = []
    for name, row in result.items():
        more = row["orch"] - row["docker"]
        said = f"{row['orch'] / row['docker']:.2f}× ({more:+.2f} s)"
        figure = f"`orch build`, {name} / `docker build` + `push`"
        rows.append(Row(figure, f"{row['orch']:.2f} s", f"{row['docker']:.2f} s", said, ""))
    return rows


def log_stream(result: list[dict]) -> list[Row]:
    rows = []
    for count in sorted({row["sources"] for row in result}):
        found = {row["variant"]: row for row in result if row["sources"] == count}
        cat, plain = found["cat"]["klines_per_s"], found["plain"]
        said = f"{plain['times_cat']:.2f}× the time"
        ours = f"{plain['klines_per_s']} k lines/s"
        rows.append(Row(f"log lines of {count} node(s), prefixed / `cat`", ours, f"{cat} k lines/s", said, ""))
    return rows


def trainer_speed(result: dict) -> list[Row]:
    ours, other = result["ours_first_s"], result["bare_first_s"]
    return [
        Row("tokens/s of 2 processes / barest DDP loop", f"{result['ours_tokens_per_s']:,.0f}",
            f"{result['bare_tokens_per_s']:,.0f}", f"{result['ratio']:.3f}×", f"≥ {result['target']}×", result["ok"]),
        Row("… start of torchrun → first step", f"{ours:.1f} s", f"{other:.1f} s",
            f"{ours / other:.2f}× ({ours - other:+.1f} s)", ""),
    ]  # fmt: skip


def data_speed(result: dict) -> list[Row]:
    limits, checks = result["limits"], result["checks"]
    speed, raw = result["ours_tokens_per_s"] / 1e6, result["raw_tokens_per_s"] / 1e6
    first, last = result["memory_first"] / 1e6, result["memory_last"] / 1e6
    return [
        Row("packed tokens/s from MDS / raw iteration of `StreamingDataset`", f"{speed:.1f} M", f"{raw:.1f} M",
            f"{result['ratio']:.2f}×", f"≥ {limits['ratio']}×", checks["ratio"]),
        Row("… on one core", f"{speed:.1f} M", "", "", f"≥ {limits['tokens_per_s'] / 1e6:.0f} M",
            checks["tokens_per_s"]),
        Row("… slots filled", f"{result['filled']:.2%}", "", "", f"≥ {limits['filled']:.0%}", checks["filled"]),
        Row("… memory, last quarter of two epochs / first", f"{last:.1f} MB", f"{first:.1f} MB",
            f"{result['growth']:.3f}×", f"≤ {limits['growth']}×", checks["growth"]),
    ]  # fmt: skip


def useful_tokens(result: dict) -> list[Row]:
    return [
        Row("useful tokens/s on ragged documents / HF `Trainer`, padded", f"{result['ours_tokens_per_s']:,.0f}",
            f"{result['hf_tokens_per_s']:,.0f}", f"{result['ratio']:.2f}×", f"≥ {result['target']}×", result["ok"]),
        Row("… slots that are useful", f"{result['ours_useful']:.1%}", f"{result['hf_useful']:.1%}", "", ""),
    ]  # fmt: skip


def checkpoint_speed(result: dict) -> list[Row]:
    size = f"{result['bytes'] / 1e6:.0f} MB"
    resume, load = result["resume_s"], result["dcp_load_s"]
    return [
        Row(f"asynchronous save of {size}, training stands still / synchronous DCP save",
            f"{result['blocked_s']:.3f} s", f"{result['dcp_s']:.2f} s", f"{result['ratio']:.3f}×",
            f"≤ {result['target']}×", result["ok"]),
        Row("… all that the steps meanwhile take longer", f"{result['lost_s']:.2f} s", f"{result['dcp_s']:.2f} s",
            f"{result['lost_s'] / result['dcp_s']:.2f}×", ""),
        Row("resume from it / `dcp.load`", f"{resume:.2f} s", f"{load:.2f} s", f"{resume / load:.2f}×", ""),
        Row("… of which hashing", f"{result['verify_s']:.2f} s", "",
            f"{result['verify_share']:.0%} ({result['verify_mb_per_s']:,.0f} MB/s)", ""),
    ]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A script with --json, and what of its answer goes into the table."""

    rows: Callable[[Any], list[Row]]
    arguments: tuple[str, ...]
    quick: tuple[str, ...]
    cluster: bool = False
    interpreter: Path = Path(sys.executable)


PARTS = {
    "help_startup": Part(help_startup, ("--repeat", "20"), ("--repeat", "5")),
    "deploy": Part(deploy, ("--rounds", "7"), ("--rounds", "2"), cluster=True),
    "edit_to_step": Part(edit_to_step, ("--rounds", "5"), ("--rounds", "1"), cluster=True),
    "build_push": Part(build_push, ("--rounds", "5"), ("--rounds", "1")),
    "log_stream": Part(log_stream, ("--lines", "400000"), ("--lines", "100000", "--repeat", "1")),
    "trainer_speed": Part(
        trainer_speed, ("--rounds", "3", "--steps", "20"), ("--rounds", "1", "--steps", "5"), interpreter=TRAINER
    ),
    "data_speed": Part(data_speed, ("--rounds", "5"), ("--rounds", "1", "--tokens", "4000000"), interpreter=TRAINER),
    "useful_tokens": Part(
        useful_tokens, ("--rounds", "3", "--steps", "15"), ("--rounds", "1", "--steps", "5"), interpreter=TRAINER
    ),
    "checkpoint_speed": Part(checkpoint_speed, ("--rounds", "5"), ("--rounds", "1"), interpreter=TRAINER),
}
GROUPS = {
    "host": [name for name, part in PARTS.items() if part.interpreter != TRAINER],
    "trainer": [name for name, part in PARTS.items() if part.interpreter == TRAINER],
}


def measure(name: str, given: argparse.Namespace) -> Any:
    """The script's JSON. Its exit code only says that a target was missed, which the table says too."""
    part = PARTS[name]
    if not part.interpreter.exists():
        sys.exit(f"{name}.py needs {part.interpreter}: make setup-trainer")
    argv = [str(part.interpreter), str(HERE / f"{name}.py"), "--json", *(part.quick if given.quick else part.arguments)]
    if part.cluster:
        argv += ["--sim", given.sim, "--project", str(given.project)]
    if name == "build_push":
        argv += ["--repository", f"{_registry(given)}/bench"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        sys.exit(f"{name}.py ended with {done.returncode} and no result")


def _registry(given: argparse.Namespace) -> str:
    sys.path.insert(0, str(HERE.parent))
    from orchestrator.errors import OrchError
    from orchestrator.sim.cluster import load

    try:
        return load(given.sim, given.project).registry
    except OrchError as error:
        sys.exit(f"{error}; {error.hint}")


def _machine() -> str:
    """The machine and how busy others keep it, without which seconds say nothing."""
    load = os.getloadavg()[0]
    day = time.strftime("%Y-%m-%d")
    return f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}, Python {platform.python_version()}, " + (
        f"load before the start {load:.1f}, {day}"
    )


def _marks(row: Row) -> str:
    return {True: "met", False: "MISSED", None: ""}[row.ok]


def _table(rows: list[Row], *, markdown: bool) -> str:
    head = ("figure (ours / other)", "ours", "other", "ratio", "target", "")
    cells = [head, *((row.figure, row.ours, row.other, row.ratio, row.target, _marks(row)) for row in rows)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([lines[0], "|---|---:|---:|---:|---|---|", *lines[1:]])
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*GROUPS, *PARTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--sim", default="sim", metavar="NAME", help="simulated cluster, as in `orch sim up --name`")
    parser.add_argument("--project", type=Path, default=HERE.parent, help="the folder in which it was started")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that everything runs, no figures")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--markdown", action="store_true")
    style.add_argument("--json", action="store_true", help="everything that was measured")
    given = parser.parse_args()
    machine, results, rows = _machine(), {}, []
    for name in dict.fromkeys(name for chosen in given.only or GROUPS for name in GROUPS.get(chosen, [chosen])):
        begun = time.monotonic()
        results[name] = measure(name, given)
        rows += PARTS[name].rows(results[name])
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if given.json:
        print(json.dumps({"machine": machine, **results}))
    else:
        print(f"{_table(rows, markdown=given.markdown)}\n\n{machine}")
    return 1 if any(row.ok is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
