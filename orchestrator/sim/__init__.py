"""The simulated cluster: real sshd, a real Docker engine and a real network per node, on one machine."""
