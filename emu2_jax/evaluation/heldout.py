"""Held-out image-text pairs: how well the model reads, foresees and redraws images that it was not trained on.

Every number stands beside one that a model without the skill would get: captions scored given another sample's image,
the constant embedding and the constant image that fit the evaluated samples best.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion import decoder as decoder_lib
from emu2_jax.generation.generator import Generator
from emu2_jax.models.emu2 import PretrainTask, encode_images
from emu2_jax.sequence import RowShape, empty_batch
from emu2_jax.task import Params
from emu2_jax.tokenizer import Tokenizer

BATCH_ROWS = 32

T = TypeVar("T")
R = TypeVar("R")


class Pair(NamedTuple):
    """A held-out image with its true caption."""

    key: str
    image: UInt8[np.ndarray, "S S 3"]
    caption: str


@dataclasses.dataclass(frozen=True)
class Reading:
    """Teacher-forced scores and free-running output of the language model, one entry per pair."""

    nll: Float[np.ndarray, " pairs"]  # nats, summed over the caption's tokens and </s>
    nll_shuffled: Float[np.ndarray, " pairs"]  # the same, given another pair's image
    num_tokens: Float[np.ndarray, " pairs"]
    generated: list[str]  # greedy captions
    visual_mse: Float[np.ndarray, " pairs"]  # image after its caption, true embeddings fed back
    visual_mse_free_running: Float[np.ndarray, " pairs"]  # the model's own embeddings fed back
    visual_mse_mean: float  # predicting, at each position, the mean embedding of these pairs
    drawn_embeddings: Float[np.ndarray, "pairs N E"]  # regressed from the captions


def read(config: ExperimentConfig, params: Params, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Reading:
    """Score and generate captions, and score and generate visual embeddings, for each pair."""
    images = [pair.image for pair in pairs]
    captions = [pair.caption for pair in pairs]
    # Each pair gets its predecessor's image: no pair keeps its own.
    others = images[-1:] + images[:-1]
    score = _scorer(config, params, tokenizer)
    own = score(images, captions, image_first=True)
    shuffled = score(others, captions, image_first=True)
    drawn = score(images, captions, image_first=False)
    targets = _embeddings(config, params, images)
    generator = Generator(config.model, params, tokenizer, max_batch=BATCH_ROWS)
    generated = generator.text([[image] for image in images], max_tokens=config.evaluation.max_text_tokens)
    predicted = generator.image_embeddings([[caption] for caption in captions])
    return Reading(
        nll=own["nll"],
        nll_shuffled=shuffled["nll"],
        num_tokens=own["num_tokens"],
        generated=generated,
        visual_mse=drawn["visual_mse"],
        visual_mse_free_running=np.square(predicted - targets).mean((1, 2)),
        visual_mse_mean=float(np.square(targets - targets.mean(0)).mean()),
        drawn_embeddings=predicted,
    )


def caption_rows(
    tokenizer: Tokenizer,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    visual_tokens: int,
    image_first: bool,
    length: int,
) -> dict[str, np.ndarray]:
    """One document per row (fields of `emu2_jax.sequence`), only the second of image and caption carrying loss.

    Image first: "<s> [IMG] v v [/IMG] caption </s>", loss on caption and </s>. Caption first: "<s> caption [IMG] v v
    [/IMG] </s>", loss on the embeddings.
    """
    size = images[0].shape[0]
    rows = empty_batch(len(images), RowShape(length, 1, visual_tokens, size), tokenizer.pad_id)
    picture = [tokenizer.image_start_id, *[tokenizer.image_id] * visual_tokens, tokenizer.image_end_id]
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        text = tokenizer.encode_plain(caption)
        body = picture + text if image_first else text + picture
        ids = np.array([tokenizer.bos_id, *body, tokenizer.eos_id])
        own = slice(0, len(ids))
        is_visual = ids == tokenizer.image_id
        rows["tokens"][row, own] = ids
        rows["segment_ids"][row, own] = 1
        rows["positions"][row, own] = np.arange(len(ids))
        rows["is_visual"][row, own] = is_visual
        rows["visual_index"][row, own][is_visual] = np.arange(visual_tokens)
        rows["loss_weights"][row, own] = np.arange(len(ids)) > len(picture) if image_first else is_visual
        rows["images"][row, 0] = image
        rows["image_mask"][row, 0] = True
    return rows


def _scorer(
    config: ExperimentConfig, params: Params, tokenizer: Tokenizer
) -> Callable[..., dict[str, Float[np.ndarray, " pairs"]]]:
    """Per-pair sums of the training objective itself, on one document a row."""
    objective = dataclasses.replace(config.objective, regression_loss_weight=1.0, visual_input_noise=0.0)
    scored = dataclasses.replace(config, objective=objective)
    task = PretrainTask(scored, image_start_id=tokenizer.image_start_id, image_end_id=tokenizer.image_end_id)

    @jax.jit
    def score(params: Params, rows: dict[str, Array]) -> dict[str, Array]:
        def one(row: dict[str, Array]) -> dict[str, Array]:
            out = task.losses(params, jax.tree.map(lambda x: x[None], row), jax.random.key(0))
            text, error = out.terms["text"], out.metrics["regression_mse"]
            return {
                "nll": text.sum,
                "num_tokens": text.weight,
                "visual_mse": error.sum / jnp.maximum(error.weight, 1),
            }

        return jax.lax.map(one, rows, batch_size=BATCH_ROWS)

    def run(
        images: Sequence[np.ndarray], captions: Sequence[str], *, image_first: bool
    ) -> dict[str, Float[np.ndarray, " pairs"]]:
        longest = max(tokenizer.count_plain(captions))
        visual_tokens = config.model.num_visual_tokens
        rows = caption_rows(
            tokenizer,
            images,
            captions,
            visual_tokens=visual_tokens,
            image_first=image_first,
            length=longest + visual_tokens + 4,
        )
        return jax.device_get(score(params, rows))

    return run


def _embeddings(config: ExperimentConfig, params: Params, images: Sequence[np.ndarray]) -> np.ndarray:
    encode = jax.jit(functools.partial(encode_images, config.model))
    return np.stack(
        _in_batches(lambda batch: list(np.asarray(encode(params["visual_encoder"], jnp.stack(batch)))), images)
    )


def _in_batches(function: Callable[[list[T]], list[R]], items: Sequence[T]) -> list[R]:
    """`function` of batches of equal size, so that it is compiled once; the last batch is filled up and cut."""
    results: list[R] = []
    for start in range(0, len(items), BATCH_ROWS):
        batch = list(items[start : start + BATCH_ROWS])
        filled = batch + [batch[-1]] * (BATCH_ROWS - len(batch) if start else 0)
        results += function(filled)[: len(batch)]
    return results


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What the visual decoder makes of the pairs, images in [0, 1]."""

    autoencoded: Float[np.ndarray, "pairs S S 3"]  # from the encoder's embeddings of the image itself
    drawn: Float[np.ndarray, "pairs S S 3"]  # from embeddings that the language model regressed from the caption
    psnr_db: Float[np.ndarray, " pairs"]  # autoencoded against the image
    psnr_mean_db: Float[np.ndarray, " pairs"]  # the mean of these images against each image


