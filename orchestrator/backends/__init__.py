"""How a planned run is placed, started, read and stopped; one file per kind of cluster."""
