"""Log lines per second: `cat` of the same bytes against the whole pipeline (cut, prefix, write).

    python benchmarks/log_stream.py [--lines 1000000] [--repeat 3] [--json]

Every source is a `cat FILE` whose pipe is read in pieces of at most 64 KiB, as a channel gives them. The
baseline reads them in the same threads and writes them out as they are. Output goes to /dev/null. Medians;
the ratio is what lasts. Variants: plain (piped output), color (a terminal), bars (every tenth line has
carriage returns), rank (one rank of eight shown), tail (plain, keeping each rank's last 20 lines).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.logs import Sink, Source, Tail, View, follow
from orchestrator.logs.sink import write_all

PIECE = 1 << 16
RANKS = 8


class CatStream:
    """A `cat` from `offset` on, as a connect.base.Stream."""

    def __init__(self, path: Path, offset: int) -> None:
        self._process = subprocess.Popen(
            ["tail", "-c", f"+{offset + 1}", str(path)] if offset else ["cat", str(path)],
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        self.stderr = ""

    def read(self, timeout: float | None = None) -> bytes | None:
        ready, _, _ = select.select((self._fd,), (), (), timeout)
        return os.read(self._fd, PIECE) if ready else None

    @property
    def returncode(self) -> int | None:
        return self._process.wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


def make_log(path: Path, lines: int, *, bars: bool, first_rank: int) -> None:
    """Lines of 120 bytes, eight ranks in turn."""
    with path.open("wb") as file:
        for number in range(lines):
            rank = first_rank + number % RANKS
            head = b"%d\tstep %d loss 2.3456 " % (rank, number)
            bar = b"\r 10%|#   |\r 50%|##  |\r100%|####|" if bars and number % 10 == 0 else b""
            file.write((head + bar).ljust(119, b".") + b"\n")


def baseline(paths: list[Path], fd: int) -> None:
    def copy(path: Path) -> None:
        stream = CatStream(path, 0)
        while chunk := stream.read(1.0):
            write_all(fd, chunk)
        stream.close()

    threads = [threading.Thread(target=copy, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pipeline(paths: list[Path], fd: int, variant: str) -> None:
    names = tuple(f"n{index + 1}" for index in range(len(paths)))
    view = View(
        names=names,
        world=RANKS * len(paths),
        color=variant == "color",
        ranks={"3"} if variant == "rank" else None,
    )
    sources = [
        Source(name, index, lambda offset, path=path: CatStream(path, offset))
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    sink = Sink(lambda data: write_all(fd, data))
    result = follow(
        sources,
        sink,
        on_event=lambda *_: None,
        stop=threading.Event(),
        view=view,
        tail=Tail() if variant == "tail" else None,
    )
    sizes = {name: path.stat().st_size for name, path in zip(names, paths, strict=True)}
    if result.errors or result.cursors != sizes:
        raise SystemExit(f"log_stream: not everything was read: {result}")


def measure(work: Callable[[], None], repeat: int) -> tuple[float, float]:
    """Median wall seconds and CPU seconds (this process) of `work`."""
    walls, cpus = [], []
    for _ in range(repeat):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        work()
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls), statistics.median(cpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000, help="in all, over all sources")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    fd = os.open(os.devnull, os.O_WRONLY)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 16):
            each = options.lines // count
            paths = {bars: [Path(folder) / f"{bars}-{i}" for i in range(count)] for bars in (False, True)}
            for bars, files in paths.items():
                for index, path in enumerate(files):
                    make_log(path, each, bars=bars, first_rank=index * RANKS)
            for variant in ("cat", "plain", "color", "tail", "rank", "bars"):
                files = paths[variant == "bars"]
                if variant == "cat":
                    wall, cpu = measure(lambda files=files: baseline(files, fd), options.repeat)
                    base = wall
                else:
                    wall, cpu = measure(
                        lambda files=files, variant=variant: pipeline(files, fd, variant), options.repeat
                    )
                done = each * count
                rows.append(
                    {
                        "sources": count,
                        "variant": variant,
                        "klines_per_s": round(done / wall / 1e3),
                        "cpu_s_per_mline": round(cpu / done * 1e6, 3),
                        "times_cat": round(wall / base, 2),
                    }
                )
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'sources':>7}  {'variant':8} {'thousand lines/s':>16} {'CPU s/M lines':>14} {'time ÷ cat':>11}")
    for row in rows:
        print(
            f"{row['sources']:>7}  {row['variant']:8} {row['klines_per_s']:>16} "
            f"{row['cpu_s_per_mline']:>14} {row['times_cat']:>11}"
        )


if __name__ == "__main__":
    main()
