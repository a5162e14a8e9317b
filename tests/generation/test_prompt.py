"""Links become elements; boxes, templates and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu2_jax.errors import UserError
from emu2_jax.generation.prompt import Box, Embedded, Frames, Layout
from emu2_jax.generation.template import fields, fill
from emu2_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def layout(sentencepiece_model: Path) -> Layout:
    return Layout(Tokenizer(sentencepiece_model), image_size=8, visual_tokens=4, frame_tokens=1)


PICTURE, OTHER = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)


def test_elements_of_links(layout: Layout) -> None:
    tokenizer = layout.tokenizer
    elements = layout.elements([PICTURE, "a cat", Frames([PICTURE, OTHER])], tail="[IMG]")
    start, end = tokenizer.image_start_id, tokenizer.image_end_id
    frame = [start, tokenizer.frame_id, end]
    still = [start, *[tokenizer.image_id] * 4, end]
    words = tokenizer.encode("a cat")
    assert elements.tokens.tolist() == [tokenizer.bos_id, *still, *words, tokenizer.video_id, *frame, *frame, start]
    assert [visual.length for visual in elements.visuals] == [4, 1, 1]
    assert elements.is_visual().sum() == 6
    assert all(elements.is_visual()[visual.start] for visual in elements.visuals)
    # The same pixels at another N are another image.
    assert elements.visuals[0].digest != elements.visuals[1].digest


def test_what_two_prompts_have_in_common(layout: Layout) -> None:
    def common(a: list[Any], b: list[Any]) -> int:
        return layout.elements(a).common(layout.elements(b))

    words = len(layout.elements(["a cat"]))
    assert common(["a cat", PICTURE], ["a cat", PICTURE]) == words + 6
    assert common(["a cat", PICTURE], ["a cat", OTHER]) == words + 1  # [IMG]
    assert common(["a cat", PICTURE], ["a cat"]) == words
    assert common([PICTURE, "a cat"], [OTHER, "a cat"]) == 2
    assert common(["a cat"], [PICTURE]) == 1
    half = layout.elements([PICTURE])
    assert layout.elements([PICTURE]).common(half.front(1)) == 1


def test_boxes(layout: Layout) -> None:
    """At 16 pixels the pen is one wide; columns 4 to 11 and rows 8 to 15 are the box's."""
    box = Box(0.25, 0.5, 0.75, 1.0).picture(16)
    expected = np.zeros((16, 16), np.uint8)
    expected[8:16, 4:12] = 255
    expected[9:15, 5:11] = 0
    np.testing.assert_array_equal(box, np.repeat(expected[..., None], 3, axis=2))
    large = Box(0.0, 0.0, 1.0, 1.0).picture(448)
    assert large[:3].min() == 255 and large[3, 3:-3].max() == 0  # 3 pixels at 448
    assert Box(0.001, 0.001, 0.002, 0.002).picture(8).max() == 255
    places = Box(0.0, 0.5, 0.25, 1.0, form="tokens").text
    assert places == "<object><patch_index_0000><patch_index_0112><patch_index_0056><patch_index_0224></object>"
    assert len(layout.elements([Box(0.0, 0.5, 0.25, 1.0, form="tokens")])) == 1 + 6
    with pytest.raises(UserError, match="left before right"):
        Box(0.5, 0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"link 2: image of shape \(8, 8\), uint8; the encoder reads \(8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.float32), "link 2: image of shape .* float32"),
        (Embedded(np.zeros((3, 16), np.float32)), r"link 2: embeddings of shape \(3, 16\); wanted \(4, width\)"),
        (Frames([]), "link 2: a video without frames"),
        (7, "link 2: is a int; wanted a text"),
        ("<image>", "the text holds <image>"),
    ],
)
def test_links_that_cannot_be_read(link: Any, message: str, layout: Layout) -> None:
    with pytest.raises(UserError, match=message):
        layout.elements(["a cat", link])


def test_templates() -> None:
    assert fields("a {colour} {thing}, {{not a field}}") == ["colour", "thing"]
    assert fill("{n} {thing}, {{so}}", {"n": 2, "thing": "cats", "more": 0}, "row 1") == "2 cats, {so}"
    with pytest.raises(UserError, match=r"names the field \{colour\}, which row 3 of v\.csv has not; it has n, thing$"):
        fill("a {colour} cat", {"n": 2, "thing": "cat"}, "row 3 of v.csv")
    with pytest.raises(UserError, match=r"it has none$"):
        fill("{a}", {}, "row 1")
    for wrong in ("a {colour", "}", "{}", "{0}", "{a.b}", "{a!r}", "{a:>3}"):
        with pytest.raises(UserError, match="template"):
            fill(wrong, {"a": 1, "colour": 2}, "row 1")
