"""Several commands of the trainer, one after the other, in one process. argv: JSON, [[run folder, arguments], …]."""

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
