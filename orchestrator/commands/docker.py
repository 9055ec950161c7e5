"""The Docker commands that a node runs for us: pull, create, start, read, stop, remove."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from orchestrator.commands.probe import STALE_CREATED_S
from orchestrator.commands.shell import Raw, join, lines, path, quote, script
from orchestrator.specs import CONTAINER, LABEL_DIR, LABEL_RUN

NAMED = f"docker ps -a --no-trunc --filter name={quote(f'^/?{CONTAINER}$')}"


def mount(source: str, target: str, *, readonly: bool = False) -> Raw:
    """The value of `--mount`: a CSV record, whose fields are quoted where they hold `,` or `"`.

    `source` may begin with `~/`: the home folder on the node.
    """

    def needs(text: str) -> bool:
        return any(char in text for char in ',"\n')

    if needs(source):
        inner = source.replace('"', '""')
        text = quote('type=bind,"source=') + path(inner) + quote('"') + ","
    else:
        text = "type=bind,source=" + path(source) + ","
    field = f"target={target}"
    text += quote('"' + field.replace('"', '""') + '"' if needs(field) else field)
    return Raw(text + (",readonly" if readonly else ""))


def create_argv(
    image: str,
    entry: Sequence[str],
    *,
    run_dir: str,
    mounts: Sequence[Raw],
    labels: Mapping[str, str],
    shm: str,
    gpus: int,
    stop_timeout: int,
) -> str:
    """`docker create` of the launcher's container, as the SSH user, on the node's own network.

    RDMA devices are passed only where they are: NCCL would otherwise fall back to TCP without a word.
    """
    argv: list[str] = ["docker", "create", "--name", CONTAINER, "--init", "--entrypoint", "python3"]
    argv += ["--network", "host", "--shm-size", shm, "--user", Raw('"$(id -u):$(id -g)"')]
    argv += ["--restart", "no", "--stop-timeout", str(stop_timeout)]
    argv += ["--log-opt", "max-size=8m", "--log-opt", "max-file=2", "--cidfile", Raw(f"{path(run_dir)}/container")]
    for key, value in labels.items():
        argv += ["--label", f"{key}={value}"]
    for value in mounts:
        argv += ["--mount", value]
    if gpus:
        argv += ["--gpus", str(gpus), Raw('"$@"')]
    create = join([*argv, image, *entry])
    if not gpus:
        return create
    rdma = "set --; [ ! -e /dev/infiniband ] || set -- --device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1"
    return lines(rdma, create).rstrip("\n")


def pull(image: str, *, credentials: bool) -> str:
    """Pulls `image` unless the engine has it. Credentials come as a config.json on standard input."""
    ref = quote(image)
    if not credentials:
        return f"docker image inspect {ref} >/dev/null 2>&1 || docker pull --quiet {ref} >/dev/null"
    return lines(
        'config=$(mktemp -d); trap \'rm -rf "$config"\' EXIT; umask 077; cat > "$config"/config.json',
        f'docker image inspect {ref} >/dev/null 2>&1 || DOCKER_CONFIG="$config" docker pull --quiet {ref} >/dev/null',
    ).rstrip("\n")


_STATE = '"{{.State.Status}}|{{.State.ExitCode}}|{{.State.OOMKilled}}|{{.State.Error}}"'


def keep_end(ident: str, run_dir: str) -> str:
    """Before an ended container goes: how it ended into `ended` in its run folder, if its launcher left no result.

    Both arguments are shell text. `probe` reads the file, so the cause of a failure can be told again later.
    """
    told = f"docker inspect --format {_STATE} {ident}; docker logs --tail 20 {ident} 2>&1"
    return (
        f"if [ -d {run_dir} ] && [ ! -e {run_dir}/result.json ] && [ ! -e {run_dir}/ended ]; then "
        f"{{ {told}; }} > {run_dir}/ended 2>/dev/null || :; fi"
    )


def clear_ended() -> str:
    """Removes what an ended run left under the constant name; a live or a foreign container is never touched.

    A container that was created but never started belongs to a deploy in progress, unless it is old.
    """
    return lines(
        f"old=$({NAMED} --filter label={LABEL_RUN} --filter status=exited --filter status=dead "
        f"--filter status=created --format '{{{{.State}}}} {{{{.ID}}}} {{{{.Label \"{LABEL_DIR}\"}}}}')",
        'dir=${old#* }; id=${dir%% *}; dir=${dir#* }; case "$dir" in "~/"*) dir="$HOME/${dir#??}";; esac',
        'case "$old" in',
        '  "") ;;',
        '  "created "*)',
        '    age=$(( $(date +%s) - $(date -d "$(docker inspect --format "{{.Created}}" "$id")" +%s) ))',
        f'    [ "$age" -lt {STALE_CREATED_S} ] || docker rm "$id" >/dev/null;;',
        "  *) " + keep_end('"$id"', '"$dir"'),
        '    docker rm "$id" >/dev/null;;',
        "esac",
    ).rstrip("\n")


def check_storage(root: str, nodes: int, kind: str) -> str:
    """Whether the run's root folder is shared as configured: every node has left a mark in `nodes/`."""
    want = nodes if kind == "shared" else 1
    if nodes == 1:
        return ""
    return lines(
        f"set -- {path(root)}/nodes/*",
        f'if [ "$#" -ne {want} ]; then echo "orch.marks $#"; exit 41; fi',
    ).rstrip("\n")


