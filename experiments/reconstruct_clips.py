"""Redraw videos from the embeddings of their frames, as an animation: originals on the left, redrawn on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.clips import Clip, decode_clip
from data_pipelines.kinds import SampleError
from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion.video import autoencode_clips
from emu2_jax.errors import DataError
from experiments.animation import check_new_animation, write_animation
from experiments.inputs import timing
from experiments.runs import load_params


def reconstruct_clips(workdir: Path, config: ExperimentConfig, videos: Sequence[Path], out: Path) -> None:
    """Write one animation of all videos, one below the other, in the time of the first."""
    check_new_animation(out)
    clips = [_read_clip(path, config) for path in videos]
    params = load_params(workdir, config)
    originals = np.stack([clip.frames for clip in clips])
    redrawn = np.asarray(autoencode_clips(config, params, jnp.asarray(originals), jax.random.key(0)))
    pairs = np.concatenate([originals, np.round(redrawn * 255).astype(np.uint8)], axis=3)  # [clip, frame, y, x, colour]
    write_animation(out, np.concatenate(list(pairs), axis=1), clips[0].seconds_per_frame)
    print(out)


def _read_clip(path: Path, config: ExperimentConfig) -> Clip:
    try:
        return decode_clip(path.read_bytes(), config.decoder.image_size, timing(config))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except SampleError as error:
        raise DataError(f"{path}: is no video of which a clip can be made: {error}") from error
