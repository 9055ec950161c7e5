"""What runs on the nodes, inside the container. Read as a file by the host side, imported by nobody there."""
