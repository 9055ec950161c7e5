"""Warm `orch deploy`, command to last container started, against the least that a shell script can do.

    python benchmarks/deploy.py [--rounds 7] [--sim NAME] [--json]

Nothing has changed since the last deploy: the image is on the nodes. `orch deploy --detach` finds that out, checks
every node, takes the lease, stages the run, creates on all and starts on all. The script (shell/deploy.sh) goes through
`docker build`, `docker push` and, on all nodes at once, `ssh … docker pull && docker run -d`. Each is timed from its
start to its return, which is when the last container has been started. `floor` is the script without build, push and
pull. The container does nothing (`python3 -c pass`), so that rounds do not disturb each other.
"""

from __future__ import annotations

import json
import statistics
import sys

from cluster import Bench, alternate, arguments, bench, compare, run, timed

JOB = ("--launcher", "none", "--", "python3", "-c", "pass")


def measure(made: Bench, rounds: int) -> dict:
    """Medians of both sides, the floor, and the remote commands that the plan has for a node."""

    def ours() -> float:
        seconds = timed(made.orch("deploy", "--detach", *JOB), made.orch_env(), made.ours)
        made.settle()
        return seconds

    def script(run_only: bool) -> float:
        env = {**made.shell_env(), "RUN_ONLY": str(int(run_only))}
        seconds = timed(made.shell("deploy.sh"), env, made.folder)
        made.settle()
        return seconds

    sides = {"orch": ours, "script": lambda: script(False), "floor": lambda: script(True)}
    script(False)  # its image has to be on the nodes before `floor` can run
    times = alternate(sides, rounds)
    plan = json.loads(run(made.orch("deploy", "--dry-run", "--json", *JOB), made.orch_env(), made.ours))
    return {
        **compare(times["orch"], times["script"]),
        "floor_s": round(statistics.median(times["floor"]), 3),
        "remote_commands": max(len(node["steps"]) for node in plan["nodes"]),
    }


def main() -> int:
    given = arguments(__doc__, 7).parse_args()
    with bench(given.sim, given.project) as made:
        result = measure(made, given.rounds)
    if given.json:
        print(json.dumps(result))
    else:
        print(f"orch {result['orch_s']:.2f} s, script {result['script_s']:.2f} s: {result['ratio']:.2f}x, ", end="")
        print(f"{result['over_s']:+.2f} s (bare docker run -d: {result['floor_s']:.2f} s); ", end="")
        print(f"{result['remote_commands']} remote commands a node")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
