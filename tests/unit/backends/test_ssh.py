"""The ssh backend on fake nodes: all or none, and each refusal in its own words."""

from __future__ import annotations

import os
import signal
import time

import pytest

from orchestrator.backends.base import Found
from orchestrator.backends.found import planned
from orchestrator.backends.ssh import SshBackend, _create_error
from orchestrator.connect.base import Completed
from orchestrator.errors import (
    ConnectError,
    Interrupted,
    LeaseError,
    NodesFailed,
    OrchError,
    PreflightError,
    RegistryError,
    RemoteError,
)
from orchestrator.specs import ImageRef, Node, RunState, Secret, Storage
from orchestrator.workflows.signals import Signals

RUN = "demo-20260131-120000-ab12"
NOTHING = {"n1": [], "n2": [], "n3": []}


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def refuse(cluster, kind: type[OrchError], **changes) -> OrchError:
    with pytest.raises(kind) as caught:
        cluster.backend.submit(cluster.plan(**changes), cluster.tell)
    return caught.value


# -- submit ----------------------------------------------------------------------------------


def test_a_start_takes_three_remote_commands_a_node(cluster) -> None:
    plan = cluster.plan()
    cluster.backend.submit(plan, cluster.tell)
    assert cluster.containers() == {name: [(RUN, "running")] for name in cluster.hosts}
    for each in plan.nodes:
        host = cluster[each.node.name]
        # what a dry run shows is what was run
        assert host.commands == [step.command for step in each.steps]
        assert (host.home / f".orch/runs/{RUN}/secrets.env").stat().st_mode & 0o777 == 0o600
        assert "s3cr3t" not in str(host.containers) + str(host.commands)
    assert {text for _, text in cluster.told} == {"checking", "preparing the image and container", "starting"}


def engine_down(cluster) -> None:
    cluster["n2"].engine(up=False)


def disk_full(cluster) -> None:
    cluster["n2"].fail("create", "Error response from daemon: no space left on device")


def bad_mount(cluster) -> None:
    cluster["n2"].fail("create", "Error response from daemon: invalid mount config", code=1)


def no_start(cluster) -> None:
    cluster["n2"].fail("start", "Error response from daemon: could not select device driver")


def node_down(cluster) -> None:
    cluster["n2"].down()


def no_home(cluster) -> None:
    (cluster["n2"].home / ".orch").write_text("")


@pytest.mark.parametrize(
    ("fault", "kind", "code", "message"),
    [
        (engine_down, PreflightError, 4, "n2: the Docker engine does not answer: Cannot connect to the Docker"),
        (no_home, PreflightError, 4, "n2: cannot write to "),
        (node_down, ConnectError, 3, "n2: cannot reach 127.0.0.1:22: no route to host"),
        (disk_full, PreflightError, 4, "n2: the disk is full: no space left on device"),
        (bad_mount, RemoteError, 1, "n2: pull and create failed: invalid mount config"),
        (no_start, RemoteError, 1, "n2: the container did not start: could not select device driver"),
    ],
)
def test_a_failure_on_one_of_three_nodes_leaves_nothing_anywhere(cluster, fault, kind, code, message) -> None:
    fault(cluster)
    error = refuse(cluster, kind)
    assert (error.exit_code, str(error).startswith(message)) == (code, True), str(error)
    assert cluster.containers() == NOTHING
    assert cluster.files() == []
    rolled = {node for node, text in cluster.told if text == "rolled back"}
    assert rolled >= {"n1", "n3"}


def test_foreign_containers_are_not_touched(make_cluster) -> None:
    cluster = make_cluster(2)
    image = "registry.example.com/demo:v1"
    for name in cluster.hosts:
        cluster[name].run(f"docker create --name theirs --label orch.run=theirs-1 {image} && docker start theirs")
    cluster["n2"].fail("start", "boom")
    refuse(cluster, RemoteError)
    assert cluster.containers() == {name: [("theirs-1", "running")] for name in cluster.hosts}