def draw(
    config: ExperimentConfig,
    params: Params,
    pairs: Sequence[Pair],
    drawn_embeddings: Float[np.ndarray, "drawn N E"],
    null_embeddings: Float[np.ndarray, "N E"],
) -> Drawing:
    """Autoencode every pair's image, and draw the first pairs from `drawn_embeddings`.

    `null_embeddings` is what the language model regresses for an empty prompt: guidance steers away from it.
    """
    originals = np.stack([pair.image for pair in pairs])
    seeds = itertools.count()

    def key() -> Array:
        return jax.random.fold_in(jax.random.key(0), next(seeds))

    autoencoded = _in_batches(
        lambda batch: list(np.asarray(decoder_lib.autoencode(config, params, jnp.stack(batch), key()))),
        list(originals),
    )
    drawn = _in_batches(
        lambda batch: list(
            np.asarray(decoder_lib.sample(config, params, jnp.stack(batch), jnp.asarray(null_embeddings)[None], key()))
        ),
        list(drawn_embeddings),
    )
    truth = originals.astype(np.float32) / 255.0
    return Drawing(
        autoencoded=np.stack(autoencoded),
        drawn=np.stack(drawn),
        psnr_db=psnr_db(np.stack(autoencoded), truth),
        psnr_mean_db=psnr_db(np.broadcast_to(truth.mean(0), truth.shape), truth),
    )


def psnr_db(
    image: Float[np.ndarray, "pairs S S 3"], truth: Float[np.ndarray, "pairs S S 3"]
) -> Float[np.ndarray, " pairs"]:
    """Peak signal-to-noise ratio of images in [0, 1], decibels. One grey level off everywhere gives 48.1 dB."""
    error = np.square(image.astype(np.float64) - truth).mean((1, 2, 3))
    return -10.0 * np.log10(np.maximum(error, 1e-12))
