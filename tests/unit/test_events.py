"""The reader of the trainer's event stream."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import events
from orchestrator.specs import RankError


def line(kind: str, **fields) -> str:
    head = {"schema": 1, "kind": kind, "time": 1.5, "attempt": 1, "rank": 0, "step": 0}
    return json.dumps({**head, **fields}) + "\n"


def test_every_kind_has_its_class():
    text = (
        line("start", world=4, host="n1", versions={"torch": "2"}, config_hash="ab")
        + line("step", step=3, loss=2, lr=0.1, grad_norm=None, tokens=128, tokens_per_s=10.5, mfu=None, later="x")
        + line("eval", loss=1.0, perplexity=2.7, tokens=5)
        + line("checkpoint", path="/c/step_3", bytes=10, seconds=0.5, blocked_s=0.1)
        + line("heartbeat")
        + line("error", rank=3, type="ValueError", message="bad", traceback="Traceback")
        + line("end", status="failed")
    )
    start, step, evaluation, checkpoint, beat, error, end = events.read(text)
    assert (start.world, start.host, start.versions) == (4, "n1", {"torch": "2"})
    assert (step.step, step.loss, step.grad_norm, step.extra) == (3, 2.0, None, {"later": "x"})
    assert (evaluation.perplexity, evaluation.tokens, evaluation.seconds) == (2.7, 5, None)
    assert checkpoint.path == "/c/step_3" and isinstance(beat, events.Heartbeat)
    assert error.to_rank_error() == RankError(3, "ValueError", "bad", "Traceback", 1_500_000_000)
    assert end.status == "failed"


def test_torn_unknown_and_foreign_lines_are_passed_over():
    text = line("step", step=1) + "\n{}\n[1]\nnot json\n" + line("future") + '{"kind": "step", "ti'
    assert [event.step for event in events.read(text)] == [1]
    assert events.read(text.encode() + b"\xff\xfe") == events.read(text)
    assert events.read(line("step", step=1)[:-1])[0].step == 1  # whole, only its line end is not there yet


def test_values_of_the_wrong_type_are_missing_values():
    (event,) = events.read(line("step", step="x", loss="high", tokens=1.5, lr=True))
    assert (event.step, event.loss, event.tokens, event.lr) == (0, None, None, None)
    assert events.read(line("step", time=None)) == []


def test_last_step_is_of_the_latest_attempt():
    read = events.read(
        line("step", step=9) + line("step", step=2, attempt=2) + line("step", step=1, attempt=2) + line("heartbeat")
    )
    step = events.last_step(read)
    assert (step.attempt, step.step) == (2, 2)
    assert events.last_step([]) is None


def test_last_checkpoint():
    read = events.read(line("checkpoint", path="a", time=1) + line("checkpoint", path="b", time=2))
    assert events.last_checkpoint(read).path == "b"


def test_first_error_over_ranks():
    ranks = {
        0: events.read(line("error", rank=0, time=5, type="Timeout")),
        1: events.read(line("error", rank=1, time=3, type="ValueError")),
        2: events.read(line("heartbeat", rank=2, time=1)),
    }
    assert events.first_error(ranks).rank == 1
    assert events.first_error([event for each in ranks.values() for event in each]).rank == 1
    resumed = events.read(line("error", attempt=1) + line("step", attempt=2))
    assert events.first_error(resumed) is None


KEYS = st.sampled_from(["kind", "time", "step", "loss", "versions", "extra", "x"])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*events.KINDS, ""]) | st.just([{}])


@settings(deadline=None, max_examples=60)
@given(
    st.text() | st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=2), max_size=4).map(json.dumps)
)
def test_nothing_in_the_file_can_break_the_reader(text):
    events.read(text)
    events.read(text.encode("utf-8", "surrogatepass"))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 400))
def test_a_cut_anywhere_loses_only_the_torn_line(cut):
    text = "".join(line("step", step=number) for number in range(1, 5))
    read = events.read(text[:cut])
    assert [event.step for event in read] == list(range(1, len(read) + 1))
    assert len(read) >= text[:cut].count("\n")