def test_a_node_that_another_run_holds(make_cluster) -> None:
    cluster = make_cluster(2)
    cluster["n2"].run(
        "docker create --name orch --label orch.run=other-1 --label orch.operator=ann@lab "
        "registry.example.com/demo:v1 && docker start orch"
    )
    error = refuse(cluster, LeaseError)
    assert str(error) == "n2: busy: other-1 (running, started by ann@lab)" and error.exit_code == 4
    assert cluster.containers() == {"n1": [], "n2": [("other-1", "running")]}
    assert cluster.files() == []


def test_two_deploys_at_once_the_engine_decides(make_cluster) -> None:
    """Both passed the preflight; the other's container came first."""
    cluster = make_cluster(2)
    plan = cluster.plan()

    def tell(node: str, text: str) -> None:
        if node == "n2" and text.startswith("preparing"):
            cluster["n2"].run("docker create --name orch --label orch.run=other-1 registry.example.com/demo:v1")
            cluster["n2"].run("docker start orch")

    with pytest.raises(LeaseError, match="n2: another run took the node"):
        cluster.backend.submit(plan, tell)
    assert cluster.containers() == {"n1": [], "n2": [("other-1", "running")]}


def test_an_ended_run_frees_its_node(make_cluster) -> None:
    cluster = make_cluster(1)
    cluster.backend.submit(cluster.plan("old-1"), cluster.tell)
    for name in cluster.hosts:
        cluster[name].finish("orch", 1)
    cluster.backend.submit(cluster.plan(), cluster.tell)
    assert cluster.containers() == {name: [(RUN, "running")] for name in cluster.hosts}


def test_several_failures_are_all_named(cluster) -> None:
    cluster["n1"].engine(up=False)
    cluster["n3"].down()
    error = refuse(cluster, NodesFailed)
    assert set(error.errors) == {"n1", "n3"} and error.exit_code in (3, 4)
    assert error.message == "the run was not started: preflight failed on 2 of 3 nodes (n1, n3)"


def test_a_rollback_that_cannot_be_done_is_said(cluster) -> None:
    cluster["n2"].fail("start", "boom")
    cluster["n3"].fail("rm", "Error response from daemon: busy", times=9)
    refuse(cluster, RemoteError)
    told = dict(cluster.told)
    assert told["n1"] == told["n2"] == "rolled back"
    assert told["n3"] == "not rolled back: n3: rolling back failed: busy"


@pytest.mark.parametrize(
    ("phase", "signum"),
    [
        ("checking", signal.SIGTERM),
        ("preparing the image and container", signal.SIGINT),
        ("starting", signal.SIGHUP),
    ],
)
def test_a_signal_in_each_phase_rolls_back(make_cluster, phase: str, signum: int) -> None:
    cluster = make_cluster(2)

    def tell(node: str, text: str) -> None:
        cluster.tell(node, text)
        if (node, text) == ("n1", phase):
            os.kill(os.getpid(), signum)

    with Signals(), pytest.raises(Interrupted) as caught:
        cluster.backend.submit(cluster.plan(), tell)
    assert caught.value.exit_code == 128 + signum
    assert ("n1", "rolled back") in cluster.told and ("n2", "rolled back") in cluster.told
    # a command that was under way may still have to run into the missing folder
    until(lambda: cluster.containers() == {"n1": [], "n2": []}, 5)


def test_a_run_folder_shared_by_mistake(make_cluster, tmp_path) -> None:
    cluster = make_cluster(2)
    storage = Storage("local", str(tmp_path / "nfs/runs"))
    error = refuse(cluster, NodesFailed, storage=storage)
    assert "shared with the other nodes" in str(error.errors["n1"]) + str(error.errors["n2"])
    assert error.hint == "set storage.kind: shared in orch.yaml" and error.exit_code == 4
    assert cluster.containers() == {"n1": [], "n2": []}
    cluster.backend.submit(cluster.plan(storage=Storage("shared", storage.runs)), cluster.tell)
    assert sorted(each.name for each in (tmp_path / f"nfs/runs/{RUN}").iterdir()) == ["n1", "n2", "nodes"]


