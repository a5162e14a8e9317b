"""The cases of `benchmarks.pods` are what they say, before anything is compiled."""

from __future__ import annotations

import pytest

from benchmarks.pods import CASES
from emu2_jax.pods.topologies import find
from experiments.inputs import example_shapes, make_task


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("lm33b")])
def test_the_language_model_alone_has_the_peers_flops(name: str) -> None:
    config = CASES[name].config
    shapes = {field: dims for field, (dims, _) in example_shapes(config).items()}
    rows, length = shapes["tokens"]
    per_token = make_task(config, None).model_flops(shapes) / (rows * length)
    assert per_token == pytest.approx(198.8e9, rel=3e-4)


def test_names_say_the_number_of_chips_and_slots() -> None:
    for name, case in CASES.items():
        generation, chips = name.split("-")[1:3]
        assert (find(case.topology).generation.name, find(case.topology).chips) == (generation, int(chips))
        slots = name.partition("slots")[0].rpartition("-")[2] if name.endswith("slots") else None
        assert slots is None or case.config.data.image_slots == int(slots)
