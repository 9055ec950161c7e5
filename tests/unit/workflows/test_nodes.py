"""`orch nodes check` on fake nodes."""

from __future__ import annotations

import json

from orchestrator.errors import ConnectError
from orchestrator.specs import Node, Storage
from orchestrator.workflows.nodes import check


def test_each_node_answers_for_itself(cluster) -> None:
    cluster["n2"].down()
    cluster["n3"].engine(up=False)
    one, two, three = check(cluster.nodes, cluster.connector)
    assert (one.ok, one.exit_code, one.problems) == (True, 0, ())
    assert isinstance(two.error, ConnectError) and two.exit_code == 3 and not two.ok
    assert three.problems[0].message.startswith("the Docker engine does not answer") and three.exit_code == 4
    rows = json.loads(json.dumps([each.to_json() for each in (one, two, three)]))
    assert rows[0]["engine"] == "28.2.2" and rows[0]["run"] is None and rows[0]["disk_gb"] > 0
    assert rows[1]["engine"] is None and rows[1]["problems"][0]["message"].startswith("cannot reach")
    assert rows[2]["problems"][0]["hint"]


def test_a_node_that_is_busy_is_fit(make_cluster) -> None:
    cluster = make_cluster(1)
    cluster.backend.submit(cluster.plan(), cluster.tell)
    (report,) = check(cluster.nodes, cluster.connector)
    assert report.ok and report.to_json()["run"] == "demo-20260131-120000-ab12"
    cluster["n1"].finish("orch")
    assert check(cluster.nodes, cluster.connector)[0].to_json()["run"] is None


def test_what_is_expected_of_a_node(make_cluster, tmp_path) -> None:
    cluster = make_cluster(1)
    node = Node("n1", "127.0.0.1", gpus=8)
    (report,) = check([node], cluster.connector, mounts=["/no/such"], storage=Storage(runs=str(tmp_path / "runs")))
    assert [each.message for each in report.problems] == [
        "0 GPUs found, 8 asked for",
        "the mount source /no/such does not exist",
    ]
    assert check([node], cluster.connector, gpus=0)[0].ok
