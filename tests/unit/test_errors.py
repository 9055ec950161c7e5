"""The error tree: codes, and what an error says."""

from __future__ import annotations

import re

import pytest

from orchestrator import errors
from orchestrator.errors import ConnectError, Interrupted, NodesFailed, OrchError, PreflightError, nearest, unknown


def tree() -> list[type[OrchError]]:
    found, queue = [], [OrchError]
    while queue:
        kind = queue.pop()
        found.append(kind)
        queue += kind.__subclasses__()
    return found


def test_the_drawing_in_the_docstring_is_the_tree():
    drawn = dict(re.findall(r"(\w+)\s+(?:exit )(\d+)", errors.__doc__))
    assert {kind.__name__ for kind in tree()} - {"NodesFailed"} == set(drawn)
    for kind in tree():
        if kind.__name__ in drawn:
            assert kind.exit_code == int(drawn[kind.__name__]), kind


def test_message_node_and_hint():
    error = OrchError("is broken", hint="mend it", lines=["a"])
    assert str(error) == "is broken"
    assert str(error.on("n1")) == "n1: is broken"
    assert str(error.on("n2")) == "n1: is broken"
    assert error.lines == ("a",)


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143), (1, 129)])
def test_interrupted(signum, code):
    assert Interrupted("x", signum=signum).exit_code == code


def test_nodes_failed_takes_the_code_that_says_most():
    assert NodesFailed("x", {"a": OrchError("1"), "b": ConnectError("3")}).exit_code == 3
    assert NodesFailed("x", {"a": ConnectError("3"), "b": PreflightError("4")}).exit_code == 4
    assert NodesFailed("x", {}).exit_code == 1


def test_nearest_and_unknown():
    assert nearest("recip", ["recipe", "run"]) == "recipe"
    assert nearest("zzz", ["recipe"]) is None
    assert (
        unknown("key", "recip", ["run", "recipe"]) == "unknown key 'recip'; did you mean 'recipe'? (valid: recipe, run)"
    )
    assert unknown("node", "x", []) == "unknown node 'x' (valid: none)"
