"""The compose document, the inventory and known_hosts of a simulated cluster: pure functions of its layout."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sim import assets
from orchestrator.sim.compose import Layout, document, free_subnet, inventory, known_hosts, same_nodes

LAYOUT = Layout(
    name="sim",
    project="/home/me/my $project",
    nodes=2,
    image="orch-node:abc",
    subnet="10.213.4.0/24",
    registry_port=5001,
    authorized_key="ssh-ed25519 AAAA orch-sim",
    parts="/repo/compose/cluster.yaml",
)


def test_each_node_has_its_own_address_disks_and_labels() -> None:
    services = document(LAYOUT)["services"]
    assert list(services) == ["n1", "n2", "registry"]
    node = services["n2"]
    assert node["container_name"] == "orch-sim-n2"
    assert node["hostname"] == "n2"
    assert node["networks"]["default"]["ipv4_address"] == "10.213.4.12"
    assert node["volumes"] == ["n2-docker:/var/lib/docker", "n2-home:/home"]
    assert node["labels"]["orch.sim"] == "sim"
    assert node["extends"] == {"file": "/repo/compose/cluster.yaml", "service": "node-capabilities"}
    assert node["environment"]["ORCH_CGROUP_PARENT"] == "/orch-sim-n2"


def test_only_n2_has_debians_hosts_entry() -> None:
    services = document(replace(LAYOUT, nodes=3))["services"]
    assert [name for name in services if "ORCH_DEBIAN_HOSTS" in services[name].get("environment", {})] == ["n2"]


def test_everything_the_engine_holds_bears_the_clusters_name_and_label() -> None:
    made = document(replace(LAYOUT, shared=True))
    objects = [*made["volumes"].values(), *made["networks"].values()]
    assert all(item["name"].startswith("orch-sim-") for item in objects)
    assert all(item["labels"]["orch.sim"] == "sim" for item in objects)
    assert set(made["volumes"]) == {"n1-docker", "n1-home", "n2-docker", "n2-home", "registry", "shared"}
    assert all("shared:/shared" in made["services"][node]["volumes"] for node in ("n1", "n2"))


def test_dollar_signs_are_not_variables() -> None:
    assert document(LAYOUT)["services"]["n1"]["labels"]["orch.sim.project"] == "/home/me/my $$project"


def test_privileged_nodes_have_cgroups_of_their_own() -> None:
    node = document(replace(LAYOUT, privileged=True))["services"]["n1"]
    assert node["extends"]["service"] == "node-privileged"
    assert "ORCH_CGROUP_PARENT" not in node["environment"]


def test_registry_is_published_on_loopback_only() -> None:
    assert document(LAYOUT)["services"]["registry"]["ports"] == ["127.0.0.1:5001:5000"]
    assert "ports" not in document(LAYOUT)["services"]["n1"]


def test_inventory_on_linux_has_container_addresses() -> None:
    assert inventory(LAYOUT, "../.orch/sim/id_ed25519", "../.orch/sim/known_hosts") == {
        "defaults": {
            "user": "orch",
            "key": "../.orch/sim/id_ed25519",
            "known_hosts": "../.orch/sim/known_hosts",
            "gpus": 0,
        },
        "nodes": {"n1": {"address": "10.213.4.11"}, "n2": {"address": "10.213.4.12"}},
    }


def test_published_ssh_where_addresses_cannot_be_reached() -> None:
    layout = replace(LAYOUT, ssh_ports={"n1": 40001, "n2": 40002})
    assert document(layout)["services"]["n2"]["ports"] == ["127.0.0.1:40002:22"]
    node = inventory(layout, "k", "h")["nodes"]["n2"]
    assert node == {"address": "127.0.0.1", "port": 40002, "private": "10.213.4.12"}
    pins = known_hosts(layout, {"n1": "ssh-ed25519 AAA1 n1", "n2": "ssh-ed25519 AAA2 n2"})
    assert pins == "[127.0.0.1]:40001 ssh-ed25519 AAA1\n[127.0.0.1]:40002 ssh-ed25519 AAA2\n"


def test_known_hosts_pins_addresses() -> None:
    pins = known_hosts(LAYOUT, {"n1": "ssh-ed25519 AAA1 root@n1", "n2": "ssh-ed25519 AAA2"})
    assert pins == "10.213.4.11 ssh-ed25519 AAA1\n10.213.4.12 ssh-ed25519 AAA2\n"


def test_growing_and_another_registry_port_leave_the_nodes_alone() -> None:
    assert same_nodes(LAYOUT, replace(LAYOUT, nodes=5, registry_port=6000))
    assert not same_nodes(LAYOUT, replace(LAYOUT, image="orch-node:def"))
    assert not same_nodes(LAYOUT, replace(LAYOUT, shared=True))
    published = replace(LAYOUT, ssh_ports={"n1": 1, "n2": 2})
    assert same_nodes(published, replace(published, nodes=1, ssh_ports={"n1": 1}))
    assert not same_nodes(published, replace(published, ssh_ports={"n1": 1, "n2": 3}))


def test_first_free_subnet() -> None:
    assert free_subnet([]) == "10.213.0.0/24"
    assert free_subnet(["10.213.0.0/24", "172.17.0.0/16", "fd00::/64"]) == "10.213.1.0/24"
    with pytest.raises(ValueError, match="no free"):
        free_subnet(["10.0.0.0/8"])


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(8, 32))
def test_a_free_subnet_overlaps_nothing(thirds: list[int], length: int) -> None:
    used = [f"10.213.{third}.7/{max(length, 17)}" for third in thirds]
    try:
        found = ipaddress.ip_network(free_subnet(used))
    except ValueError:
        return
    assert not any(found.overlaps(ipaddress.ip_network(text, strict=False)) for text in used)


def test_the_parts_that_are_extended_exist() -> None:
    services = yaml.safe_load(assets.asset("compose/cluster.yaml").read_text())["services"]
    assert {"node-privileged", "node-capabilities", "registry-part", "node", "registry"} == set(services)
    # A part that had a scale of its own would be started beside the nodes.
    assert all(services[part]["scale"] == 0 for part in services if part not in ("node", "registry"))
