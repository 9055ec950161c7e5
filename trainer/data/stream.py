"""The training stream: which rows each rank gets in each step; and the rows of an evaluation.

Row v of every global batch is the next one of lane v (`lanes.py`), and data-parallel rank r of D owns the
lanes r·V/D … (r+1)·V/D. So the order of tokens depends on the seed, the data and the global batch only. The
state is each lane's place. It moves with `advance`, not with what was prepared ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from trainer.config import DataConfig
from trainer.data.documents import Documents
from trainer.data.lanes import Lane, Listed, Orders, Place
from trainer.data.packing import Batch, Cutter, Row, collate
from trainer.data.workers import Ahead
from trainer.errors import DataError

_KEYS = {
    "global_batch": "train.global_batch",
    "seq_len": "data.seq_len",
    "strategy": "data.strategy",
    "stride": "data.stride",
    "shuffle": "data.shuffle",
    "seed": "seed",
    "documents": "data",
    "fingerprint": "data",
}
"""What a state must agree in with the stream that loads it → the configuration's key."""

_KEEP = 1 << 24
"""Tokens of an evaluation that are kept in memory, so that only the first one reads them."""


class _Step(NamedTuple):
    rows: list[Row]
    places: list[Place]
    """Of the same lanes, after this step."""


class BatchStream:
    """Micro-batches of one data-parallel rank. `peek` does not move; `advance` is called once the step was taken.

    Raises ConfigError where the strategy cannot work, DataError where there is nothing to train on.
    """

    def __init__(
        self,
        documents: Documents,
        data: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        pad_id: int,
        seed: int,
        timeout: float = 600,
    ) -> None:
        if not len(documents):
            raise DataError("the training split has no documents: more text, or a smaller data.holdout")
        self._documents, self._data = documents, data
        self._cutter = Cutter.of(data, pad_id)
        self._micro_batch = micro_batch
        self._timeout = timeout
        share = global_batch // data_size
        self._lanes = range(data_rank * share, (data_rank + 1) * share)
        self._about = {
            "fingerprint": documents.fingerprint,
            "documents": len(documents),
            "seed": seed,
            "shuffle": data.shuffle,
            "strategy": data.strategy,
            "seq_len": data.seq_len,
            "stride": self._cutter.stride,
            "global_batch": global_batch,
        }
        self._places = [Place()] * share
        self._step: _Step | None = None
        self._parts: list[Iterator[_Step]] = []

    def peek(self) -> list[Batch]:
        """This rank's micro-batches of the next step, each of (micro_batch, seq_len).

        Raises DataError where documents cannot be read, or stand in another order than when the state was
        saved; DeadlineError where a loader process takes longer than `timeout` for a step.
        """
        rows, size = self._peek().rows, self._micro_batch
        return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def advance(self) -> None:
        self._places = self._peek().places
        self._step = None

    def sources(self) -> list[str]:
        """Where each row of the peeked step comes from: `epoch 0 document 17 tokens 0–127, …`."""
        return [f"lane {lane}: {row}" for lane, row in zip(self._lanes, self._peek().rows, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The places of this rank's lanes, for JSON. `merge` makes one of all ranks'."""
        return {**self._about, "first_lane": self._lanes.start, "lanes": [list(place) for place in self._places]}

    @staticmethod
    def merge(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state of the whole stream of those of all data-parallel ranks; copies (tensor peers) may be among them.

        Raises DataError if they are not of one stream, or some lanes are missing.
        """
        parts = {state["first_lane"]: state for state in states}
        whole = {**states[0], "first_lane": 0, "lanes": []}
        for first in sorted(parts):
            state = parts[first]
            if first != len(whole["lanes"]) or any(state[key] != whole[key] for key in _KEYS):
                break
            whole["lanes"] += state["lanes"]
        if len(whole["lanes"]) != whole["global_batch"]:
            raise DataError(f"the data positions of the ranks (first lanes {sorted(parts)}) do not fit together")
        return whole

    def load_state_dict(self, whole: dict[str, Any]) -> None:
        """Continues at a merged state. Raises DataError, naming the key, if it is of another stream."""
        for name, key in _KEYS.items():
            if whole.get(name) != self._about[name]:
                raise _differs(name, key, whole.get(name), self._about[name])
        lanes = whole["lanes"]
        if whole["first_lane"] != 0 or len(lanes) != whole["global_batch"]:
            raise DataError(f"the data position has {len(lanes)} of {whole['global_batch']} lanes")
        self.close()
        self._places = [Place(*lanes[number]) for number in self._lanes]

    def close(self) -> None:
        """Ends the loader processes; the next `peek` would start new ones."""
        for part in self._parts:
            if isinstance(part, Ahead):
                part.close()
        self._parts, self._step = [], None

    def _peek(self) -> _Step:
        if not self._parts:
            self._parts = self._start()
        if self._step is None:
            count = len(self._parts)
            steps = [next(part) for part in self._parts]
            self._step = _Step(
                [steps[i % count].rows[i // count] for i in range(len(self._lanes))],
                [steps[i % count].places[i // count] for i in range(len(self._lanes))],
            )
        return self._step

    def _start(self) -> list[Iterator[_Step]]:
        """One part of the lanes for each loader process: every n-th, so that all have about the same to do."""
        count = min(max(self._data.workers, 1), len(self._lanes))
        produce: list[Callable[[], Iterator[_Step]]] = [
            partial(self._produce, self._lanes[i::count], self._places[i::count]) for i in range(count)
        ]
        if not self._data.workers:
            return [produce[0]()]
        return [
            Ahead(items, ahead=self._data.prefetch, timeout=self._timeout, what=f"loader process {i} of {count}")
            for i, items in enumerate(produce)
        ]

    def _produce(self, numbers: Sequence[int], places: list[Place]) -> Iterator[_Step]:
        """The steps of some lanes from their places on, without end."""
        orders = Orders(self._documents)
        total = self._about["global_batch"]
        lanes = [Lane(self._documents, orders, number, total) for number in numbers]
        for lane, place in zip(lanes, places, strict=True):
            lane.check(place)
        announced = [place.position for place in places]
        while True:
            self._announce(lanes, places, announced)
            rows, places = [], list(places)
            for i, lane in enumerate(lanes):
                cut = self._cutter.row(lane, places[i].position, places[i].offset)
                assert cut is not None  # lanes have no end
                rows.append(cut.row)
                places[i] = lane.mark(cut.position, cut.offset)
            yield _Step(rows, places)

    def _announce(self, lanes: Sequence[Lane], places: Sequence[Place], announced: list[int]) -> None:
        """Tells the documents once of each that comes within the next `data.predownload` of a lane."""
        ahead = self._data.predownload
        wanted = []
        for i, (lane, place) in enumerate(zip(lanes, places, strict=True)):
            until = place.position + ahead
            begin = max(announced[i], place.position)
            wanted += [(position, lane) for position in range(begin, until)]
            announced[i] = max(announced[i], until)
        if wanted:
            wanted.sort(key=lambda pair: pair[0])
            self._documents.expect([lane.locate(position)[1] for position, lane in wanted])


class EvalRows:
    """The rows of held-out documents, once: every token that is a target counts once at any number of ranks.

    Row i of all goes to data-parallel rank i mod D. Every rank gets the same number of batches, all of
    `micro_batch` rows (collectives and pipelines need that); rows without targets fill the last ones.
    Each rank reads all documents, since where a row begins follows from what is before it.
    `max_rows`: only so many, of documents in an order drawn with the seed.
    """

    def __init__(
        self,
        documents: Documents,
        data: DataConfig,
        *,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        pad_id: int,
        seed: int,
        max_rows: int | None = None,
    ) -> None:
        self._documents = documents
        self._cutter = Cutter.of(data, pad_id)
        self._micro_batch, self._rank, self._size = micro_batch, data_rank, data_size
        self._seed, self._max_rows = seed, max_rows
        self._kept: list[list[Row]] | None = None

    def __len__(self) -> int:
        """Documents."""
        return len(self._documents)

    @property
    def fingerprint(self) -> str:
        """Changes with the documents and with how rows are made of them."""
        text = f"{self._documents.fingerprint} {self._cutter} {self._seed} {self._max_rows}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Batch]:
        """Batches of (micro_batch, seq_len); no rank ever gets one more than another."""
        if self._kept is not None:
            yield from map(collate, self._kept)
            return
        kept: list[list[Row]] | None = []
        for rows in self._groups():
            if kept is not None:
                kept.append(rows)
                if len(kept) * self._micro_batch * self._cutter.seq_len > _KEEP:
                    kept = None
            yield collate(rows)
        self._kept = kept

    def _groups(self) -> Iterator[list[Row]]:
        mine: list[Row] = []
        index = -1
        for index, row in enumerate(self._rows()):
            if index % self._size == self._rank:
                mine.append(row)
            if (index + 1) % (self._size * self._micro_batch) == 0:
                yield mine
                mine = []
        if (index + 1) % (self._size * self._micro_batch):
            yield mine + [self._cutter.filler()] * (self._micro_batch - len(mine))

    def _rows(self) -> Iterator[Row]:
        count = len(self._documents)
        order: Sequence[int] = range(count)
        if self._max_rows is not None:
            order = np.random.Generator(np.random.Philox(key=[self._seed, 0])).permutation(count).tolist()
        source = Listed(self._documents, order)
        position, offset, rows = 0, 0, 0
        while rows != self._max_rows and (cut := self._cutter.row(source, position, offset)):
            yield cut.row
            _, position, offset = cut
            rows += 1


def _differs(name: str, key: str, saved: Any, here: Any) -> DataError:
    if key == "data":
        message = f"the checkpoint was trained on other data ({name} {saved}, here {here})"
        remedy = "Use the data, tokenizer and data.holdout that the run began with"
    else:
        message = f"the checkpoint was trained with {key}={saved}, here it is {here}"
        remedy = f"Set {key}={saved}"
    return DataError(
        f"{message}: exact resume is impossible",
        hint=f"{remedy}, or begin anew from its weights: checkpoint.resume=none model.pretrained=<checkpoint>.",
    )
