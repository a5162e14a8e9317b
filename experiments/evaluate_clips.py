"""Evaluate a video decoder on moving emoji that it was not trained on, and draw them as animations.

Held-out clips are composed anew from the settings of the corpus that the run trained on, exact to the pixel, with the
place of the moving drawing in every frame. Beside the video decoder stand the clip at rest, and the image decoder that
the run started from, frame by frame: with noise of each frame's own, and with one noise for all frames of a clip.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from data_pipelines.clips import clip_numbers
from data_pipelines.corpora.openmoji import OpenMojiSettings, heldout_clips, settings_of
from data_pipelines.corpora.openmoji_motion import FRAMES_PER_SECOND, Clip
from data_pipelines.corpora.openmoji_scenes import render
from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion import decoder as decoder_lib
from emu2_jax.diffusion.video import autoencode_clips
from emu2_jax.errors import CheckpointError, ConfigError, DataError
from emu2_jax.evaluation import motion
from emu2_jax.report import page_environment, write_page
from experiments.animation import write_animation
from experiments.inputs import timing
from experiments.runs import CONFIG, load_config, load_params

FOLDER = "evaluation"
TEMPLATE = "evaluate_clips.html.jinja"
BATCH_CLIPS = 8

Split = Literal["scenes", "unseen"]
SPLITS: Mapping[Split, str] = {
    "scenes": "emoji seen in training, in pairs or places that it never shows",
    "unseen": "emoji that training never shows",
}
#: Who draws, as the page and the numbers name it.
VIDEO, IMAGE, IMAGE_ONE_NOISE, STILL = "video", "image", "image_one_noise", "still"
DRAWN_BY: Mapping[str, str] = {
    VIDEO: "the video decoder",
    IMAGE: "the image decoder it started from, frame by frame",
    IMAGE_ONE_NOISE: "the same, one noise for all frames of a clip",
    STILL: "the true first frame, repeated",
}

#: Draws clips [clips T S S 3] from themselves, in [0, 1].
Draw = Callable[[UInt8[np.ndarray, "B T S S 3"], jax.Array], np.ndarray]


def evaluate_clips(workdir: Path, *, num_clips: int | None = None) -> dict[Split, dict[str, dict[str, float]]]:
    """Measure the video decoder in `workdir`: split -> who draws -> measure -> mean over clips.

    Writes WORKDIR/evaluation/clips.{json,html} and animations. `num_clips` of each split, `evaluation.num_samples` by
    default. Raises `UserError` for a run that is no video decoder's, or was not trained on an OpenMoji corpus.
    """
    config = load_config(workdir)
    if config.train.task != "video_decoder":
        raise ConfigError(f"{workdir}: train.task is {config.train.task}, wanted video_decoder")
    settings = _corpus(config)
    draw = _drawers(workdir, config)
    num = config.evaluation.num_samples if num_clips is None else num_clips
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    numbers: dict[Split, dict[str, dict[str, float]]] = {}
    pictures: list[dict[str, Any]] = []
    with tqdm(total=len(SPLITS) * num, desc="evaluate", unit="clip") as progress:
        for split in SPLITS:
            clips = heldout_clips(settings, num, unseen=split == "unseen")
            measured: dict[str, list[motion.Motion]] = {who: [] for who in (*draw, STILL)}
            for first in range(0, num, BATCH_CLIPS):
                batch = clips[first : first + BATCH_CLIPS]
                truth, boxes = _frames(batch, config)
                key = jax.random.fold_in(jax.random.key(0), first)
                drawn = {who: _filled(function, truth, key) for who, function in draw.items()}
                drawn[STILL] = np.stack([motion.standing_still(clip) for clip in truth / 255.0])
                for who, shown in drawn.items():
                    measured[who] += [motion.compare(*one) for one in zip(shown, truth / 255.0, boxes, strict=True)]
                wanted = max(0, min(len(batch), config.evaluation.num_pictures - first))
                pictures += [_animate(folder, split, first + i, batch[i], truth[i], drawn, i) for i in range(wanted)]
                progress.update(len(batch))
            numbers[split] = {who: _means(measures) for who, measures in measured.items()}
    _write(folder, config, numbers, pictures)
    return numbers


def is_video_decoder(workdir: Path) -> bool:
    """Whether this is the work directory of a video decoder."""
    return (workdir / CONFIG).exists() and load_config(workdir).train.task == "video_decoder"


def _corpus(config: ExperimentConfig) -> OpenMojiSettings:
    """Of the corpus CORPUS whose CORPUS/train/*.tar the run was trained on."""
    source = next(source for source in config.data.sources if source.kind == "video_text")
    settings = settings_of(Path(source.shards).parent.parent)
    if settings.image_size != config.decoder.image_size:
        raise DataError(
            f"data.sources.{source.name}.shards: the corpus has frames of {settings.image_size} px, the decoder draws "
            f"{config.decoder.image_size} (decoder.image_size); clips are compared pixel by pixel"
        )
    return settings


def _drawers(workdir: Path, config: ExperimentConfig) -> dict[str, Draw]:
    params = load_params(workdir, config)

    def together(clips: np.ndarray, key: jax.Array) -> np.ndarray:
        return np.asarray(autoencode_clips(config, params, jnp.asarray(clips), key))

    drawers: dict[str, Draw] = {VIDEO: together}
    try:
        image_workdir = Path(config.train.init_from or "")
        image_config = load_config(image_workdir)
        image_params = load_params(image_workdir, image_config)
    except CheckpointError:
        return drawers  # it started from weights, or from another machine's run
    if image_config.train.task != "decoder":
        return drawers

    def frame_by_frame(clips: np.ndarray, key: jax.Array) -> np.ndarray:
        flat = jnp.asarray(clips.reshape(-1, *clips.shape[2:]))
        return np.asarray(decoder_lib.autoencode(image_config, image_params, flat, key)).reshape(clips.shape)

    def with_one_noise(clips: np.ndarray, key: jax.Array) -> np.ndarray:
        frames = [
            decoder_lib.autoencode(image_config, image_params, jnp.asarray(clips[:, t]), key)
            for t in range(clips.shape[1])
        ]
        return np.stack(frames, axis=1)

    return {**drawers, IMAGE: frame_by_frame, IMAGE_ONE_NOISE: with_one_noise}


def _filled(draw: Draw, clips: np.ndarray, key: jax.Array) -> np.ndarray:
    """`draw` of a batch of always the same size, so that it is compiled once."""
    missing = BATCH_CLIPS - len(clips)
    return draw(np.concatenate([clips, clips[:1].repeat(missing, axis=0)]), key)[: len(clips)]


def _frames(clips: Sequence[Clip], config: ExperimentConfig) -> tuple[np.ndarray, list[list[motion.Box]]]:
    """The frames that the decoder draws of each clip, and the place of what moves in each."""
    times = np.arange(len(clips[0].frames)) / FRAMES_PER_SECOND
    numbers = clip_numbers(times, timing(config), 0.5).tolist()
    truth = np.stack([np.stack([render(clip.frames[number]) for number in numbers]) for clip in clips])
    return truth, [[clip.frames[number].objects[-1].boxes[0] for number in numbers] for clip in clips]


def _means(measures: Sequence[motion.Motion]) -> dict[str, float]:
    return {name: float(np.mean([getattr(one, name) for one in measures])) for name in asdict(measures[0])}


def _animate(
    folder: Path,
    split: Split,
    number: int,
    clip: Clip,
    truth: UInt8[np.ndarray, "T S S 3"],
    drawn: Mapping[str, np.ndarray],
    index: int,
) -> dict[str, Any]:
    """Write the true clip and the drawn ones as one animation, side by side, and as a sheet of all frames."""
    shown = [truth, *(np.round(drawn[who][index] * 255).astype(np.uint8) for who in drawn if who != STILL)]
    names = {}
    for suffix, frames in (
        (".gif", np.concatenate(shown, axis=2)),
        (".png", np.concatenate([np.concatenate(list(one), axis=1) for one in shown])[None]),
    ):
        names[suffix[1:]] = f"clip-{split}-{number:03d}{suffix}"
        write_animation(folder / names[suffix[1:]], frames, 2 / FRAMES_PER_SECOND)
    return {"split": split, "caption": clip.caption, **names}


def _write(
    folder: Path,
    config: ExperimentConfig,
    numbers: Mapping[Split, Mapping[str, Mapping[str, float]]],
    pictures: Sequence[Mapping[str, Any]],
) -> None:
    page = (
        page_environment(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(config=config, numbers=numbers, pictures=pictures, splits=SPLITS, drawn_by=DRAWN_BY)
    )
    write_page(folder / "clips.html", page)
    write_page(folder / "clips.json", json.dumps(numbers, indent=1) + "\n")
