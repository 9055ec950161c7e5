from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.connect.endpoint import jump_node, resolve, with_includes
from orchestrator.connect.known_hosts import SYSTEM_FILE
from orchestrator.errors import ConfigError
from orchestrator.specs import Node


def lookup(**options: object):
    return lambda name: {"hostname": name, **options}


def test_the_inventory_wins_over_ssh_config(tmp_path: Path) -> None:
    node = Node("n1", "gpu1", user="ubuntu", port=2200, key="~/k", jump="none", known_hosts="~/kh")
    options = lookup(user="root", port="2222", identityfile=["/x"], proxyjump="bastion", userknownhostsfile="/y")
    found = resolve(node, options, tmp_path)
    assert (found.user, found.port, found.keys, found.jump) == ("ubuntu", 2200, (tmp_path / "k",), ())
    assert found.known_hosts == (tmp_path / "kh",)
    assert found.only_keys


def test_ssh_config_fills_what_the_inventory_leaves_open(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    options = lookup(hostname="10.0.0.9", user="bob", port="2222", identityfile=[str(key)], proxyjump="a,b")
    found = resolve(Node("n1", "gpu1"), options, tmp_path)
    assert (found.host, found.user, found.port, found.jump) == ("10.0.0.9", "bob", 2222, ("a", "b"))
    assert (found.keys, found.only_keys, found.alias) == ((key,), False, "[10.0.0.9]:2222")
    assert found.known_hosts == (tmp_path / ".ssh" / "known_hosts", SYSTEM_FILE)


def test_an_alias_is_looked_up_without_the_port(tmp_path: Path) -> None:
    found = resolve(Node("n1", "gpu1"), lookup(hostkeyalias="Cluster", port="2222"), tmp_path)
    assert found.alias == "cluster"


def test_a_proxy_command_gives_way_to_a_jump_host(tmp_path: Path) -> None:
    options = lookup(proxycommand="nc gpu1 22")
    assert resolve(Node("n1", "gpu1"), options, tmp_path).proxy_command == "nc gpu1 22"
    assert resolve(Node("n1", "gpu1", jump="bastion"), options, tmp_path).proxy_command == ""
    assert resolve(Node("n1", "gpu1"), lookup(proxycommand="none"), tmp_path).proxy_command == ""


def test_the_usual_keys_are_offered_if_they_are_there(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_rsa").touch()
    assert resolve(Node("n1", "gpu1"), lookup(), tmp_path).keys == (tmp_path / ".ssh" / "id_rsa",)


def test_a_port_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n1: ~/\.ssh/config gives port 'ssh'"):
        resolve(Node("n1", "gpu1"), lookup(port="ssh"), tmp_path)


@pytest.mark.parametrize(
    ("text", "address", "user", "port"),
    [
        ("bastion", "bastion", None, 22),
        ("bob@bastion", "bastion", "bob", 22),
        ("bob@bastion:2222", "bastion", "bob", 2222),
        ("bastion:2222", "bastion", None, 2222),
        ("bob@[fd00::1]:22", "fd00::1", "bob", 22),
        ("ssh://bob@bastion:2222", "bastion", "bob", 2222),
    ],
)
def test_a_jump_host_outside_the_inventory(text: str, address: str, user: str | None, port: int) -> None:
    found = jump_node(text, {}, Node("n1", "gpu1", key="k", known_hosts="kh"))
    assert (found.address, found.user, found.port) == (address, user, port)
    assert (found.key, found.known_hosts) == ("k", "kh")


def test_a_jump_host_of_the_inventory_is_that_node() -> None:
    bastion = Node("bastion", "10.0.0.1")
    assert jump_node("bastion", {"bastion": bastion}, Node("n1", "x")) is bastion
    with pytest.raises(ConfigError, match="cannot read the jump host"):
        jump_node("a@b@c:x", {}, Node("n1", "x"))


def test_includes_are_followed_once_each_and_never_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"Host one\nInclude {tmp_path}/b*\nInclude {tmp_path}/none\n")
    (tmp_path / "b1").write_text("  User bob\n")
    (tmp_path / "b2").write_text(f"  Port 2\nInclude {tmp_path}/b2\n")
    text = with_includes(tmp_path / "a")
    assert text.count("User bob") == 1
    assert "Host one" in text
    assert with_includes(tmp_path / "missing") == ""
