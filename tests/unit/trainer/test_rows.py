"""Lanes, rows and the stream, against plain re-tellings of their rules."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest

from trainer.config import DataConfig
from trainer.data.documents import Document
from trainer.data.lanes import Lane, Orders
from trainer.data.packing import IGNORE, Cutter, collate
from trainer.data.stream import BatchStream, EvalRows
from trainer.data.subset import Subset, split
from trainer.errors import ConfigError, DataError

PAD = 9


class Made:
    """Documents of given lengths; token i of document d is 10 + 1000·d + i, so each is known by its number."""

    def __init__(self, lengths, seed=5, shuffle=True, targets=None, fingerprint="f"):
        self.lengths, self.seed, self.shuffle = lengths, seed, shuffle
        self.targets, self.fingerprint = targets, fingerprint
        self.expected, self.reads = [], []

    def __len__(self):
        return len(self.lengths)

    def order(self, epoch):
        if not self.shuffle:
            return np.arange(len(self))
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self))

    def read(self, index):
        self.reads.append(index)
        tokens = 10 + 1000 * index + np.arange(self.lengths[index], dtype=np.int32)
        return Document(tokens, None if self.targets is None else self.targets(index, len(tokens)))

    def expect(self, indices):
        self.expected.append(list(indices))


LENGTHS = [7, 1, 30, 2, 12, 5, 64, 3, 3, 18, 1, 9, 40]


def _config(**values) -> DataConfig:
    return DataConfig(**{"seq_len": 8, "stride": 3, "predownload": 0} | values)


def _stream(documents=None, batch=12, rank=0, size=1, micro=2, **values) -> BatchStream:
    documents = Made(LENGTHS) if documents is None else documents
    return BatchStream(
        documents,
        _config(**values),
        global_batch=batch,
        micro_batch=micro,
        data_rank=rank,
        data_size=size,
        pad_id=PAD,
        seed=5,
    )


def _rows(batches) -> list[list[list[int]]]:
    """[inputs, labels, positions] of each row of a list of batches."""
    names = ("input_ids", "labels", "position_ids")
    return [list(row) for b in batches for row in zip(*(b[name].tolist() for name in names), strict=True)]


def _take(stream, steps) -> list:
    taken = []
    for _ in range(steps):
        taken.append(_rows(stream.peek()))
        stream.advance()
    return taken


def _lane_documents(documents, lane, lanes, count):
    """The first `count` documents of a lane, straight from the definition."""
    for k in range(count):
        epoch, rank = divmod(lane + k * lanes, len(documents))
        yield epoch, int(documents.order(epoch)[rank])


def _packed(documents, lane, lanes, count, seq_len, cross=False):
    """The first `count` packed rows of a lane: token by token, from the joined documents."""
    stream = []
    for _, index in _lane_documents(documents, lane, lanes, 10_000):
        document = documents.read(index)
        for i, token in enumerate(document.tokens.tolist()):
            allowed = document.targets is None or bool(document.targets[i])
            stream.append((token, i > 0 and allowed, i == 0))
        if len(stream) > count * seq_len:
            break
    rows = []
    for start in range(0, count * seq_len, seq_len):
        inputs, labels, positions = [], [], []
        for j in range(start, start + seq_len):
            begins = j == start or (stream[j][2] and not cross)
            positions.append(0 if begins else positions[-1] + 1)
            inputs.append(stream[j][0])
            labels.append(stream[j + 1][0] if stream[j + 1][1] else IGNORE)
        rows.append([inputs, labels, positions])
    return rows


def _windows(documents, lane, lanes, count, seq_len, stride, only_first):
    """The first `count` windows of a lane: from the targets that each brings, back to its inputs."""
    rows = []
    for _, index in _lane_documents(documents, lane, lanes, 10_000):
        document = documents.read(index)
        tokens = document.tokens.tolist()
        first = 1
        while first < len(tokens) and len(rows) < count:
            begin = 0 if first == 1 else first - 1 - stride
            last = min(begin + seq_len, len(tokens) - 1)
            inputs = (tokens[begin:last] + [tokens[last]] + [PAD] * seq_len)[:seq_len]
            labels = [IGNORE] * seq_len
            for target in range(first, last + 1):
                if document.targets is None or document.targets[target]:
                    labels[target - 1 - begin] = tokens[target]
            rows.append([inputs, labels, list(range(seq_len))])
            first = last + 1
            if only_first:
                break
        if len(rows) == count:
            return rows
    raise AssertionError("too few windows")


def _chat(index, count):
    return np.random.Generator(np.random.Philox(index)).random(count) < 0.5


@pytest.mark.parametrize("seed", range(12))
def test_lanes_read_every_document_of_every_epoch_once_and_in_order(seed):
    draw = random.Random(seed)
    documents, lanes = Made([3] * draw.choice([1, 3, 7, 12, 31])), draw.choice([1, 2, 3, 5, 8, 12, 40])
    epochs = 4
    orders = Orders(documents)
    seen = {}
    for number in range(lanes):
        lane = Lane(documents, orders, number, lanes)
        for k in range(epochs * len(documents)):
            item = lane.item(k)
            seen[number + k * lanes] = (item.epoch, item.index)
    wanted = [(epoch, index) for epoch in range(epochs) for index in documents.order(epoch).tolist()]
    assert [seen[g] for g in range(len(wanted))] == wanted
    assert sorted(wanted) == [(epoch, index) for epoch in range(epochs) for index in range(len(documents))]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("chat", [None, _chat])
def test_pack_equals_the_joined_documents_cut_into_rows(chat, cross):
    documents = Made(LENGTHS, targets=chat)
    steps = _take(_stream(documents, batch=5, cross_document=cross), 23)
    for lane in range(5):
        assert [step[lane] for step in steps] == _packed(documents, lane, 5, 23, 8, cross)


@pytest.mark.parametrize("seed", range(8))
def test_pack_of_any_lengths(seed):
    draw = random.Random(seed)
    documents = Made([draw.choice([0, 1, 2, draw.randint(1, 60)]) for _ in range(draw.randint(1, 20))] + [4])
    batch, seq_len = draw.randint(1, 9), draw.randint(2, 20)
    steps = _take(_stream(documents, batch=batch, seq_len=seq_len), 15)
    for lane in range(batch):
        assert [step[lane] for step in steps] == _packed(documents, lane, batch, 15, seq_len)


@pytest.mark.parametrize("strategy, stride", [("overflow", 3), ("overflow", 0), ("overflow", 7), ("trunc", 3)])
@pytest.mark.parametrize("chat", [None, _chat])
def test_windows_equal_the_plain_rule(strategy, stride, chat):
    documents = Made(LENGTHS, targets=chat)
    steps = _take(_stream(documents, batch=4, strategy=strategy, stride=stride), 30)
    for lane in range(4):
        wanted = _windows(documents, lane, 4, 30, 8, stride, strategy == "trunc")
        assert [step[lane] for step in steps] == wanted


@pytest.mark.parametrize("strategy", ["pack", "overflow"])
def test_every_token_but_the_first_is_a_target_once_an_epoch(strategy):
    documents = Made(LENGTHS)
    cutter = Cutter.of(_config(strategy=strategy), PAD)
    lane = Lane(documents, Orders(documents), 0, 1)
    position, offset, counts = 0, 0, Counter()
    while position < len(documents):
        row, position, offset = cutter.row(lane, position, offset)
        for label, begins in zip(row.labels.tolist(), [*(row.position_ids[1:] == 0), False], strict=True):
            assert not (begins and label != IGNORE)
            counts[label] += 1
    wanted = {10 + 1000 * d + i for d, n in enumerate(LENGTHS) for i in range(1, n)}
    assert {token for token in counts if token != IGNORE} >= wanted
    # the last row may reach into the next epoch; everything before it counts once
    tail = {label for label in row.labels.tolist() if label != IGNORE}
    assert all(counts[token] == 1 for token in wanted - tail)


def test_token_order_for_4_2_3_ranks_and_any_place_of_the_change():
    whole = _take(_stream(), 12)
    state, taken = None, []
    for size, steps in ((4, 3), (2, 5), (3, 4)):
        streams = [_stream(rank=rank, size=size) for rank in range(size)]
        for stream in streams if state else ():
            stream.load_state_dict(state)
        for _ in range(steps):
            taken.append([row for stream in streams for row in _rows(stream.peek())])
            for stream in streams:
                stream.advance()
        states = [json.loads(json.dumps(stream.state_dict())) for stream in streams]
        state = BatchStream.merge([*reversed(states), states[0]])
    assert taken == whole


@pytest.mark.parametrize("strategy", ["pack", "overflow", "trunc"])
def test_resume_after_every_step_is_the_very_next_row(strategy):
    whole = _take(_stream(strategy=strategy), 20)
    stream = _stream(strategy=strategy)
    for step in range(20):
        stream.peek()  # prepared is not consumed
        again = _stream(strategy=strategy)
        again.load_state_dict(stream.state_dict())
        assert _rows(again.peek()) == whole[step]
        stream.advance()


def test_a_resume_reads_only_the_document_it_stands_in():
    stream = _stream(batch=1, micro=1)
    _take(stream, 200)
    documents = Made(LENGTHS)
    again = _stream(documents, batch=1, micro=1)
    again.load_state_dict(stream.state_dict())
    again.peek()
    assert len(documents.reads) <= 8


@pytest.mark.parametrize(
    "change, key",
    [
        ({"batch": 6}, r"train\.global_batch=12, here it is 6"),
        ({"seq_len": 16}, r"data\.seq_len=8, here it is 16"),
        ({"strategy": "overflow"}, r"data\.strategy=pack, here it is overflow"),
        ({"shuffle": False}, r"data\.shuffle=True"),
        ({"documents": Made(LENGTHS, fingerprint="g")}, "other data"),
        ({"documents": Made(LENGTHS[1:])}, "other data"),
    ],
)
def test_a_state_of_another_stream_is_refused_by_name(change, key):
    with pytest.raises(DataError, match=f"{key}.*exact resume is impossible") as caught:
        _stream(**change).load_state_dict(_stream().state_dict())
    assert "checkpoint.resume=none" in caught.value.hint


def test_the_stride_matters_only_where_it_is_used():
    _stream(stride=4).load_state_dict(_stream().state_dict())
    with pytest.raises(DataError, match=r"data\.stride=3, here it is 4"):
        _stream(stride=4, strategy="overflow").load_state_dict(_stream(strategy="overflow").state_dict())
    with pytest.raises(ConfigError, match=r"data\.stride=8 must be smaller than data\.seq_len=8"):
        _stream(stride=8, strategy="overflow")


def test_another_order_under_the_same_fingerprint_is_noticed():
    stream = _stream()
    _take(stream, 3)
    other = _stream(Made(LENGTHS, seed=6))
    other.load_state_dict(stream.state_dict())
    with pytest.raises(DataError, match="the order of the documents changed"):
        other.peek()


def test_a_document_that_became_shorter_is_noticed():
    stream = _stream(batch=1, micro=1, shuffle=False, documents=Made([100, 100], shuffle=False))
    _take(stream, 3)
    other = _stream(batch=1, micro=1, shuffle=False, documents=Made([20, 100], shuffle=False))
    other.load_state_dict(stream.state_dict())
    with pytest.raises(DataError, match="token 24 of document 0, which has 20"):
        other.peek()


def test_states_that_do_not_fit_are_not_merged():
    states = [_stream(rank=rank, size=3).state_dict() for rank in range(3)]
    for wrong in (states[:2], states[1:], [*states[:2], _stream(rank=2, size=3, seq_len=16).state_dict()]):
        with pytest.raises(DataError, match="do not fit together"):
            BatchStream.merge(wrong)
    with pytest.raises(DataError, match="4 of 12 lanes"):
        _stream().load_state_dict(states[0])


def test_micro_batches_and_what_they_come_from():
    stream = _stream(Made([6, 30], shuffle=False), batch=2, rank=0, micro=1)
    assert [batch["input_ids"].shape for batch in stream.peek()] == [(1, 8), (1, 8)]
    assert stream.sources() == [
        "lane 0: epoch 0 document 0 tokens 0–5, epoch 1 document 0 tokens 0–2",
        "lane 1: epoch 0 document 1 tokens 0–8",
    ]
    stream.advance()
    assert stream.sources()[1] == "lane 1: epoch 0 document 1 tokens 8–16"


def test_documents_are_announced_once_each_ahead_of_being_read():
    documents = Made([4] * 40)
    stream = _stream(documents, batch=4, seq_len=8, predownload=3)
    order = [*documents.order(0), *documents.order(1)]
    for step in range(9):
        stream.peek()
        told = [index for call in documents.expected for index in call]
        # two documents a row, so all lanes go at the same pace
        assert told == order[: (2 * step + 3) * 4]
        stream.advance()
    assert set(documents.reads) <= set(told)


def test_no_documents_and_nothing_but_empty_ones_are_errors():
    with pytest.raises(DataError, match="no documents"):
        _stream(Subset(Made(LENGTHS), np.array([], int)))
    for strategy, lengths in (("pack", [0, 0]), ("trunc", [1, 0])):
        with pytest.raises(DataError, match="fewer than two tokens"):
            _stream(Made(lengths), strategy=strategy).peek()


@pytest.mark.parametrize("strategy", ["pack", "overflow", "trunc"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_evaluation_counts_every_target_once_at_any_size(strategy, size):
    def evaluate(ranks):
        made = []
        for rank in range(ranks):
            rows = EvalRows(
                Made(LENGTHS), _config(strategy=strategy), micro_batch=4, data_rank=rank, data_size=ranks,
                pad_id=PAD, seed=1,
            )  # fmt: skip
            first = [_rows([batch]) for batch in rows]
            assert [_rows([batch]) for batch in rows] == first  # now from memory
            made.append(first)
        assert len({len(batches) for batches in made}) == 1
        assert all(len(batch) == 4 for batches in made for batch in batches)
        return [row for batches in made for batch in batches for row in batch]

    targets = Counter(label for _, labels, _ in evaluate(size) for label in labels if label != IGNORE)
    last = {n: 8 if strategy == "trunc" else n for n in LENGTHS}
    wanted = Counter(10 + 1000 * d + i for d, n in enumerate(LENGTHS) for i in range(1, min(last[n] + 1, n)))
    assert targets == wanted
    useful = [row for row in evaluate(size) if any(label != IGNORE for label in row[1])]
    assert sorted(useful) == sorted(row for row in evaluate(1) if any(label != IGNORE for label in row[1]))


def test_evaluation_of_some_rows_is_drawn_with_the_seed():
    def rows(seed, size):
        common = {"micro_batch": 2, "data_size": size, "pad_id": PAD, "seed": seed, "max_rows": 7}
        made = [EvalRows(Made(LENGTHS), _config(), data_rank=rank, **common) for rank in range(size)]
        return sorted(row for one in made for row in _rows(one) if row[0] != [PAD] * 8)

    assert len(rows(1, 1)) == 7 and rows(1, 1) == rows(1, 3) != rows(2, 1)


def test_subset_keeps_the_order_of_the_whole_and_numbers_anew():
    documents = Made(LENGTHS)
    indices = np.array([2, 3, 7, 11])
    part = Subset(documents, indices)
    for epoch in range(3):
        order = part.order(epoch)
        assert [i for i in documents.order(epoch).tolist() if i in indices] == indices[order].tolist()
    assert part.read(1).tokens.tolist() == documents.read(3).tokens.tolist()
    part.expect([3, 0])
    assert documents.expected == [[11, 2]]
    assert len({part.fingerprint, documents.fingerprint, Subset(documents, indices[:3]).fingerprint}) == 3


def test_split_is_a_partition_drawn_with_the_seed():
    train, held = split(1000, 0.05, 7)
    assert len(held) == 50 and sorted([*train, *held]) == list(range(1000))
    assert held.tolist() == split(1000, 0.05, 7)[1].tolist() != split(1000, 0.05, 8)[1].tolist()
    assert [len(part) for part in split(3, 0.99, 0)] == [1, 2] and [len(p) for p in split(1, 0.5, 0)] == [1, 0]
    assert len(split(10, 0.0, 0)[1]) == 0


def test_collate_types():
    documents = Made([20])
    cut = Cutter.of(_config(), PAD).row(Lane(documents, Orders(documents), 0, 1), 0, 0)
    batch = collate([cut.row, cut.row])
    assert {(str(tensor.dtype), tuple(tensor.shape)) for tensor in batch.values()} == {("torch.int64", (2, 8))}
