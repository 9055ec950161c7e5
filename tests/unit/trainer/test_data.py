from __future__ import annotations

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from trainer.config import DataConfig
from trainer.data import text, tokenizer
from trainer.data.loader import BatchStream
from trainer.data.packing import IGNORE, PackedDataset, collate, encode
from trainer.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from trainer.errors import DataError, DeadlineError

DOCUMENTS = [
    np.array([BOS_ID, *range(100 * i + 10, 100 * i + 10 + n), EOS_ID], np.int32)
    for i, n in enumerate([5, 1, 9, 30, 2])
]



def _stream(world: int, rank: int, shuffle: bool = True, batch: int = 4) -> BatchStream:
    dataset = PackedDataset(DOCUMENTS, 7, seed=3, shuffle=shuffle)
    return BatchStream(dataset, global_batch=batch, micro_batch=1, rank=rank, world_size=world)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_token_is_a_target_exactly_once(shuffle, epoch):
    dataset = PackedDataset(DOCUMENTS, 7, seed=3, shuffle=shuffle)
    batch = collate([dataset.row(epoch, index) for index in range(len(dataset))], False)
    targets = batch["labels"][batch["labels"] != IGNORE]
    wanted = [token for document in DOCUMENTS for token in document[1:].tolist()]
    assert Counter(targets.tolist()) == Counter(wanted)
    # each target is predicted from the token before it in its own document
    pairs = {(int(a), int(b)) for d in DOCUMENTS for a, b in itertools.pairwise(d)}
    seen = zip(batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist(), strict=True)
    assert all((a, b) in pairs for a, b in seen if b != IGNORE)


def test_positions_start_again_with_each_document():
    row = np.array([5, 6, BOS_ID, 7, EOS_ID, BOS_ID, 8, PAD_ID, PAD_ID])
    batch = collate([row], False)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[6, IGNORE, 7, EOS_ID, IGNORE, 8, IGNORE, IGNORE]]
    assert collate([row], True)["position_ids"].tolist() == [list(range(8))]


def test_epochs_differ_and_repeat():
    a, b = (PackedDataset(DOCUMENTS, 7, seed=3, shuffle=True) for _ in range(2))
    first = np.stack([a.row(0, i) for i in range(len(a))])
    second = np.stack([a.row(1, i) for i in range(len(a))])
    assert not np.array_equal(first, second)
    assert np.array_equal(np.stack([b.row(1, i) for i in range(len(b))]), second)
    assert np.array_equal(a.row(0, 2), first[2])


def _steps(world: int, count: int, state: dict | None = None) -> list[list[list[int]]]:
    """The rows of each global batch, as all ranks together see them."""
    streams = [_stream(world, rank) for rank in range(world)]
    steps = []
    for stream in streams:
        if state:
            stream.load_state_dict(state)
    for _ in range(count):
        steps.append([row for s in streams for b in s.peek() for row in b["input_ids"].tolist()])
        for stream in streams:
            stream.advance()
    return steps


def test_same_rows_at_any_world_size_and_after_resume():
    whole = _steps(1, 9)
    assert _steps(2, 9) == whole == _steps(4, 9)
    stopped = _stream(2, 1)
    for _ in range(4):
        stopped.advance()
    assert _steps(4, 5, stopped.state_dict()) == whole[4:]
    assert _steps(1, 5, stopped.state_dict()) == whole[4:]


def test_peek_does_not_move():
    stream = _stream(1, 0)
    assert torch.equal(stream.peek()[0]["input_ids"], stream.peek()[0]["input_ids"])
    assert stream.state_dict()["position"] == 0


def test_state_of_other_data_is_refused():
    with pytest.raises(DataError, match="other data"):
        _stream(1, 0).load_state_dict(_stream(1, 0, shuffle=False).state_dict())


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows"):
        BatchStream(PackedDataset([], 7, 0, False), global_batch=1, micro_batch=1, rank=0, world_size=1)


