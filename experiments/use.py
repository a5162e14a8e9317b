"""Use a trained run from the command line: continue a prompt, draw an image, redraw images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from data_pipelines.images import decode_image
from data_pipelines.kinds import VIDEO_SUFFIXES, SampleError
from emu2_jax.diffusion import decoder as decoder_lib
from emu2_jax.errors import DataError, UserError
from emu2_jax.generate import Generator, Link
from experiments.evaluate import DECODER_STAGE, MODEL_STAGE
from experiments.inputs import open_tokenizer
from experiments.reconstruct_clips import reconstruct_clips
from experiments.runs import CONFIG, load_config, load_params

VIDEO_STAGE = "video"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})


def generate(run: Path, prompt: Sequence[str], *, image_file: Path | None, max_tokens: int) -> None:
    """Continue the prompt with text (printed), or with an image (written to `image_file`)."""
    stage = run if (run / CONFIG).exists() else run / MODEL_STAGE  # a work directory, or a run that holds several
    config = load_config(stage)
    links = [_link(link, config.model.vision.image_size) for link in prompt]
    if max_tokens < 1:
        raise UserError(f"--max_tokens: got {max_tokens}, wanted at least 1")
    if image_file is not None:
        _check_new_picture(image_file)
    params = load_params(stage, config)
    generator = Generator(config.model, params, open_tokenizer(config))
    if image_file is None:
        print(generator.text([links], max_tokens=max_tokens)[0])
        return
    decoder_config = load_config(run / DECODER_STAGE)
    decoder_params = load_params(run / DECODER_STAGE, decoder_config)
    embeddings, null = (jnp.asarray(generator.image_embeddings([prompt])) for prompt in (links, []))
    image = decoder_lib.sample(decoder_config, decoder_params, embeddings, null, jax.random.key(0))
    _save(np.asarray(image[0]), image_file)


def reconstruct(run: Path, images: Sequence[Path], out: Path) -> None:
    """Write one picture: the images above, what the decoder makes of their embeddings below.

    Videos are taken by a video decoder and give an animation (`reconstruct_clips`). `run` is a work directory, or a
    run that holds several.
    """
    videos = [path for path in images if path.suffix.lower().removeprefix(".") in VIDEO_SUFFIXES]
    stage = run if (run / CONFIG).exists() else run / (VIDEO_STAGE if videos else DECODER_STAGE)
    config = load_config(stage)
    if config.train.task == "video_decoder":
        reconstruct_clips(stage, config, images, out)
        return
    if videos:
        raise UserError(f"{videos[0]}: is a video, and {stage} draws images; give a video decoder's work directory")
    _check_new_picture(out)
    originals = np.stack([_read_image(path, config.decoder.image_size) for path in images])
    params = load_params(stage, config)
    redrawn = np.asarray(decoder_lib.autoencode(config, params, jnp.asarray(originals), jax.random.key(0)))
    rows = [np.concatenate(list(row), axis=1) for row in (originals / 255.0, redrawn)]
    _save(np.concatenate(rows, axis=0), out)


def _check_new_picture(path: Path) -> None:
    """Raise `UserError` unless a picture can be written at `path` without overwriting anything."""
    if path.exists():
        raise UserError(f"{path}: exists already; give another name")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: wanted a name that ends in one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: is no directory to write a picture into")


def _link(text: str, image_size: int) -> Link:
    """A prompt link: the name of an image file stands for the image, anything else for itself."""
    path = Path(text)
    return _read_image(path, image_size) if path.suffix.lower() in IMAGE_SUFFIXES else text


def _read_image(path: Path, image_size: int) -> np.ndarray:
    try:
        return decode_image(path.read_bytes(), image_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except SampleError as error:
        raise DataError(f"{path}: is not an image that can be decoded: {error}") from error


def _save(image: np.ndarray, path: Path) -> None:
    Image.fromarray(np.round(image * 255).astype(np.uint8)).save(path)
    print(path)