CONTEST_TRIES = 20
"""How often, half a second apart, a node is asked for again that another start in progress has taken."""


def _patiently(create: str) -> str:
    fail = 'printf "%s\\n" "$id" >&2; exit 1'
    return lines(
        "n=0",
        f"until id=$({{ {create}; }} 2>&1); do",
        f'  case "$n:$id" in {CONTEST_TRIES}:*) {fail};; *"is already in use by container"*) ;; *) {fail};; esac',
        f"""  case "$({NAMED} --format '{{{{.State}}}}')" in created|"") ;; *) {fail};; esac""",
        "  n=$((n+1)); sleep 0.5",
        "done",
        "id=$(printf '%s\\n' \"$id\" | tail -n 1)",
    ).rstrip("\n")


def pull_and_create(
    image: str, create: str, *, run_dir: str, storage_check: str, credentials: bool, patient: bool = False
) -> str:
    """The second of a deploy's three remote commands.

    Two deploys may each take a node that the other needs. The one that is refused on its first node gives up; on the
    others `patient` is set: it asks again as long as the other's container is only created, so that one of them wins.

    A rollback may come while the engine is at work on `create`, and find no container yet: then the run's
    folder is gone afterwards, and the container goes too. (One that comes later finds the container.)
    """
    return script(
        "export LC_ALL=C",
        storage_check,
        pull(image, credentials=credentials),
        clear_ended(),
        _patiently(create) if patient else f"id=$({create})",
        f'[ -e {path(run_dir)}/container ] || {{ docker rm "$id" >/dev/null; echo "it was rolled back" >&2; exit 1; }}',
    )


def start(run_dir: str) -> str:
    return script(f'docker start "$(cat {path(run_dir)}/container)" >/dev/null')


_PASSED_ON = re.compile(
    r"Error response from daemon: |(failed to create (task|shim task|shim)[^:]*|OCI runtime create failed"
    r"|(container_linux|process_linux|rootfs_linux)\.go:\d+|runc create failed|starting container process caused"
    r"|unable to start container process|error during container init): "
)
"""What the engine's parts put before a reason when they hand it on."""


def refusal(stderr: str) -> str:
    """Why the engine did not start a container, in its own last word; empty if it is not the engine that spoke.

    >>> refusal("Error response from daemon: OCI runtime create failed: no such device\\nError: failed to start\\n")
    'no such device'
    """
    said = [line for line in stderr.splitlines() if line.startswith("Error response from daemon: ")]
    return _PASSED_ON.sub("", said[-1]) if said else ""


def rollback(run_id: str, root: str, checkpoints: str = "") -> str:
    """Removes this run's container and folder on a node, whatever stage it had reached; nothing else.

    The series' folder `checkpoints` goes too, if this run has made it, it is empty, and no other run leads to it.
    """
    runs = path(root.rpartition("/")[0])
    return lines(
        f"ids=$(docker ps -aq --no-trunc --filter {quote(f'label={LABEL_RUN}={run_id}')}) || ids=",
        'code=0; [ -z "$ids" ] || docker rm -f $ids >/dev/null || code=$?',
        f"fresh=; [ ! -e {path(root)}/nodes/.fresh ] || fresh=yes",
        f"rm -rf -- {path(root)} || code=$?",
        f"for l in {runs}/*/checkpoints {runs}/*/*/checkpoints; do "
        f'[ ! "$l" -ef {path(checkpoints)} ] || fresh=; done; '
        f'[ -z "$fresh" ] || rmdir -- {path(checkpoints)} 2>/dev/null'
        if checkpoints
        else "",
        '[ "$code" = 0 ]',
    )


def remove_ended(run_id: str, run_dir: str) -> str:
    """Removes this run's ended container; a running one stays, unless its launcher has already written its result."""
    label = quote(f"label={LABEL_RUN}={run_id}")
    return lines(
        f"ids=$(docker ps -aq --no-trunc --filter {label}) || exit 1",
        f'if [ -n "$ids" ] && [ -f {path(run_dir)}/result.json ]; then timeout 10 docker wait $ids >/dev/null || :; fi',
        f"ids=$(docker ps -aq --no-trunc --filter {label} --filter status=exited --filter status=dead)",
        "for id in $ids; do " + keep_end('"$id"', path(run_dir)) + "; done",
        f"set -- $ids $(docker ps -aq --no-trunc --filter {label} --filter status=created)",
        '[ "$#" = 0 ] || docker rm "$@" >/dev/null',
    )


