"""Which rank this process is, and how the ranks talk."""
