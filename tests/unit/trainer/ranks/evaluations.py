"""Several commands of the trainer in one process each after the other. argv: JSON, a list of (run folder, arguments)."""

from __future__ import annotations

import json
import os
import sys

from trainer import __main__ as command

for folder, arguments in json.loads(sys.argv[1]):
    os.environ["ORCH_RUN_DIR"] = folder
    code = command.main(arguments)
    if code:
        sys.exit(code)
