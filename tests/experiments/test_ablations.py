"""Every ablation file applies to the recipe that it is written for, and changes something."""

from __future__ import annotations

from pathlib import Path

import pytest

import experiments
from emu2_jax import overrides
from emu2_jax.config import validate
from experiments import recipes

FILES = sorted((Path(experiments.__file__).parent / "ablations").glob("*.gin"))


@pytest.mark.parametrize("recipe", ["openmoji_tiny_stage2", "emu2_37b_stage2"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ablation(file: Path, recipe: str) -> None:
    base = recipes.get(recipe)
    config, provenance = overrides.apply(base, overrides.parse_file(file))
    validate(config)
    settings = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(overrides.diff(base, config)) == len(provenance) == len(settings) <= 5
