"""What trains inside the image: `python -m trainer run --config RECIPE [key=value …]`.

Never imports the host side (`orchestrator`), Docker or SSH libraries. The two sides meet in the
environment variables `ORCH_*`, the `stop` file, the event stream and the exit code.
"""
