"""Prints what reached it, as one line of JSON: arguments, environment, working directory."""

import json
import os
import sys

print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}), flush=True)
