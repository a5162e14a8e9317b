"""A tiny Emu2 as files under every name."""

from __future__ import annotations

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
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A safetensors file, written by the library."""
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


def save_form(path: Path, params: dict[str, Any], form: Form, dtype: Any = np.float32) -> Path:
    """The parameters as one file of a form."""
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    return save(path, to_state_dict(cast, table(form, MODEL)))
