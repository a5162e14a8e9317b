"""The parameters of the tiny Emu2."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from tiny_weights import CLIP_MODEL

from emu2_jax.models import emu2


@pytest.fixture(scope="session")
def params() -> dict[str, Any]:
    """Random parameters of the tiny model."""
    return dict(tiny.random_parameters(lambda key: emu2.init(tiny.CONFIG.model, key)))


@pytest.fixture(scope="session")
def clip_params() -> dict[str, Any]:
    """Random parameters of the tiny encoder of the CLIP family."""
    params = tiny.random_parameters(lambda key: emu2.init(CLIP_MODEL, key))
    return {"visual_encoder": params["visual_encoder"]}
