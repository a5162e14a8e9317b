"""Boxes out of texts and datasets, and how far they overlap."""

from __future__ import annotations

import pytest

from emu2_jax.evaluation.boxes import as_shares, overlap, parse
from emu2_jax.generation.prompt import Box


def test_a_box_that_a_prompt_writes_is_read_back() -> None:
    box = Box(0.125, 0.25, 0.5, 1.0, form="tokens")
    assert parse(f"it is here: {box.text} and there") == (0.125, 0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<object> <patch_index_0000> <patch_index_0056> <patch_index_0112> <patch_index_0224>", (0, 0.25, 0.5, 1)),
        ("[0,56,112,224]", (0, 0.25, 0.5, 1)),
        ("[0.1, 0.2, 0.5, 0.25]", (0.1, 0.2, 0.5, 0.25)),
        ("[0, 0, 1, 1]", (0, 0, 1, 1)),
        ("at 56 56 250 112", (0.25, 0.25, 1, 0.5)),  # nothing lies beyond the edge
        ("<patch_index_0000><patch_index_0056><patch_index_0112>", None),
        ("three numbers: 1, 2, 3", None),
        ("", None),
    ],
)  # fmt: skip
def test_boxes_in_texts(text: str, box: tuple[float, ...] | None) -> None:
    assert parse(text) == box


def test_boxes_of_datasets() -> None:
    assert as_shares([0.1, 0.2, 0.5, 0.6], "xyxy", 1, 1) == (0.1, 0.2, 0.5, 0.6)
    assert as_shares([0.2, 0.1, 0.6, 0.5], "yxyx", 1, 1) == (0.1, 0.2, 0.5, 0.6)
    assert as_shares([20, 30, 40, 60], "xyxy_pixels", 200, 100) == (0.1, 0.3, 0.2, 0.6)
    assert as_shares([20, 30, 20, 30], "xywh_pixels", 200, 100) == (0.1, 0.3, 0.2, 0.6)
    assert as_shares([-0.005, 0, 1.005, 1], "xyxy", 1, 1) == (0, 0, 1, 1)
    for wrong in ([0.5, 0.2, 0.1, 0.6], [0.1, 0.2, 3, 0.6]):
        with pytest.raises(ValueError, match="as shares of the sides"):
            as_shares(wrong, "xyxy", 1, 1)


@pytest.mark.parametrize(
    ("other", "share"),
    [
        ((0.0, 0.0, 0.5, 0.5), 1.0),
        ((0.0, 0.0, 0.5, 0.25), 0.5),  # half of it
        ((0.25, 0.0, 0.75, 0.5), 1 / 3),  # a half of each in common
        ((0.5, 0.0, 1.0, 0.5), 0.0),  # they touch
        ((0.6, 0.6, 0.9, 0.9), 0.0),
        ((0.5, 0.5, 0.0, 0.0), 0.0),  # edges the wrong way round
        ((0.1, 0.1, 0.1, 0.4), 0.0),  # without an area
    ],
)
def test_overlap(other: tuple[float, float, float, float], share: float) -> None:
    assert overlap(other, (0.0, 0.0, 0.5, 0.5)) == pytest.approx(share)
    assert overlap((0.0, 0.0, 0.5, 0.5), other) == pytest.approx(share)
