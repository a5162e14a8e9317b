"""Whether what moves in a clip moves in a drawing of it: a thing is followed by its look, and its steps are compared.

Things are followed by template matching: the thing as the true frame has it is looked for everywhere in the drawn
frame, and is where the squared difference is least. It needs no background, and is not put off by other things that
stay where they are. Measures of a clip that stands still, its first frame repeated, stand beside the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from emu2_jax.evaluation.heldout import psnr_db

Frames = Float[np.ndarray, "T S S 3"]
Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels

#: Pixels around a thing that are looked for with it: its outline tells more of its place than its inside.
MARGIN = 2
GREY_LEVELS = 255


@dataclass(frozen=True)
class Motion:
    """How a drawn clip compares with the true one."""

    displacement_error_px: float  # from one frame to the next, drawn against true; the mean length of the difference
    position_error_px: float  # of the thing in each frame
    psnr_db: float  # mean over the frames after the first, which a clip at rest is given
    flicker: float  # mean change, in grey levels of 255, of pixels that do not change in the true clip


def compare(drawn: Frames, truth: Frames, boxes: Sequence[Box]) -> Motion:
    """Measures of a drawn clip in [0, 1]; `boxes` say where the thing that moves is in each true frame."""
    true_places = np.array([box[:2] for box in boxes], np.float64)
    places = np.stack(
        [locate(frame, *_template(true, box)) for frame, true, box in zip(drawn, truth, boxes, strict=True)]
    )
    steps = np.diff(places, axis=0) - np.diff(true_places, axis=0)
    return Motion(
        displacement_error_px=float(np.linalg.norm(steps, axis=1).mean()),
        position_error_px=float(np.linalg.norm(places - true_places, axis=1).mean()),
        psnr_db=float(psnr_db(drawn[1:], truth[1:]).mean()),
        flicker=flicker(drawn, truth),
    )


def standing_still(truth: Frames) -> Frames:
    """The first frame, repeated."""
    return np.broadcast_to(truth[:1], truth.shape)


def locate(
    frame: Float[np.ndarray, "S S 3"], template: Float[np.ndarray, "h w 3"], inset: tuple[int, int]
) -> Float[np.ndarray, " 2"]:
    """x and y in `frame` of the point that lies `inset` (x, y) into the template, where that fits best.

    To a fraction of a pixel: a parabola through the best place and its neighbours.
    """
    height, width = template.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(frame, (height, width), axis=(0, 1))  # [y x 3 h w]
    crossed = np.einsum("yxchw,hwc->yx", windows, template)
    squares = np.einsum("yxchw->yx", np.lib.stride_tricks.sliding_window_view(frame**2, (height, width), axis=(0, 1)))
    differences = squares - 2 * crossed + np.square(template).sum()
    y, x = np.unravel_index(np.argmin(differences), differences.shape)
    return np.array([x + _vertex(differences[y], int(x)), y + _vertex(differences[:, x], int(y))]) + inset


def flicker(drawn: Frames, truth: Frames) -> float:
    """Mean change from frame to frame, in grey levels of 255, of pixels that do not change in the true clip."""
    still = (np.diff(truth, axis=0) == 0).all(-1)
    changes = np.abs(np.diff(drawn, axis=0)).mean(-1)
    return float(GREY_LEVELS * changes[still].mean()) if still.any() else 0.0


def _template(frame: Float[np.ndarray, "S S 3"], box: Box) -> tuple[np.ndarray, tuple[int, int]]:
    """The thing with a margin, as far as the frame reaches, and how far into that the box begins."""
    left, top, right, bottom = box
    from_left, from_top = max(0, left - MARGIN), max(0, top - MARGIN)
    cut = frame[from_top : bottom + MARGIN, from_left : right + MARGIN]
    return cut.astype(np.float64), (left - from_left, top - from_top)


def _vertex(values: Float[np.ndarray, " n"], at: int) -> float:
    """How far from its least value, at `at`, a parabola through it and its neighbours has its minimum."""
    if not 0 < at < len(values) - 1:
        return 0.0
    before, least, after = values[at - 1 : at + 2]
    bend = before - 2 * least + after
    return float(0.5 * (before - after) / bend) if bend > 0 else 0.0
