"""`emu2 plan`: refusals, the search's points, and a small step through the real TPU compiler where it is installed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import fail

from emu2_jax.errors import ConfigError
from emu2_jax.pods import topologies
from emu2_jax.pods.topologies import find, find_compiler
from experiments import plan as plan_lib
from experiments import recipes
from experiments.inputs import source_shapes

needs_libtpu = pytest.mark.skipif(
    not find_compiler(), reason="libtpu, the TPU compiler, is not installed: `make libtpu` does it"
)


def test_an_unknown_topology_gets_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    line = fail(["plan", "emu2_37b_stage2", "--topology", "v5p-100"], capsys)
    assert line.startswith("emu2: --topology: no slice is called 'v5p-100'; nearest: v5p-128;")


def test_without_the_compiler_one_line_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topologies, "find_compiler", lambda: False)
    line = fail(["plan", "emu2_37b_stage2", "--topology", "v5p-128"], capsys)
    assert line.startswith("emu2: plan: the TPU compiler, libtpu, is not installed; `make libtpu` or")


def test_every_source_has_a_batch_shape_of_its_own() -> None:
    shapes = source_shapes(recipes.get("emu2_37b_stage2"))
    assert list(shapes) == ["image_text", "grounded", "video_text", "mmc4", "storyboard", "text"]
    assert shapes["mmc4"]["images"][0] == (1600, 16, 448, 448, 3)
    assert shapes["text"]["images"][0] == (832, 0, 448, 448, 3)


def test_parameters_are_not_sharded_across_slices() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.data: is 1, .* --gin\.mesh\.data=2"):
        plan_lib.plan(recipes.get("emu2_37b_stage2"), find("v5p-128", 2), devices=[])


def test_a_source_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="--source: 'laion' is none of this recipe's: image_text, "):
        plan_lib.plan(recipes.get("emu2_37b_stage2"), find("v5p-128"), source="laion", devices=[])


def test_the_search_tries_what_divides_every_batch() -> None:
    config = recipes.get("openmoji_tiny_stage2")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch_rows=16))
    points = plan_lib.candidates(config, find("v5p-8"))
    assert {point.accumulation_steps for point in points if point.tensor == 1} == {4, 2, 1}
    assert {point.accumulation_steps for point in points if point.tensor == 2} == {8, 4, 2, 1}
    assert points[0].remat == "full"
    applied = points[0].apply(config)
    assert (applied.model.remat, applied.optimizer.accumulation_steps) == ("full", 4)


@needs_libtpu
def test_the_step_of_a_recipe_compiles_for_a_slice_that_is_not_there(tmp_path: Path) -> None:
    arguments = ["plan", "openmoji_tiny_stage2", "--topology", "v5p-8", "--json", str(tmp_path / "plan.json")]
    arguments += ["--hlo", str(tmp_path / "hlo"), "--save", str(tmp_path / "steps")]
    arguments += ["--gin.model.language.num_layers=2", "--gin.model.vision.num_layers=2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    assert found["chips"] == 4
    assert found["mesh"]["fsdp"] == 4
    assert 0 < found["peak_hbm_gib"] < found["hbm_gib"] < 96
    assert found["compiled_over_model_flops"] > 1
    assert {loop["trips"] for loop in found["cost"]["loops"]} >= {2}
    assert None not in {loop["trips"] for loop in found["cost"]["loops"]}
    assert {collective["kind"] for collective in found["cost"]["collectives"]} >= {"all-gather"}
    assert len(list((tmp_path / "hlo").iterdir())) == 1
    assert len(list((tmp_path / "steps").iterdir())) == 2
