"""Writes frames as an animation that browsers show."""

from __future__ import annotations

import fractions
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.corpora.openmoji_motion import encode_mp4
from emu2_jax.errors import UserError

#: Suffix -> the writer's name and settings. Pillow's PNG with several pictures is an APNG.
PILLOW: Mapping[str, tuple[str, Mapping[str, object]]] = {
    ".gif": ("GIF", {"disposal": 1}),
    ".webp": ("WEBP", {"lossless": True}),
    ".png": ("PNG", {}),
}
SUFFIXES = frozenset({*PILLOW, ".mp4"})


def check_new_animation(path: Path) -> None:
    """Raise `UserError` unless an animation can be written at `path` without overwriting anything."""
    if path.exists():
        raise UserError(f"{path}: exists already; give another name")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: wanted a name for an animation, that ends in one of {', '.join(sorted(SUFFIXES))}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: is no directory to write an animation into")


def write_animation(path: Path, frames: UInt8[np.ndarray, "T H W 3"], seconds_per_frame: float) -> None:
    """Write frames, shown again and again, in the format that the suffix says; in one piece or not at all."""
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        data = encode_mp4(list(frames), fractions.Fraction(1 / seconds_per_frame).limit_denominator(1000))
    else:
        name, settings = PILLOW[suffix]
        first, *others = [Image.fromarray(frame) for frame in frames]
        file = io.BytesIO()
        first.save(
            file,
            name,
            save_all=True,
            append_images=others,
            duration=round(1000 * seconds_per_frame),
            loop=0,
            **settings,
        )
        data = file.getvalue()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