def container_id(run_dir: str) -> Raw:
    return Raw(f'"$(cat {path(run_dir)}/container 2>/dev/null || echo none)"')


def probe(run_dir: str) -> str:
    """Sets `state code oom error engine` for `report.read`; prints the engine's log if there is no result.

    Of a container that is gone there may be its `ended` file (see `keep_end`).
    """
    ended = f"{path(run_dir)}/ended"
    told = 'echo "orch.text tail"; {} | sed "s/^orch[.]/ &/"; echo; echo orch.end'
    return lines(
        f"id={container_id(run_dir)}; out=",
        f'if out=$(docker inspect --format {_STATE} "$id" 2>/dev/null); then',
        f'  case "$out" in running*) ;; *) [ -f {path(run_dir)}/result.json ] || '
        "{ " + told.format('docker logs --tail 20 "$id" 2>&1') + "; };; esac",
        f"elif [ -s {ended} ]; then",
        f"  out=$(head -n 1 {ended}); " + told.format(f"tail -n +2 {ended}"),
        "elif ! docker version >/dev/null 2>&1; then",
        "  state=unknown; engine=$(docker version 2>&1 >/dev/null | tail -n 1); engine=${engine:-no answer}; out=",
        "else",
        "  out=",
        "fi",
        'if [ -n "$out" ]; then',
        "  state=${out%%|*}; out=${out#*|}; code=${out%%|*}; out=${out#*|}; oom=${out%%|*}; error=${out#*|}",
        "fi",
    )


def wait(run_dir: str) -> str:
    return f"exec docker wait {container_id(run_dir)}"


def pid(run_dir: str) -> str:
    """Shell text: the launcher's process on the node, 0 when it does not run."""
    return f"$(docker inspect --format '{{{{.State.Pid}}}}' {container_id(run_dir)} 2>/dev/null || echo 0)"


def kill(run_dir: str, grace: int) -> str:
    """Stops the container from outside, for a launcher that no longer listens.

    One that was created and never started cannot be stopped; it is removed.
    """
    return lines(
        f"id={container_id(run_dir)}",
        f'docker stop -t {grace} "$id" >/dev/null 2>&1 || :',
        """if [ "$(docker inspect --format '{{.State.Status}}' "$id" 2>/dev/null)" = created ]; then """
        'docker rm "$id" >/dev/null 2>&1; fi',
        ":",
    )


def discover(runs: str) -> str:
    """Every run that this node knows: its labelled containers, and the folders under `runs`."""
    ids = f"docker ps -aq --no-trunc --filter {quote(f'label={LABEL_RUN}')}"
    return lines(
        "export LC_ALL=C",
        f"ids=$({ids}) || exit 1",
        '[ -z "$ids" ] || docker inspect --format '
        '\'orch_container {"state":{{json .State}},"labels":{{json .Config.Labels}}}\' $ids',
        folders(runs),
    )


def folders(runs: str, *, alive: str = "echo 0") -> str:
    """The run folders under `runs`, a line each: path, time, whether `alive` (a command) prints a pid, job, result."""
    root = path(runs)
    return lines(
        f'for d in {root}/*/ {root}/*/*/; do [ -f "$d"job.json ] || continue',
        "  d=${d%/}",
        '  printf \'orch_folder %s\\t%s\\t%s\\t\' "$d" "$(stat -c %Y "$d"/job.json)" "$(' + alive + ')"',
        "  tr -d '\\n\\t' < \"$d\"/job.json; printf '\\t'",
        "  [ ! -f \"$d\"/result.json ] || tr -d '\\n\\t' < \"$d\"/result.json; printf '\\n'",
        "done",
    )


def parse_discover(output: str) -> tuple[list[dict], list[dict]]:
    """(containers, folders): the first as `{state, labels}`, the second as `{dir, time, alive, job, result}`."""
    containers, folders = [], []
    for line in output.split("\n"):  # and not at the other line ends of Unicode, which JSON may hold
        kind, _, rest = line.partition(" ")
        try:
            if kind == "orch_container":
                containers.append(json.loads(rest))
            elif kind == "orch_folder":
                folder, stamp, alive, job, result = [*rest.split("\t"), ""][:5]
                folders.append(
                    {
                        "dir": folder,
                        "alive": alive != "0",
                        "time": float(stamp),
                        "job": json.loads(job),
                        "result": json.loads(result) if result else None,
                    }
                )
        except ValueError:
            continue
    return containers, folders