def test_a_folder_that_is_not_shared_although_it_should(make_cluster) -> None:
    error = refuse(make_cluster(2), NodesFailed, storage=Storage("shared", "~/runs"))
    assert error.hint == "set storage.kind: local in orch.yaml"


# -- pull ------------------------------------------------------------------------------------

DIGEST = "sha256:" + "1" * 64


def test_credentials_travel_on_standard_input_only(make_cluster) -> None:
    image = ImageRef("registry.example.com/private", digest=DIGEST)
    cluster = make_cluster(1, images=())
    cluster["n1"].add_images(registry=[image.pinned])
    backend = SshBackend(cluster.connector, credentials=lambda ref: Secret('{"auths":"s3cr3t"}'))
    backend.submit(cluster.plan(image=image), cluster.tell)
    assert "DOCKER_CONFIG" in cluster["n1"].commands[1]
    assert "s3cr3t" not in str(cluster["n1"].commands)
    assert cluster["n1"].images == [image.pinned]


def test_an_image_that_is_there_needs_no_registry(make_cluster) -> None:
    cluster = make_cluster(1)
    cluster.backend = SshBackend(cluster.connector, credentials=lambda ref: pytest.fail("not needed"))
    cluster.backend.submit(cluster.plan(), cluster.tell)


def test_a_local_registry_is_served_through_the_connection(make_cluster) -> None:
    image = ImageRef("localhost:5999/demo", digest=DIGEST)
    cluster = make_cluster(1, images=())
    cluster["n1"].add_images(registry=[image.pinned])
    cluster.backend.submit(cluster.plan(image=image), cluster.tell)
    assert cluster["n1"].images == [image.pinned]


@pytest.mark.parametrize(
    ("stderr", "kind", "message"),
    [
        ("manifest for r/x:v1 not found: manifest unknown", RegistryError, "cannot be pulled: manifest for"),
        ("pull access denied for r/x", RegistryError, "cannot be pulled: pull access denied for r/x"),
        ("Get https://r/v2/: dial tcp 1.2.3.4:443: connect: connection refused", RegistryError, "does not answer"),
        ("Get https://r/v2/: EOF", RegistryError, "does not answer"),
        ("write /var/lib: no space left on device", PreflightError, "the disk is full: write /var/lib"),
        ('Conflict. The container name "/orch" is already in use by container "ab".', LeaseError, "another run took"),
        ("something else", RemoteError, "pull and create failed: something else"),
        ("", RemoteError, "pull and create failed: exit code 1"),
    ],
)
def test_why_a_pull_or_create_failed(cluster, stderr: str, kind: type[OrchError], message: str) -> None:
    done = Completed(1, "", f"warning: x\nError response from daemon: {stderr}\n" if stderr else "")
    error = _create_error(done, "r/x:v1", cluster.plan().nodes[0])
    assert type(error) is kind and message in error.message


# -- after the start -------------------------------------------------------------------------


def found_of(cluster, plan) -> Found:
    return planned(plan, 0.0)


def test_status_and_the_end_of_each_node(cluster) -> None:
    plan = cluster.plan()
    cluster.backend.submit(plan, cluster.tell)
    found, backend = found_of(cluster, plan), cluster.backend
    cluster["n2"].finish("orch", 137)
    cluster["n3"].down()
    states = backend.status(found, cluster.nodes)
    assert states["n1"].state is RunState.RUNNING
    assert states["n2"].state is RunState.FAILED and "killed" in states["n2"].detail
    assert isinstance(states["n3"], ConnectError)
    assert list(backend.remove(found, cluster.nodes)) == ["n3"]
    assert cluster.containers()["n2"] == [] and cluster.containers()["n1"] == [(RUN, "running")]
    assert list(backend.stop(found, cluster.nodes, kill=True)) == ["n3"]
    assert (cluster["n1"].home / f".orch/runs/{RUN}/stop").read_text() == "kill"
    assert list(backend.end(found, cluster.nodes, grace=1)) == ["n3"]
    assert cluster.containers()["n1"] == [(RUN, "exited")]


