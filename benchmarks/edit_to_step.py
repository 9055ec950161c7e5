"""Edit one line of training code → first training step on all nodes, against the least that a shell script can do.

    python benchmarks/edit_to_step.py [--rounds 5] [--sim NAME] [--json]

In every round each side gets an edit that no build has seen; the clock runs from the command to the line `step 1` of
rank 0 on its stdout. orch: one `orch deploy` (hash, build, push, checks, pull, create, start, follow). The script
(shell/edit_to_step.sh): `docker build`, `docker push`, and on all nodes at once `ssh … docker pull && docker run
torchrun`. Same job file, layers below it, ranks, nodes, registry and rendezvous.
"""

from __future__ import annotations

import json
import sys

from cluster import Bench, alternate, arguments, bench, compare, until_line

MARK = "step 1 loss"


def measure(made: Bench, rounds: int) -> dict:
    def ours() -> float:
        made.edit(made.ours)
        seconds = until_line(made.orch("deploy", "--", "train.py"), made.orch_env(), made.ours, MARK)
        made.settle()
        return seconds

    def script() -> float:
        made.edit(made.script)
        seconds = until_line(made.shell("edit_to_step.sh"), made.shell_env(), made.folder, MARK)
        made.settle()
        return seconds

    times = alternate({"orch": ours, "script": script}, rounds)
    return compare(times["orch"], times["script"])


def main() -> int:
    given = arguments(__doc__, 5).parse_args()
    with bench(given.sim, given.project) as made:
        result = measure(made, given.rounds)
    if given.json:
        print(json.dumps(result))
    else:
        print(f"orch {result['orch_s']:.2f} s, script {result['script_s']:.2f} s: ", end="")
        print(f"{result['ratio']:.2f}x, {result['over_s']:+.2f} s")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
