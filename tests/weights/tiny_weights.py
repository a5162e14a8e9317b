"""A tiny Emu2 as files under every name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
import tiny

from emu2_jax.config import ModelConfig
from emu2_jax.weights.names import Form, table
from emu2_jax.weights.state_dict import to_state_dict

MODEL: ModelConfig = tiny.CONFIG.model
#: The same with a visual encoder of the CLIP family.
CLIP_MODEL = dataclasses.replace(
    MODEL,
    vision=dataclasses.replace(
        MODEL.vision, block_norm="pre", k_bias=True, patch_bias=False, input_norm=True, final_norm=True
    ),
)
CLIP_FORMS: tuple[Form, ...] = ("vit_timm", "clip_hf", "clip_open_clip")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A safetensors file, written by the library."""
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


def model_of(form: Form) -> ModelConfig:
    """The tiny model with an encoder of the family that the form is of."""
    return CLIP_MODEL if form in CLIP_FORMS else MODEL


def save_form(path: Path, params: dict[str, Any], form: Form, dtype: Any = np.float32) -> Path:
    """The parameters as one file of a form."""
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    return save(path, to_state_dict(cast, table(form, model_of(form))))
