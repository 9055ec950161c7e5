"""Edit one line of training code, build, push: `orch build` against bare `docker build` + `docker push`.

Needs a Docker engine with buildx and a registry on this machine:
    python benchmarks/build_push.py --repository localhost:5001/bench [--rounds 5]
Both sides add the same files to the same layers below, in turns, so that a busy machine troubles both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = "FROM {deps}\nCOPY orch/ /opt/orch/\nCOPY root/ /\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", default="localhost:5001/bench", help="where to push")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="orch-bench-") as folder:
        project = _project(Path(folder), given.repository)
        try:
            result = _measure(project, given.repository, given.rounds)
        finally:
            _clean(given.repository)
    if given.json:
        print(json.dumps(result))
        return
    print(f"{'':24}{'orch build':>12}{'bare docker':>12}{'ratio':>8}{'more':>9}")
    for name, row in result.items():
        ratio = row["orch"] / row["docker"]
        print(
            f"{name:24}{row['orch']:>10.2f} s{row['docker']:>10.2f} s{ratio:>8.2f}{row['orch'] - row['docker']:>7.2f} s"
        )


def _project(folder: Path, repository: str) -> Path:
    """A checkout of its own: the trainer in it can be edited without touching this one."""
    project = folder / "checkout"
    for part in ("orchestrator", "trainer", "images"):
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".dockerignore", project)
    (project / "orch.yaml").write_text(f"name: bench\nimage: {{repository: {repository}, variant: cpu}}\n")
    return project


def _measure(project: Path, repository: str, rounds: int) -> dict[str, dict[str, float]]:
    _orch(project)  # layers below the code, and their push
    deps = json.loads(_run(_argv(project, "--dry-run", "--json"), project))["commands"][0].split(" -t ")[1].split()[0]
    plain = project.parent / "plain"
    (plain / "root/workspace").mkdir(parents=True)
    (plain / "orch").mkdir()
    shutil.copytree(project / "trainer", plain / "orch/trainer")
    (plain / "Dockerfile").write_text(DOCKERFILE.format(deps=deps))
    _docker(plain, repository, "warm")
    edits: dict[str, list[float]] = {"orch": [], "docker": []}
    warm: dict[str, list[float]] = {"orch": [], "docker": []}
    for at in range(rounds):
        _edit(project / "trainer")
        edits["orch"].append(_timed(lambda: _orch(project)))
        _edit(plain / "orch/trainer")
        edits["docker"].append(_timed(lambda at=at: _docker(plain, repository, f"r{at}")))
        warm["orch"].append(_timed(lambda: _orch(project)))
        warm["docker"].append(_timed(lambda at=at: _docker(plain, repository, f"r{at}")))
    rows = (("after an edit", edits), ("nothing changed", warm))
    return {name: {side: statistics.median(times) for side, times in row.items()} for name, row in rows}


def _edit(trainer: Path) -> None:
    with open(trainer / "__init__.py", "a") as file:
        file.write(f"# {uuid.uuid4()}\n")


def _argv(project: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "build", *words]


def _orch(project: Path) -> None:
    _run(_argv(project), project)


def _docker(plain: Path, repository: str, tag: str) -> None:
    _run(["docker", "build", "-q", "-t", f"{repository}:{tag}", "."], plain)
    _run(["docker", "push", "-q", f"{repository}:{tag}"], plain)


def _run(argv: list[str], folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder), "DOCKER_BUILDKIT": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed orch is compiled
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _timed(step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _clean(repository: str) -> None:
    """Removes the images made here from the engine; the layers below the code stay."""
    listed = subprocess.run(["docker", "image", "ls", "-q", repository], capture_output=True, text=True, check=False)
    if listed.stdout.split():
        subprocess.run(["docker", "image", "rm", "-f", *set(listed.stdout.split())], capture_output=True, check=False)


if __name__ == "__main__":
    main()
