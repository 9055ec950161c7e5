"""`python -m trainer` with the arguments of this process."""

import runpy

runpy.run_module("trainer", run_name="__main__", alter_sys=True)
