"""`emu2 plan`: refusals, the search's points, and a small step through the real TPU compiler where it is installed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from command import fail

from emu2_jax.errors import ConfigError
from emu2_jax.pods import topologies
from emu2_jax.pods.compiling import DoesNotFit
from emu2_jax.pods.topologies import find, find_compiler
from emu2_jax.train import build_program
from experiments import plan as plan_lib
from experiments import recipes
from experiments.inputs import make_task, source_shapes

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
    assert shapes["mmc4"]["images"][0] == (1536, 16, 448, 448, 3)
    assert shapes["text"]["images"][0] == (768, 0, 448, 448, 3)


@pytest.mark.parametrize(
    ("recipe", "name", "slices", "file"),
    [
        ("emu2_37b_stage2", "v5p-128", 1, "stage2_v5p_128.gin"),
        ("emu2_37b_stage1a", "v5e-256", 2, "stage1a_v5e_256_x2.gin"),
        ("emu2_37b_decoder_512", "v5e-256", 1, "decoder_v5e_256.gin"),
        ("openmoji_tiny_stage1", "v5e-4", 1, None),
    ],
)
def test_a_slice_has_settings_for_a_recipe_or_its_family(recipe: str, name: str, slices: int, file: str | None) -> None:
    found = plan_lib.slice_settings(recipe, find(name, slices))
    assert (None if found is None else found.name) == file


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


def test_a_plan_that_does_not_fit_says_how_much_is_missing_and_what_would_help() -> None:
    config = recipes.get("openmoji_tiny_stage2")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch_rows=32))
    program = build_program(make_task(config, None), config, jax.devices()[:1])
    refused = DoesNotFit(24 * 2**30, [], "RESOURCE_EXHAUSTED")
    line = plan_lib.refusal(config, find("v5e-4"), program, source_shapes(config)["all"], refused)
    head, _, advice = line.partition("; should fit with one of: ")
    assert head.startswith("openmoji_tiny_stage2 on v5e-4 (2x2, 4 chips): does not fit: 24.0 GiB of HBM needed, 15.75")
    assert [change.partition(" (")[0] for change in advice.split("; ")] == [
        "--gin.optimizer.accumulation_steps=2",
        "--gin.model.remat=full",
        "--topology v5e-8",
    ]


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    def point(us: float, peak: int) -> Any:
        return "settings", SimpleNamespace(us_per_unit=us, memory=SimpleNamespace(peak=peak))

    quick, between, small = point(500, 80), point(550, 60), point(700, 20)
    assert plan_lib.frontier([small, point(560, 70), quick, point(710, 20), between]) == [quick, between, small]


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
