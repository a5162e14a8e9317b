"""The rows of a source by number, over all its epochs, planned over the index before any image is read.

An epoch is planned in blocks of some ten thousand samples, each by itself. The number of rows in a block is known once
it is planned, so the rows before a far one would have to be planned again; an `Anchor` says where a block begins, and
with the one that a checkpoint holds, a run goes on after planning a single block.
"""

from __future__ import annotations

import bisect
import collections
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from data_pipelines.order import EpochOrder, stream_seed
from data_pipelines.packing import plan_rows

#: Samples planned together. A row does not reach over the end of a block: with fewer there is more padding, with more
#: it takes longer to go on from a checkpoint (about 14 microseconds a sample).
BLOCK_SAMPLES = 32768

#: Changes whenever the same documents would be put into other rows: a run that goes on has to notice.
PLANNER = (2, BLOCK_SAMPLES)

_MEASURED_AT_ONCE = 4096  # samples
_BLOCKS_KEPT = 3  # read-ahead threads straddle the end of a block


class Anchor(NamedTuple):
    """Row number `first_row` of a source, counted over all epochs, is the first of block `block` of epoch `epoch`."""

    epoch: int
    block: int
    first_row: int


START = Anchor(0, 0, 0)


class Row(NamedTuple):
    """What goes into a row."""

    epoch: int
    order_seed: int  # of the order of texts and images within samples, in this epoch
    samples: Int64[np.ndarray, " n"]


#: Positions and images of the documents of some samples, by the seed of the order within them.
Measure = Callable[[Int64[np.ndarray, " n"], int], tuple[np.ndarray, np.ndarray]]


class RowLimits(NamedTuple):
    """What a row holds at most, and among how many waiting documents the planner chooses."""

    length: int  # positions
    image_slots: int
    pool: int


class _Block:
    """The rows of one block, planned as far as they have been asked for."""

    def __init__(self, samples: Int64[np.ndarray, " n"], order_seed: int, measure: Measure, limits: RowLimits) -> None:
        self.order_seed = order_seed
        self._samples = samples
        pieces = np.split(samples, range(_MEASURED_AT_ONCE, len(samples), _MEASURED_AT_ONCE))
        measured = (measure(piece, order_seed) for piece in pieces)
        self._rows = plan_rows(measured, length=limits.length, image_slots=limits.image_slots, pool=limits.pool)
        self._planned: list[np.ndarray] = []

    def row(self, number: int) -> Int64[np.ndarray, " n"] | None:
        """The samples of a row, or None after the last one."""
        while len(self._planned) <= number:
            places = next(self._rows, None)
            if places is None:
                return None
            self._planned.append(self._samples[places])
        return self._planned[number]

    def num_rows(self) -> int:
        """Rows planned so far; all of them once `row` has returned None."""
        return len(self._planned)


class RowPlan:
    """The rows of one source, from `anchor` on. Threads may share it."""

    def __init__(
        self,
        name: str,
        seed: int,
        num_samples: int,
        measure: Measure,
        limits: RowLimits,
        *,
        shuffle_window: int | None = None,
        shuffle_run: int = 1,
        block_samples: int = BLOCK_SAMPLES,
        anchor: Anchor = START,
    ) -> None:
        self._name = name
        self._seed = seed
        self._num_samples = num_samples
        self._measure = measure
        self._limits = limits
        self._shuffle = shuffle_window, shuffle_run
        self._blocks_per_epoch = max(1, -(-num_samples // block_samples))
        self._lock = threading.Lock()
        self.restart(anchor)

    def restart(self, anchor: Anchor) -> None:
        """Forgets what is planned; rows before the anchor's can no longer be asked for."""
        with self._lock:
            self._first = anchor.epoch * self._blocks_per_epoch + anchor.block  # blocks are counted over all epochs
            self._first_rows = [anchor.first_row]  # of block number self._first, and of those after it
            self._blocks: collections.OrderedDict[int, _Block] = collections.OrderedDict()

    def locate(self, row: int) -> Row:
        """What goes into row number `row`, counted over all epochs."""
        with self._lock:
            return self._find(row)[1]

    def anchor(self, row: int) -> Anchor:
        """The block that row number `row` lies in."""
        with self._lock:
            number = self._find(row)[0]
            return Anchor(*divmod(number, self._blocks_per_epoch), self._first_rows[number - self._first])

    def _find(self, row: int) -> tuple[int, Row]:
        if row < self._first_rows[0]:
            raise ValueError(
                f"source {self._name!r}: row {row} lies before row {self._first_rows[0]}, where it resumed"
            )
        number = bisect.bisect_right(self._first_rows, row) - 1 + self._first
        while True:
            block = self._block(number)
            first_row = self._first_rows[number - self._first]
            samples = block.row(row - first_row)
            if samples is not None:
                return number, Row(number // self._blocks_per_epoch, block.order_seed, samples)
            number += 1
            if number - self._first == len(self._first_rows):
                self._first_rows.append(first_row + block.num_rows())

    def _block(self, number: int) -> _Block:
        if number not in self._blocks:
            epoch, part = divmod(number, self._blocks_per_epoch)
            seed = stream_seed(self._seed, self._name, epoch)
            order = EpochOrder(stream_seed(seed, "samples"), self._num_samples, *self._shuffle)
            # Blocks of equal size: a short last one would be packed worse than the others.
            bounds = (self._num_samples * i // self._blocks_per_epoch for i in (part, part + 1))
            samples = order.samples(*bounds)
            self._blocks[number] = _Block(samples, stream_seed(seed, "order within slots"), self._measure, self._limits)
        self._blocks.move_to_end(number)
        while len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return self._blocks[number]


class SampleOrder:
    """The samples of one source one after the other, by number over all its epochs, from `anchor` on."""

    def __init__(
        self, name: str, seed: int, num_samples: int, *, shuffle_window: int | None = None, shuffle_run: int = 1
    ) -> None:
        self._name = name
        self._seed = seed
        self._num_samples = num_samples
        self._shuffle = shuffle_window, shuffle_run
        self._lock = threading.Lock()
        self._pieces: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
        self._anchor = START

    def restart(self, anchor: Anchor) -> None:
        """Counts from here: number `anchor.first_row` is the first sample of an epoch."""
        with self._lock:
            self._anchor = anchor

    def anchor(self, number: int) -> Anchor:
        """The epoch that a number lies in, and its first number."""
        epoch = self._locate(number)[0]
        return Anchor(epoch, 0, self._anchor.first_row + (epoch - self._anchor.epoch) * self._num_samples)

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch and sample."""
        with self._lock:
            epoch, place = self._locate(number)
            piece, offset = divmod(place, _MEASURED_AT_ONCE)
            if (epoch, piece) not in self._pieces:
                seed = stream_seed(self._seed, self._name, epoch, "images")
                order = EpochOrder(seed, self._num_samples, *self._shuffle)
                first = piece * _MEASURED_AT_ONCE
                samples = order.samples(first, min(first + _MEASURED_AT_ONCE, self._num_samples))
                self._pieces[epoch, piece] = samples
            self._pieces.move_to_end((epoch, piece))
            while len(self._pieces) > _BLOCKS_KEPT:
                self._pieces.popitem(last=False)
            return epoch, int(self._pieces[epoch, piece][offset])

    def _locate(self, number: int) -> tuple[int, int]:
        if number < self._anchor.first_row:
            raise ValueError(f"source {self._name!r}: sample {number} lies before {self._anchor.first_row}")
        epochs, place = divmod(number - self._anchor.first_row, self._num_samples)
        return self._anchor.epoch + epochs, place
