"""I/O to machines: SSH, this machine, many at once, and a fake one for tests."""
