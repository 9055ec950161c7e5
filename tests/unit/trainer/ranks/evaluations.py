"""Several commands of the trainer, one after the other, in one process. argv: JSON, [[run folder, arguments], …]."""

from __future__ import annotations

import json
import os
import sys

from trainer import __main__ as command

ports = os.environ.get("TEST_PORTS", "").split()
for index, (folder, arguments) in enumerate(json.loads(sys.argv[1])):
    os.environ["ORCH_RUN_DIR"] = folder
    if ports:  # one for each run: a rank that is ahead would find the store of the run before, about to close
        os.environ["MASTER_PORT"] = ports[index]
    code = command.main(arguments)
    if code:
        sys.exit(code)
