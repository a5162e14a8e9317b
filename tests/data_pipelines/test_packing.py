from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.interleave import Document
from data_pipelines.packing import plan_rows, write_document
from emu2_jax.sequence import RowShape, empty_batch


def test_the_worked_example_of_the_contract() -> None:
    shape = RowShape(length=12, image_slots=2, visual_tokens=2, image_size=2)
    bos, start, image, end, cat, eos, dog, pad = 1, 101, 103, 102, 11, 2, 12, 100
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    first = Document(
        np.array([bos, start, image, image, end, cat, eos], np.int32),
        np.array([0, 0, 1, 1, 0, 0, 0], np.bool_),
        [picture],
    )
    second = Document(np.array([bos, dog, eos], np.int32), np.zeros(3, np.bool_), [])
    batch = empty_batch(1, shape, pad)
    write_document(batch, shape, first, row=0, start=0, segment=1, slot=0)
    write_document(batch, shape, second, row=0, start=7, segment=2, slot=1)
    assert batch["tokens"].tolist() == [[bos, start, image, image, end, cat, eos, bos, dog, eos, pad, pad]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0]]
    assert batch["is_visual"].astype(int).tolist() == [[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["visual_index"].tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["image_mask"].astype(int).tolist() == [[1, 0]]
    assert np.array_equal(batch["images"][0, 0], picture) and not batch["images"][0, 1].any()


def test_later_images_are_numbered_by_their_slot() -> None:
    shape = RowShape(length=6, image_slots=4, visual_tokens=2, image_size=1)
    pictures = [np.full((1, 1, 3), i, np.uint8) for i in (7, 8)]
    document = Document(np.full(5, 9, np.int32), np.array([1, 1, 0, 1, 1], np.bool_), pictures)
    batch = empty_batch(1, shape, 0)
    write_document(batch, shape, document, row=0, start=1, segment=1, slot=2)
    assert batch["visual_index"].tolist() == [[0, 4, 5, 0, 6, 7]]
    assert batch["images"][0, :, 0, 0, 0].tolist() == [0, 0, 7, 8]
    assert batch["image_mask"].tolist() == [[False, False, True, True]]


def _plan(lengths: list[int], images: list[int], length: int, image_slots: int, pool: int = 256) -> list[list[int]]:
    measured = [(np.array(lengths), np.array(images))]
    return list(plan_rows(measured, length=length, image_slots=image_slots, pool=pool))


@pytest.mark.parametrize(
    ("lengths", "images", "pool", "rows"),
    [
        ([6, 5, 4, 5], [0, 0, 0, 0], 256, [[0, 2], [1, 3]]),  # the best filling, not the first that fits
        ([6, 5, 4, 5], [0, 0, 0, 0], 1, [[0], [1, 2], [3]]),  # without a choice: one after the other
        ([7, 3, 3], [0, 3, 2], 256, [[0, 2], [1]]),  # document 1 has an image too many for the two slots
        ([10, 10], [2, 2], 256, [[0], [1]]),
        ([2, 2, 2], [1, 1, 1], 256, [[0, 1], [2]]),  # out of slots before positions
        ([], [], 256, []),
    ],
)
def test_worked_rows(lengths: list[int], images: list[int], pool: int, rows: list[list[int]]) -> None:
    slots = 3 if 3 in images else 2
    if 3 in images:
        images = [1, 3, 2]  # 1 + 3 slots do not fit into 3, 1 + 2 do
    planned = _plan(lengths, images, 10, slots, pool)
    assert [sorted(row) for row in planned] == rows


def _mixed_stream(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Half captions (25 tokens and an image), half interleaved documents (about 640 positions, 3 images)."""
    rng = np.random.default_rng(7)
    caption = np.clip(np.exp(rng.normal(2.95, 0.72, count)).round(), 3, 300).astype(int) + 68
    images = np.clip(rng.poisson(2.2, count) + 1, 1, 8)
    text = np.clip(np.exp(rng.normal(5.9, 0.9, count)).round(), 20, 4000).astype(int)
    is_caption = rng.random(count) < 0.5
    return np.where(is_caption, caption, np.minimum(text + 68 * images, 1024)), np.where(is_caption, 1, images)


def test_mixed_stream_leaves_little_padding_and_few_empty_slots() -> None:
    lengths, images = _mixed_stream(12000)
    blocks = [(lengths[i : i + 1000], images[i : i + 1000]) for i in range(0, 12000, 1000)]
    rows = list(plan_rows(blocks, length=2048, image_slots=12, pool=256))
    assert sorted(number for row in rows for number in row) == list(range(12000))
    used = np.array([lengths[row].sum() for row in rows])
    slots = np.array([images[row].sum() for row in rows])
    assert used.max() <= 2048 and slots.max() <= 12
    assert 1 - used.mean() / 2048 <= 0.01
    assert 1 - slots.mean() / 12 <= 0.04


def test_rows_are_planned_as_they_are_asked_for() -> None:
    lengths, images = _mixed_stream(3000)
    asked: list[int] = []

    def blocks() -> object:
        for i in range(0, 3000, 500):
            asked.append(i)
            yield lengths[i : i + 500], images[i : i + 500]

    rows = plan_rows(blocks(), length=2048, image_slots=12, pool=256)  # type: ignore[arg-type]
    first = next(rows)
    assert 0 in first and asked == [0]


def test_nobody_waits_for_ever() -> None:
    lengths, images = _mixed_stream(4000)
    at = {number: i for i, row in enumerate(_plan(lengths.tolist(), images.tolist(), 2048, 12)) for number in row}
    samples_per_row = 4000 / len(set(at.values()))
    late = max(row - number / samples_per_row for number, row in at.items())
    assert late <= 256
