"""The trainer where no file may grow past 40 kB: writes of weights fail as on a full disk."""

import resource
import runpy
import signal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
