"""How much of an image survives encoding and drawing it again: measures of likeness, each beside a naive drawing's.

PSNR and SSIM compare pixels. The embedding cosine encodes the redrawn image once more and compares what the encoder
sees: it is to this model's encoder what CLIP-I is to CLIP's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from emu2_jax.config import ExperimentConfig, ModelConfig
from emu2_jax.diffusion import decoder as decoder_lib
from emu2_jax.models.emu2 import encode_images
from emu2_jax.task import Params

#: What else compares images: originals and redrawn ones to one number each.
Measure = Callable[[UInt8[np.ndarray, "B S S 3"], UInt8[np.ndarray, "B S S 3"]], Float[np.ndarray, " B"]]

SSIM_WINDOW = 11  #: pixels; Source: Wang et al. 2004
GAP = 2  #: pixels between the pictures of a sheet


@dataclasses.dataclass(frozen=True)
class Likeness:
    """Measures of redrawn images against their originals, one entry per image."""

    psnr_db: Float[np.ndarray, " images"]
    ssim: Float[np.ndarray, " images"]
    embedding_cosine: Float[np.ndarray, " images"]
    psnr_mean_db: Float[np.ndarray, " images"]  #: had the mean of these images been drawn for each
    ssim_mean: Float[np.ndarray, " images"]  #: the same
    embedding_cosine_other: Float[np.ndarray, " images"]  #: of each image and another one of them
    more: dict[str, Float[np.ndarray, " images"]]  #: measures that need weights of the user's

    def means(self) -> dict[str, float]:
        """The mean of every measure, by name."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "more"}
        return {name: float(values.mean()) for name, values in {**own, **self.more}.items()}


def redraw(
    config: ExperimentConfig,
    params: Params,
    images: UInt8[np.ndarray, "images S S 3"],
    *,
    seed: int = 0,
    batch: int = 32,
) -> UInt8[np.ndarray, "images S S 3"]:
    """What the decoder makes of the images' embeddings, as 8-bit pixels."""
    drawn = []
    for number, filled, count in _batches(images, batch):
        key = jax.random.fold_in(jax.random.key(seed), number)
        out = decoder_lib.autoencode(config, params, jnp.asarray(filled), key)
        drawn.append(to_uint8(np.asarray(out[:count])))
    return np.concatenate(drawn)


def likeness(
    config: ModelConfig,
    visual_encoder_params: Params,
    originals: UInt8[np.ndarray, "images S S 3"],
    redrawn: UInt8[np.ndarray, "images S S 3"],
    measures: Mapping[str, Measure] | None = None,
    *,
    batch: int = 32,
) -> Likeness:
    """Compare each redrawn image with its original. There must be at least two, and 11 pixels on a side."""
    truth, drawn = (images.astype(np.float32) / 255.0 for images in (originals, redrawn))
    mean = np.broadcast_to(truth.mean(0), truth.shape)
    encode = jax.jit(functools.partial(encode_images, config))

    def embeddings(images: UInt8[np.ndarray, "images S S 3"]) -> Float[np.ndarray, "images N E"]:
        parts = [
            np.asarray(encode(visual_encoder_params, jnp.asarray(filled)))[:count]
            for _, filled, count in _batches(images, batch)
        ]
        return np.concatenate(parts)

    seen, seen_again = embeddings(originals), embeddings(redrawn)
    return Likeness(
        psnr_db=psnr_db(drawn, truth),
        ssim=ssim(drawn, truth),
        embedding_cosine=cosine(seen_again, seen),
        psnr_mean_db=psnr_db(mean, truth),
        ssim_mean=ssim(mean, truth),
        embedding_cosine_other=cosine(np.roll(seen, 1, axis=0), seen),
        more={name: measure(originals, redrawn) for name, measure in (measures or {}).items()},
    )


def _batches(images: np.ndarray, batch: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(number, batch, how many of it count): all of one size where there are several, for one compilation."""
    for number, start in enumerate(range(0, len(images), batch)):
        own = images[start : start + batch]
        fill = batch - len(own) if start else 0
        yield number, np.concatenate([own, np.repeat(own[-1:], fill, axis=0)]), len(own)


def psnr_db(
    image: Float[np.ndarray, "images S S 3"], truth: Float[np.ndarray, "images S S 3"]
) -> Float[np.ndarray, " images"]:
    """Peak signal-to-noise ratio of images in [0, 1], decibels. One grey level off everywhere gives 48.1 dB."""
    error = np.square(image.astype(np.float64) - truth).mean((1, 2, 3))
    return -10.0 * np.log10(np.maximum(error, 1e-12))


def ssim(
    image: Float[np.ndarray, "images S S 3"], truth: Float[np.ndarray, "images S S 3"]
) -> Float[np.ndarray, " images"]:
    """Structural similarity of images in [0, 1], mean over windows of 11 x 11 (Gaussian, 1.5) and colours."""
    return np.array([_ssim(*pair) for pair in zip(image, truth, strict=True)], np.float64)


#: Of one pair; compiled once for each size, however often pictures are measured.
_ssim = jax.jit(functools.partial(dm_pix.ssim, filter_size=SSIM_WINDOW))


def cosine(a: Float[np.ndarray, "images N E"], b: Float[np.ndarray, "images N E"]) -> Float[np.ndarray, " images"]:
    """Cosine of the angle between two embeddings of one place, mean over the N places."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return ((a * b).sum(-1) / np.maximum(norms, 1e-12)).mean(-1)


def contact_sheet(
    originals: UInt8[np.ndarray, "images S S 3"], redrawn: UInt8[np.ndarray, "images S S 3"], *, columns: int = 8
) -> Image.Image:
    """Pairs of pictures side by side, an original and what was drawn, row after row, on white."""
    count, size = len(originals), originals.shape[1]
    columns = min(columns, count)
    rows = -(-count // columns)
    width, height = 2 * size + 3 * GAP, size + 2 * GAP
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, pair in enumerate(zip(originals, redrawn, strict=True)):
        top, left = i // columns * height + GAP, i % columns * width + GAP
        for picture in pair:
            sheet[top : top + size, left : left + size] = picture
            left += size + GAP
    return Image.fromarray(sheet)


def to_uint8(images: Float[np.ndarray, "*axes"] | Array) -> UInt8[np.ndarray, "*axes"]:
    """Images in [0, 1] as 8-bit pixels."""
    return np.round(np.clip(np.asarray(images), 0, 1) * 255).astype(np.uint8)
