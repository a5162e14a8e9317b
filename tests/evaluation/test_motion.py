"""Following what moves: known motions are found, in good and in bad drawings of them."""

from __future__ import annotations

import numpy as np
import pytest

from emu2_jax.evaluation.motion import compare, flicker, standing_still

SIZE, SIDE = 48, 12
PATH = [(3, 4), (9, 8), (15, 12), (21, 16), (30, 30)]  # left, top


def clip(places: list[tuple[float, float]], *, still: bool = True) -> np.ndarray:
    """A textured square moves over a plain ground, past another that stays; places between pixels are blended."""
    look = np.random.default_rng(0).random((SIDE, SIDE, 3))
    frames = np.full((len(places), SIZE, SIZE, 3), 0.3)
    for frame, (x, y) in zip(frames, places, strict=True):
        if still:
            frame[34:46, 2:14] = look[::-1]
        left, top = int(x), int(y)
        for dx, share_x in ((0, 1 - (x - left)), (1, x - left)):
            for dy, share_y in ((0, 1 - (y - top)), (1, y - top)):
                part = frame[top + dy : top + dy + SIDE, left + dx : left + dx + SIDE]
                part += share_x * share_y * (look - 0.3)
    return frames


BOXES = [(x, y, x + SIDE, y + SIDE) for x, y in PATH]
TRUTH = clip([(float(x), float(y)) for x, y in PATH])


def test_a_true_drawing_has_no_error() -> None:
    found = compare(TRUTH, TRUTH, BOXES)
    assert found.displacement_error_px < 0.05
    assert found.position_error_px < 0.05
    assert found.psnr_db > 100
    assert found.flicker == 0


def test_one_that_stands_still_has_the_true_displacement_as_its_error() -> None:
    steps = np.linalg.norm(np.diff(np.array(PATH), axis=0), axis=1)
    found = compare(standing_still(TRUTH), TRUTH, BOXES)
    assert found.displacement_error_px == pytest.approx(steps.mean(), abs=0.05)
    assert found.position_error_px == pytest.approx(np.linalg.norm(np.subtract(PATH, PATH[0]), axis=1).mean(), abs=0.05)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("shift", [(2.0, 0.0), (0.5, -1.5)])
def test_a_known_shift_is_found_also_under_noise(noise: float, shift: tuple[float, float]) -> None:
    shifted = [(x + shift[0], y + shift[1]) for x, y in PATH]
    drawn = clip(shifted) + np.random.default_rng(1).normal(0, noise, TRUTH.shape)
    found = compare(drawn, TRUTH, BOXES)
    assert found.position_error_px == pytest.approx(np.hypot(*shift), abs=0.25)
    assert found.displacement_error_px < 0.3  # all frames are off alike: it moves as it should


def test_a_frame_that_is_off_shows_in_two_steps() -> None:
    places = [(float(x), float(y)) for x, y in PATH]
    places[2] = (places[2][0] + 4, places[2][1])
    found = compare(clip(places), TRUTH, BOXES)
    assert found.displacement_error_px == pytest.approx(2 * 4 / 4, abs=0.1)
    assert found.position_error_px == pytest.approx(4 / 5, abs=0.1)


def test_flicker_is_of_pixels_that_do_not_change_in_truth() -> None:
    drawn = TRUTH.copy()
    drawn[1::2] += 10 / 255  # every second frame is lighter
    assert flicker(drawn, TRUTH) == pytest.approx(10)
    assert flicker(drawn, drawn) == 0  # every pixel changes
    moving = np.random.default_rng(0).random(TRUTH.shape)
    assert flicker(TRUTH, moving) == 0