def test_a_dead_engine_is_not_a_dead_job_without_a_word(make_cluster) -> None:
    cluster = make_cluster(1)
    plan = cluster.plan()
    cluster.backend.submit(plan, cluster.tell)
    cluster["n1"].engine(up=False)
    status = cluster.backend.status(found_of(cluster, plan), cluster.nodes)["n1"]
    assert status.state is RunState.LOST and "engine stopped answering" in status.detail


def test_a_real_launcher_from_start_to_end(make_cluster) -> None:
    """The fake node runs the real launcher: logs, report, files, discovery by another operator."""
    cluster = make_cluster(1, execute=True)
    text = 'echo "it\'s $TOKEN $GREETING"; echo x > "$0"; exit 3'
    target = cluster["n1"].home / "made"
    plan = cluster.plan(command=("sh", "-c", text, str(target)), env={"GREETING": "a 'b' $(id)"})
    cluster.backend.submit(plan, cluster.tell)
    found, node, backend = found_of(cluster, plan), cluster.nodes[0], cluster.backend
    stream = backend.watch(found, node)
    received = b""
    while (chunk := stream.read(20)) != b"":
        assert chunk is not None
        received += chunk
    stream.close()
    result = backend.ended(received.partition(b"\n")[2], node, 0)
    assert result and (result.state, result.exit_code) == (RunState.FAILED, 1)
    assert abs(result.clock_offset_ns) < 60e9
    log = backend.open_log_so_far(found, node, 0)
    assert b"0\tit's *** a 'b' $(id)\n" in iter_all(log)
    assert target.exists()
    assert backend.read_file(found, node, "result.json").startswith(b"{")
    assert backend.read_file(found, node, "no such file") == b""
    assert not (cluster["n1"].home / f".orch/runs/{RUN}/secrets.env").exists()
    runs, errors = backend.discover(cluster.nodes, "~/.orch/runs")
    assert errors == {} and [each.run.id for each in runs] == [RUN]
    seen = runs[0]
    assert (seen.run.state, seen.run.exit_code, seen.operator) == (RunState.FAILED, 1, "me@here")
    assert abs(seen.run.started - time.time()) < 120
    assert backend.remove(seen, cluster.nodes, files=True) == {}
    assert cluster.containers() == {"n1": []}
    assert not (cluster["n1"].home / f".orch/runs/{RUN}").exists()


def iter_all(stream) -> bytes:
    text = b""
    while (chunk := stream.read(10)) != b"":
        assert chunk is not None
        text += chunk
    stream.close()
    return text


def test_attaching_quotes_every_word(cluster) -> None:
    node = Node("n1", "10.0.0.1", user="ann", port=2222, key="/k ey", jump="bastion", known_hosts="/kn")
    found = Found(planned(cluster.plan(), 0.0).run, {"n1": "~/runs/r"})
    argv = cluster.backend.attach(found, node, ["sh", "-c", "echo 'a b' $(id)"])
    assert argv[:4] == ["ssh", "-t", "-p", "2222"] and argv[-2] == "ann@10.0.0.1"
    assert "StrictHostKeyChecking=yes" in argv and argv[argv.index("-i") :][:2] == ["-i", "/k ey"]
    assert argv[-1].startswith('docker exec -it "$(cat "$HOME"/runs/r/container')
    done = cluster["n1"].run(argv[-1].replace("docker exec -it", "printf '%s|'"))
    assert done.stdout == "none|sh|-c|echo 'a b' $(id)|"
