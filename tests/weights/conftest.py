"""The parameters of the tiny Emu2."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from emu2_jax.models import emu2


@pytest.fixture(scope="session")
def params() -> dict[str, Any]:
    """Random parameters of the tiny model."""
    return dict(tiny.random_parameters(lambda key: emu2.init(tiny.CONFIG.model, key)))
