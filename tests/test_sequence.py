"""The contract of packed rows: its worked example, and the shapes and dtypes of a batch."""

from __future__ import annotations

import numpy as np
import tiny
from tiny import BOS, EOS, PICTURE

from emu2_jax import sequence
from emu2_jax.sequence import RowShape

SHAPE = RowShape(length=12, image_slots=2, visual_tokens=2, image_size=8)


def test_shapes_and_dtypes() -> None:
    assert sequence.batch_shapes(3, SHAPE) == {
        "tokens": ((3, 12), np.int32),
        "segment_ids": ((3, 12), np.int32),
        "positions": ((3, 12), np.int32),
        "is_visual": ((3, 12), np.bool_),
        "visual_index": ((3, 12), np.int32),
        "loss_weights": ((3, 12), np.float32),
        "images": ((3, 2, 8, 8, 3), np.uint8),
        "image_mask": ((3, 2), np.bool_),
    }
    without_images = RowShape(length=4, image_slots=0, visual_tokens=2, image_size=8)
    assert sequence.batch_shapes(1, without_images)["images"] == ((1, 0, 8, 8, 3), np.uint8)


def test_an_empty_batch_is_padding_only() -> None:
    batch = sequence.empty_batch(2, SHAPE, pad_id=34)
    assert {name: (array.shape, array.dtype.type) for name, array in batch.items()} == sequence.batch_shapes(2, SHAPE)
    np.testing.assert_array_equal(batch.pop("tokens"), np.full((2, 12), 34))
    assert all(not array.any() for array in batch.values())
    assert all(array.flags.writeable for array in batch.values())


def test_the_rows_of_the_tests_are_the_contracts_worked_example() -> None:
    """ "<s> [IMG] v v [/IMG] cat </s>" and "<s> dog </s>": what the other tests pack is what the contract shows."""
    row = {name: array[0] for name, array in tiny.pack([[[BOS, PICTURE, 5, EOS], [BOS, 6, EOS]]], SHAPE).items()}
    np.testing.assert_array_equal(row["tokens"], [1, 35, 37, 37, 36, 5, 2, 1, 6, 2, 34, 34])
    np.testing.assert_array_equal(row["segment_ids"], [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(row["is_visual"], np.array([0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], bool))
    np.testing.assert_array_equal(row["visual_index"], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["loss_weights"], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(row["image_mask"], [True, False])
    assert row["images"][0].any()
    assert not row["images"][1].any()


def test_slots_that_were_not_cleared_beforehand_are_cleared_at_the_end() -> None:
    batch = sequence.empty_batch(2, SHAPE, pad_id=9, clear_slots=False)
    batch["images"][:] = 7
    batch["image_mask"][1, 0] = True
    sequence.clear_empty_slots(batch)
    kept = batch["images"][1, 0]
    assert (kept == 7).all() and batch["images"].sum() == kept.sum()
