"""Measures of likeness on images whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import CONFIG, random_parameters

from emu2_jax.evaluation.autoencoding import contact_sheet, cosine, likeness, psnr_db, ssim, to_uint8
from emu2_jax.models.emu2 import init_visual_encoder


def images(seed: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_psnr_of_one_grey_level() -> None:
    image = np.full((2, 4, 4, 3), 0.5)
    np.testing.assert_allclose(psnr_db(image + 1 / 255, image), 20 * np.log10(255), rtol=1e-9)
    assert (psnr_db(image, image) == 120.0).all()  # bounded, not infinite


def test_ssim_of_flat_and_of_equal_images() -> None:
    """Flat images have no structure: what is left is (2 a b + c) / (a^2 + b^2 + c), with c = 0.01^2."""
    a, b, c = 0.2, 0.6, 1e-4
    flat = [np.full((1, 16, 16, 3), value, np.float32) for value in (a, b)]
    np.testing.assert_allclose(ssim(*flat), (2 * a * b + c) / (a * a + b * b + c), rtol=1e-4)
    noise = images(0).astype(np.float32) / 255
    np.testing.assert_allclose(ssim(noise, noise), 1.0, atol=1e-5)
    assert (ssim(noise, images(1).astype(np.float32) / 255) < 0.2).all()


def test_cosine_is_of_each_place() -> None:
    a = np.array([[[1.0, 0.0], [0.0, 2.0]]])
    b = np.array([[[3.0, 0.0], [4.0, 0.0]]])
    np.testing.assert_allclose(cosine(a, b), [(1 + 0) / 2])


def test_likeness_stands_beside_what_a_naive_drawing_gets() -> None:
    params = random_parameters(lambda key: init_visual_encoder(CONFIG.model, key))
    originals = images(0)
    same = likeness(CONFIG.model, params, originals, originals, {"zero": lambda a, b: np.zeros(len(a))}, batch=2)
    means = same.means()
    assert means["embedding_cosine"] == pytest.approx(1.0, abs=1e-5) and means["embedding_cosine_other"] < 0.999
    assert means["ssim"] == pytest.approx(1.0, abs=1e-5) and means["ssim_mean"] < 0.9
    assert means["psnr_db"] == 120.0 and means["psnr_mean_db"] < 15
    assert means["zero"] == 0.0


def test_a_contact_sheet_has_original_and_drawing_side_by_side() -> None:
    sheet = np.asarray(contact_sheet(images(0), images(1), columns=2))
    assert sheet.shape == (2 * 20, 2 * 38, 3)
    np.testing.assert_array_equal(sheet[2:18, 2:18], images(0)[0])
    np.testing.assert_array_equal(sheet[2:18, 20:36], images(1)[0])
    np.testing.assert_array_equal(sheet[22:38, 2:18], images(0)[2])
    assert (sheet[22:38, 38:] == 255).all()


def test_pixels_are_rounded_and_clipped() -> None:
    assert to_uint8(np.array([-1.0, 0.5, 0.999, 2.0])).tolist() == [0, 128, 255, 255]
