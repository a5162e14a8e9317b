"""Which documents share a row, and how they are written into it.

The planner works on lengths alone and keeps both limits of a row, L positions and M image slots. It fills one row at a
time from a pool of waiting documents, the oldest first, so that nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Int64

from data_pipelines.interleave import Document
from emu2_jax.sequence import RowShape

#: When fewer documents of the shortest length than this still fit, the row is finished by an exact filling.
_ENDGAME_DOCUMENTS = 3

#: Image slots that a row is taken to have in addition while it is filled.
_IMAGES_AHEAD = 0.5


class _Pool:
    """Documents that wait for a row, in arrays of which the first `size` entries count."""

    def __init__(self, documents: Iterator[tuple[int, int, int]], capacity: int) -> None:
        self._documents = documents
        self.numbers = np.zeros(capacity, np.int64)  # places in the stream: smaller is older
        self.lengths = np.zeros(capacity, np.int64)
        self.images = np.zeros(capacity, np.int64)
        self.size = 0
        while self.size < capacity and self._put(self.size):
            self.size += 1

    def _put(self, i: int) -> bool:
        document = next(self._documents, None)
        if document is None:
            return False
        self.numbers[i], self.lengths[i], self.images[i] = document
        return True

    def take(self, i: int) -> tuple[int, int, int]:
        """Removes entry i and lets the next document of the stream in."""
        taken = int(self.numbers[i]), int(self.lengths[i]), int(self.images[i])
        if not self._put(i):
            self.size -= 1
            for array in (self.numbers, self.lengths, self.images):
                array[i] = array[self.size]
        return taken


def plan_rows(
    measured: Iterable[tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]],
    *,
    length: int,
    image_slots: int,
    pool: int,
) -> Iterator[list[int]]:
    """Rows of documents, as places in the stream, each place in exactly one row.

    `measured` gives positions and images of the documents, in blocks of any size; every document must fit a row by
    itself. At most `pool` documents wait at a time.
    """
    waiting = _Pool(_number(measured), pool)
    while waiting.size:
        yield _fill_row(waiting, length, image_slots)


def _number(measured: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[int, int, int]]:
    number = 0
    for lengths, images in measured:
        for document in zip(lengths.tolist(), images.tolist(), strict=True):
            yield (number, *document)
            number += 1


def _fill_row(waiting: _Pool, length: int, image_slots: int) -> list[int]:
    row: list[int] = []
    room, slots = length, image_slots
    chosen = [int(waiting.numbers[: waiting.size].argmin())]
    while chosen:
        # From the back: taking an entry may move the last one into its place.
        for i in sorted(chosen, reverse=True):
            number, taken_length, taken_images = waiting.take(i)
            row.append(number)
            room -= taken_length
            slots -= taken_images
        chosen = _choose(waiting, room, slots)
    return row


def _choose(waiting: _Pool, room: int, slots: int) -> list[int]:
    """Entries of the pool to put into a row with `room` positions and `slots` image slots left; none when none fits."""
    lengths, images = waiting.lengths[: waiting.size], waiting.images[: waiting.size]
    fitting = np.flatnonzero((lengths <= room) & (images <= slots))
    if not len(fitting):
        return []
    lengths, images = lengths[fitting], images[fitting]
    if room < _ENDGAME_DOCUMENTS * lengths.min() or slots < _ENDGAME_DOCUMENTS * images.min():
        return fitting[_fullest(lengths, images, room, slots)].tolist()
    # Both limits are met together when what goes in has the images per position that the row has left. A little more is
    # asked for: documents with many images, if they are put off, pile up and in the end leave positions empty.
    mismatch = np.abs(images * room - lengths * (slots + _IMAGES_AHEAD)) / lengths
    nearest = max(4, len(fitting) // 4)
    if nearest < len(fitting):
        fitting = fitting[np.argpartition(mismatch, nearest)[:nearest]]
    return [int(fitting[waiting.numbers[fitting].argmin()])]


def _fullest(lengths: np.ndarray, images: np.ndarray, room: int, slots: int) -> list[int]:
    """The document, or pair of documents, that leaves the fewest positions free."""
    order = np.argsort(lengths, kind="stable")
    by_length = lengths[order]
    partner = np.searchsorted(by_length, room - by_length, side="right") - 1  # the longest that still fits beside it
    allowed = (partner >= 0) & (partner != np.arange(len(order)))
    allowed &= images[order] + images[order[partner]] <= slots
    together = np.where(allowed, by_length + by_length[partner], 0)
    best = int(together.argmax())
    if together[best] > by_length[-1]:
        return [int(order[best]), int(order[partner[best]])]
    return [int(order[-1])]


def write_document(
    batch: Mapping[str, np.ndarray],
    shape: RowShape,
    document: Document,
    *,
    row: int,
    start: int,
    segment: int,
    slot: int,
) -> None:
    """Writes a document into a row of `batch` from position `start` and image slot `slot` on, as segment `segment`."""
    size = len(document.tokens)
    span = slice(start, start + size)
    batch["tokens"][row, span] = document.tokens
    batch["segment_ids"][row, span] = segment
    batch["positions"][row, span] = np.arange(size)
    batch["is_visual"][row, span] = document.is_visual
    batch["loss_weights"][row, span] = 1.0
    first, count = slot * shape.visual_tokens, len(document.images) * shape.visual_tokens
    batch["visual_index"][row, span][document.is_visual] = np.arange(first, first + count)
    images = batch["images" if shape.embedding_width is None else "embeddings"]
    for i, image in enumerate(document.images, start=slot):
        images[row, i] = image
        batch["image_mask"][row, i] = True
