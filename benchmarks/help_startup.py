"""What `orch --help` costs over the interpreter itself: `orch --help` beside `python -c pass`, in turns.

    python benchmarks/help_startup.py [--repeat 20] [--limit-ms 150] [--json]

Both run in the same interpreter and environment, one after the other in every round. The figure is the best of all
rounds, as `timeit` takes it: what other processes add is not ours. Fails (exit 1) when the difference is above the
limit. `import typer` alone is printed too: it is the floor under any typer program.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import typer'": ["-c", "import typer"],
    "orch --help": ["-m", "orchestrator", "--help"],
}


def run(arguments: list[str]) -> tuple[float, float]:
    """Milliseconds of wall clock and of CPU of one run, output thrown away."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed orch is compiled
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=60,
        env=env,
    )
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall * 1000, cpu * 1000


def measure(repeat: int) -> dict[str, tuple[float, float]]:
    """Best (wall, CPU) milliseconds of each case over `repeat` rounds, after one round that warms the caches."""
    rounds = [{name: run(arguments) for name, arguments in CASES.items()} for _ in range(repeat + 1)][1:]
    return {name: (min(row[name][0] for row in rounds), min(row[name][1] for row in rounds)) for name in CASES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--limit-ms", type=float, default=150.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    best = measure(options.repeat)
    base, ours = best["python -c pass"], best["orch --help"]
    over = ours[0] - base[0]
    result = {
        "best_wall_ms": {name: round(wall, 1) for name, (wall, _) in best.items()},
        "best_cpu_ms": {name: round(cpu, 1) for name, (_, cpu) in best.items()},
        "over_ms": round(over, 1),
        "over_cpu_ms": round(ours[1] - base[1], 1),
        "ratio": round(ours[0] / base[0], 2),
        "limit_ms": options.limit_ms,
        "ok": over <= options.limit_ms,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{'':<26}{'wall':>9}{'CPU':>12}{'wall ratio':>12}")
        for name, (wall, cpu) in best.items():
            print(f"{name:<26}{wall:6.1f} ms{cpu:9.1f} ms{wall / base[0]:11.2f}x")
        print(f"orch --help over python: {over:.1f} ms (limit {options.limit_ms:g} ms)")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
