"""Inventories: YAML, hostfiles, and choosing nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cli.nodes import _fold
from orchestrator.errors import ConfigError, UsageError
from orchestrator.inventory import expand, load, names_in, parse

PATH = Path("/etc/orch/inv.yaml")

TEXT = """
defaults: {user: ubuntu, key: keys/id, gpus: 8, labels: {zone: z}}
nodes:
  gpu1: {address: 203.0.113.11, private: 10.0.0.11, jump: bastion, labels: {rack: a}}
  gpu2: {address: 203.0.113.12, user: root, port: 2222, gpus: 4, labels: {rack: a}}
  gpu10: {address: "2001:db8::1", known_hosts: /kh, labels: {rack: b, n: 1}}
  login:
groups: {pair: [gpu2, gpu1]}
"""


@pytest.fixture
def inventory():
    return parse(TEXT, PATH)


def names(nodes) -> list[str]:
    return [node.name for node in nodes]


def test_nodes_take_defaults_and_files_are_beside_the_inventory(inventory):
    one, two, ten, login = inventory.nodes
    assert (one.user, one.port, one.private, one.jump, one.gpus) == ("ubuntu", 22, "10.0.0.11", "bastion", 8)
    assert one.key == "/etc/orch/keys/id" and one.labels == {"zone": "z", "rack": "a"}
    assert (two.user, two.port, two.gpus, two.private) == ("root", 2222, 4, "203.0.113.12")
    assert ten.known_hosts == "/kh" and ten.labels["n"] == "1"
    assert login.address == "login"


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    node = parse("nodes: {a: {key: ~/.ssh/id, known_hosts: kh}}", PATH).nodes[0]
    assert (node.key, node.known_hosts) == ("/home/me/.ssh/id", "/etc/orch/kh")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, ["gpu1", "gpu2", "gpu10", "login"]),
        ("2", ["gpu1", "gpu2"]),
        (2, ["gpu1", "gpu2"]),
        ("gpu2,gpu1,gpu2", ["gpu2", "gpu1"]),
        ("pair", ["gpu2", "gpu1"]),
        ("rack=a", ["gpu1", "gpu2"]),
        ("rack=b, login", ["gpu10", "login"]),
        ("gpu?", ["gpu1", "gpu2"]),
        ("gpu*", ["gpu1", "gpu2", "gpu10"]),
        ("gpu[1-2,10]", ["gpu1", "gpu2", "gpu10"]),
        ("[a-z]*1", ["gpu1"]),
    ],
)
def test_selection(inventory, spec, expected):
    assert names(inventory.select(spec)) == expected


def test_selection_with_a_count(inventory):
    assert names(inventory.select("pair", 1)) == ["gpu2"]
    assert names(inventory.select(count=3)) == ["gpu1", "gpu2", "gpu10"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("8", "--nodes 8: /etc/orch/inv.yaml has 4 nodes"),
        ("0", "at least one node"),
        ("-1", "at least one node"),
        ("gup1", "unknown node or group 'gup1'; did you mean 'gpu1'?"),
        ("rack=c", "unknown label 'rack=c'"),
        ("x*", "no node matches 'x*'"),
        ("gpu[1-3]", "unknown node 'gpu3'"),
        ("gpu[3-1]", "'3-1' is not a range"),
        ("gpu[1-99999]", "a range of more than"),
        ("gpu1,,gpu2", "empty name"),
        ("", "empty name"),
    ],
)
def test_selection_mistakes(inventory, spec, message):
    with pytest.raises(UsageError) as caught:
        inventory.select(spec)
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_a_node_whose_name_is_a_number_is_a_name():
    assert names(parse("nodes: {a: {address: x}, '2': {address: y}}", PATH).select("2")) == ["2"]


def test_get(inventory):
    assert inventory.get("gpu2").port == 2222
    with pytest.raises(UsageError, match="unknown node"):
        inventory.get("gpu3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodse: {}", "nodse: unknown key 'nodse'; did you mean 'nodes'?"),
        ("nodes: {a: {adress: x}}", "nodes.a.adress: unknown key 'adress'; did you mean 'address'?"),
        ("defaults: {usr: x}\nnodes: {a: }", "defaults.usr: unknown key 'usr'; did you mean 'user'?"),
        ("defaults: {address: x}\nnodes: {a: }", "defaults.address: unknown key 'address'"),
        ("nodes: {a: {port: x}}", "nodes.a.port: expected a number, found 'x'"),
        ("nodes: {a: {port: 99999}}", "nodes.a.port: 99999 is not a port"),
        ("nodes: {a: {gpus: -1}}", "nodes.a.gpus: -1 is negative"),
        ("nodes: {a: {labels: x}}", "nodes.a.labels: expected a mapping, found 'x'"),
        ("nodes: {a: 3}", "nodes.a: expected a mapping, found 3"),
        ("nodes: {a: {address: 'h; reboot'}}", "nodes.a.address: 'h; reboot' is not a host name"),
        ("nodes: {a: {address: -oProxyCommand=x}}", "is not a host name"),
        ("nodes: {'a b': {address: x}}", "'a b' cannot name a node"),
        ("nodes: {a: {address: x}, A: {address: y}}", "'a' and 'A' are too alike"),
        ("nodes: {a: {address: x}, b: {address: x}}", "nodes a and b have the same address x"),
        ("nodes: {a: {address: x, private: p}, b: {address: y, private: p}}", "the same private address p"),
        ("nodes: {a: }\ngroups: {g: [b]}", "groups.g: unknown node 'b' (valid: a)"),
        ("nodes: {a: }\ngroups: {a: [a]}", "groups.a: a node has this name too"),
        ("nodes: {a: }\ngroups: {g: a}", "groups.g: expected a list of nodes"),
        ("nodes: {}", "nodes: there are none"),
        ("- a\n- b: 1", "expected `nodes:`"),
        ("", "expected `nodes:`"),
        ("nodes: {a: {port: 1}}\nnodes: {}", "key 'nodes' is given twice"),
        ("a slot=8\n", "a:1: unknown option 'slot'; did you mean 'slots'?"),
        ("a slots=x\n", "slots=x: expected a number"),
        ("a slots=8\na slots=8\n", "nodes a and a have the same address a"),
    ],
)
def test_mistakes(text, expected):
    with pytest.raises(ConfigError) as caught:
        parse(text, Path("a"))
    assert expected in caught.value.message
    assert caught.value.exit_code == 2 and "\n" not in caught.value.message


def test_all_mistakes_together():
    with pytest.raises(ConfigError) as caught:
        parse("x: 1\nnodes: {a: {prt: 1}, b: {gpus: x}}\ngroups: {g: [c]}", PATH)
    assert len(caught.value.lines) == 4


def test_published_ports_of_one_address_are_several_machines():
    text = "nodes: {a: {address: 127.0.0.1, port: 2201, private: p1}, b: {address: 127.0.0.1, port: 2202, private: p2}}"
    assert len(parse(text, PATH).nodes) == 2


def test_hostfile():
    text = "# cluster\nnode1 slots=8\nroot@node2 slots=4 max_slots=8\n\n10.0.0.3   # last\n"
    one, two, three = parse(text, PATH).nodes
    assert (one.name, one.address, one.gpus) == ("node1", "node1", 8)
    assert (two.name, two.user, two.gpus) == ("node2", "root", 4)
    assert (three.name, three.gpus) == ("10.0.0.3", None)


def test_nodes_may_be_a_list_of_names():
    assert names(parse("nodes: [a, b]", PATH).nodes) == ["a", "b"]


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load(tmp_path / "x.yaml")
    assert "orch sim up" in caught.value.hint


def test_the_shipped_example_is_valid():
    example = Path(__file__).parents[2] / "inventory" / "example.yaml"
    assert names_in(example) == ["gpu1", "gpu2", "pair"]


def test_expand_keeps_zeros_and_nests():
    assert expand("n[08-10]") == ["n08", "n09", "n10"]
    assert expand("r[1-2]n[1,3]") == ["r1n1", "r1n3", "r2n1", "r2n3"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["n", "gpu", "x-"]), st.integers(0, 120)), min_size=1, unique=True))
def test_what_is_folded_for_people_can_be_given_back(pairs):
    nodes = [f"{head}{number}" for head, number in pairs]
    inventory = parse("nodes: [" + ", ".join(nodes) + "]", PATH)
    assert set(names(inventory.select(_fold(nodes)))) == set(nodes)
