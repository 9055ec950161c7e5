"""The scripts that read and steer a run on one node, whatever started its launcher, and their parsers.

A run is addressed by its folder; `alive` is the shell test of the backend that says whether the
launcher still runs (a container's pid, a process), so these scripts serve Docker and bare processes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from orchestrator.commands.probe import SAY, parse
from orchestrator.commands.shell import lines, path, quote
from orchestrator.specs import NodeResult, RankResult, RunState


@dataclass(frozen=True)
class Report:
    """One node's word on one run: what its container or process does, and the launcher's result if any."""

    state: str
    """`running`, `created`, `exited`, `gone` (no such container or process) or `unknown` (engine silent)."""
    exit_code: int | None
    result: NodeResult | None
    engine_error: str = ""
    start_error: str = ""
    oom: bool = False
    tail: tuple[str, ...] = ()
    """The last lines of the engine's own log: all there is of a launcher that never came up."""


def read(run_dir: str, probe: str) -> str:
    """Prints a `Report`.

    `probe` sets the shell variables `state`, `code`, `oom`, `error`, `engine`, and may print `orch.text tail`.
    """
    folder = path(run_dir)
    return lines(
        SAY,
        'say clock "$(date +%s%N)"',
        "state=gone code= oom= error= engine=",
        probe,
        'say state "$state"; say code "$code"; say oom "$oom"; say error "$error"; say engine "$engine"',
        f"if [ -f {folder}/result.json ]; then echo 'orch.text result'; cat {folder}/result.json; echo; fi",
        "say whole yes",
    )


def parse_read(output: str, sent_ns: int = 0, received_ns: int = 0) -> Report:
    """Reads what `read` printed; an answer that broke off on its way says nothing, so its state is `unknown`."""
    values, texts = parse(output)
    if values.get("whole") != "yes":
        return Report("unknown", None, None)
    result = None
    if text := texts.get("result", "").strip():
        try:
            result = NodeResult.from_json(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError):
            result = None
    clock = values.get("clock", "")
    if result and clock.isdigit() and received_ns:
        result = replace(result, clock_offset_ns=int(clock) - (sent_ns + received_ns) // 2)
    code = values.get("code", "")
    return Report(
        state=values.get("state", "unknown") or "unknown",
        exit_code=int(code) if code.lstrip("-").isdigit() else None,
        result=result,
        engine_error=values.get("engine", ""),
        start_error=values.get("error", ""),
        oom=values.get("oom", "") == "true",
        tail=tuple(texts.get("tail", "").splitlines()[-20:]),
    )


def verdict(report: Report, node: str, index: int, *, last_lines: tuple[str, ...] = ()) -> NodeResult | None:
    """The node's result: the launcher's own, or what can be concluded without it; None while it runs."""
    if report.result:
        return report.result
    if report.state in ("running", "created", "restarting", "paused"):
        return None
    if report.state == "unknown" and not report.engine_error:
        return None

    def failed(reason: str, hint: str, state: RunState = RunState.FAILED, code: int = 1) -> NodeResult:
        ranks = (RankResult(-1, -1, report.exit_code, last_lines=report.tail or last_lines),)
        return NodeResult(node, index, state, code, reason=reason, hint=hint, ranks=ranks)

    if report.engine_error:
        return failed(
            f"the Docker engine stopped answering: {report.engine_error}",
            "start it there (`sudo systemctl start docker`), then deploy again with the same --name to resume",
            RunState.LOST,
        )
    if report.state == "gone":
        return failed(
            "the container or process is gone and left no result",
            "somebody removed it, or the machine restarted; deploy again with the same --name to resume",
            RunState.LOST,
        )
    if report.oom or report.exit_code == 137:
        why = "out of memory" if report.oom else "SIGKILL, often out of memory or `docker kill`"
        return failed(f"the launcher was killed ({why})", "see `dmesg` there; give the job less memory to fill")
    if report.start_error:
        return failed(f"the container did not start: {report.start_error}", "see `docker inspect` of the container")
    if report.exit_code == 255:
        return failed(
            "the container died with its engine or machine (exit code 255)",
            "see whether the machine restarted; deploy again with the same --name to resume",
            RunState.LOST,
        )
    if report.exit_code == 127 or any("python3" in line and "not found" in line for line in report.tail):
        return failed("python3 is not in the image", "the image needs Python 3.9 or newer and torch", code=127)
    return failed(
        f"the launcher ended with exit code {report.exit_code} and left no result",
        "its last lines are above; `orch logs` has the rest",
    )


def watch(wait: str, report: str) -> str:
    """A `.` each second while `wait` (a command that blocks until the launcher ends) runs, then `report`.

    When the reader goes away the `.` cannot be written, and `wait` is ended: nothing stays behind, provided that
    `wait` ends in an `exec`, so that the process which is killed is the one that waits.
    The sleep must not hold standard output, or the reader would see the end a second late.
    """
    return lines(
        "trap '' PIPE",
        f"{{ {wait}; }} >/dev/null 2>&1 & w=$!",
        '( while printf . 2>/dev/null; do sleep 1 >/dev/null 2>&1; done; kill "$w" 2>/dev/null ) & h=$!',
        'wait "$w"; kill "$h" 2>/dev/null',
        "printf '\\n'",
        report,
    )


def tail_log(run_dir: str, offset: int, pid: str) -> str:
    """The log from byte `offset` on, to its end, and on while the process `pid` (shell text; 0 for none) lives.

    GNU tail reads the rest after the process has ended, so its end of output means: all was read.
    """
    log = f"{path(run_dir)}/log"
    start = f"+{offset + 1}"
    return lines(
        f"pid={pid}",
        f'i=0; while [ ! -e {log} ] && [ "$i" -lt 50 ] && [ "${{pid:-0}}" -gt 0 ]; do sleep 0.1; i=$((i+1)); done',
        f"[ -e {log} ] || exit 0",
        f'if [ "${{pid:-0}}" -gt 0 ]; then exec tail -c {start} -s 0.2 --pid="$pid" -f {log}; '
        f"else exec tail -c {start} {log}; fi",
    )


def request_stop(run_dir: str, *, kill: bool) -> str:
    """Asks the launcher to stop, through the file that it watches; written whole, by rename."""
    folder = path(run_dir)
    content = "kill" if kill else ""
    return f"printf %s {quote(content)} > {folder}/.stop && mv -f {folder}/.stop {folder}/stop"


def archive(run_dir: str, paths: tuple[str, ...] | list[str]) -> str:
    """A tar archive, on standard output, of those of `paths` that exist; links (`checkpoints`) are followed.

    A file that grows while it is read (the log of a live run) is no failure: tar then ends with 1.
    """
    words = " ".join(quote(each) for each in paths)
    return lines(
        f"cd -- {path(run_dir)} || exit 44",
        "set --",
        f'for f in {words}; do [ ! -e "$f" ] || set -- "$@" "$f"; done',
        '[ "$#" -gt 0 ] || exit 45',
        'tar -chf - --ignore-failed-read -- "$@"; code=$?; [ "$code" -le 1 ]',
    )


def list_checkpoints(run_dir: str) -> str:
    """The names of the run's whole checkpoints, a line each: a manifest is written last."""
    return lines(
        f"cd -- {path(run_dir)}/checkpoints 2>/dev/null || exit 0",
        'for m in step_*/manifest.json; do [ ! -f "$m" ] || echo "${m%/manifest.json}"; done',
    )