def test_pydoc_topics_hold_out_nothing_that_is_trained_on():
    documents = text.load_documents(DataConfig())
    train, held = text.split(documents, 0.05, seed=1234)
    size = sum(map(len, documents))
    assert size > 200_000 and sorted(train + held) == sorted(documents)
    assert 0.05 <= sum(map(len, held)) / size < 0.35
    assert not {p for d in train for p in d.split("\n")} & {p for d in held for p in d.split("\n")}


def test_split_keeps_something_to_train_on():
    assert text.split(["a", "b"], 0.99, 0)[0]
    assert text.split(["a", "b"], 0.0, 0) == (["a", "b"], [])


def test_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.txt").write_text("  \n")
    assert text.load_documents(DataConfig(source="text_files", path=str(tmp_path))) == ["one", "two"]
    with pytest.raises(DataError, match="No such file"):
        text.load_documents(DataConfig(source="text_files", path=str(tmp_path / "no.txt")))


SENTENCES = ["the quick brown fox", "jumps over the lazy dog <s> </s> <pad>", "naïve café — “ok” 😀"] * 5


def test_tokenizer_round_trip_and_literal_special_tokens(tmp_path):
    bpe = tokenizer.train(SENTENCES, 300)
    assert [bpe.token_to_id(token) for token in ("<s>", "</s>", "<pad>")] == [BOS_ID, EOS_ID, PAD_ID]
    for ids, sentence in zip(encode(bpe, SENTENCES), SENTENCES, strict=True):
        assert ids[0] == BOS_ID and ids[-1] == EOS_ID
        assert not {BOS_ID, EOS_ID, PAD_ID} & set(ids[1:-1].tolist())
        assert bpe.decode(ids[1:-1].tolist()) == sentence


def test_tokenizer_is_trained_once_and_found_again(tmp_path):
    said: list[str] = []
    arguments = {"leader": True, "timeout": 5, "say": said.append}
    folder = tokenizer.prepare(SENTENCES, 300, tmp_path / "cache", **arguments)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer.prepare(SENTENCES, 300, tmp_path / "cache", **arguments) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before and len(said) == 1
    assert tokenizer.prepare(SENTENCES, 301, tmp_path / "cache", **arguments) != folder


def test_tokenizer_training_is_deterministic(tmp_path):
    folders = [
        tokenizer.prepare(SENTENCES, 300, tmp_path / x, leader=True, timeout=5, say=print) for x in "ab"
    ]
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()


class Clock:
    """Time that passes only in `sleep`, where `then` may make something happen."""

    def __init__(self, then=lambda: None):
        self.now, self.then = 0.0, then

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


def test_others_wait_for_the_leader_with_a_message(tmp_path):
    said: list[str] = []

    def lead():
        tokenizer.prepare(SENTENCES, 300, tmp_path, leader=True, timeout=5, say=lambda _: None)

    clock = Clock(then=lead)
    folder = tokenizer.prepare(
        SENTENCES, 300, tmp_path, leader=False, timeout=5, say=said.append, sleep=clock.sleep, clock=clock
    )
    assert folder.is_dir() and clock.now == pytest.approx(0.1)
    assert len(said) == 1 and "rank 0 to train the tokenizer" in said[0]


def test_waiting_has_a_deadline(tmp_path):
    clock = Clock()
    with pytest.raises(DeadlineError, match="waited 5 s for the node's rank 0"):
        tokenizer.prepare(
            SENTENCES, 300, tmp_path, leader=False, timeout=5, say=print, sleep=clock.sleep, clock=clock
        )


def test_a_lock_held_by_another_run_is_waited_for(tmp_path):
    import fcntl

    name = f"tokenizer-{tokenizer.fingerprint(SENTENCES, 300)}"
    with open(tmp_path / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clock = Clock()
        with pytest.raises(DeadlineError, match="another run's tokenizer lock"):
            tokenizer.prepare(
                SENTENCES, 300, tmp_path, leader=True, timeout=5, say=print, sleep=clock.sleep, clock=clock
            )
    assert not (tmp_path / name).exists()


def test_many_leaders_at_once_leave_one_whole_tokenizer(tmp_path):
    def lead():
        tokenizer.prepare(SENTENCES, 300, tmp_path, leader=True, timeout=30, say=print)

    threads = [threading.Thread(target=lead) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]
