"""Names of slices, and what the compiler is told of them."""

from __future__ import annotations

import pytest

from emu2_jax.errors import ConfigError, UserError
from emu2_jax.pods import topologies
from emu2_jax.pods.topologies import find


def test_names_count_cores_or_chips_as_users_do() -> None:
    chips = {name: find(name).chips for name in ("v4-512", "v5p-128", "v5p-512", "v5e-256", "v6e-256")}
    assert chips == {"v4-512": 256, "v5p-128": 64, "v5p-512": 256, "v5e-256": 256, "v6e-256": 256}


@pytest.mark.parametrize("name", topologies.names())
def test_every_name_finds_itself(name: str) -> None:
    assert find(name).name == name
    assert find(name).hosts * 4 == find(name).chips


def test_a_slice_is_described_as_it_is_wired() -> None:
    assert find("v5p-128").arguments() == {
        "platform": "tpu",
        "topology_name": "v5:4x4x4",
        "chip_config_name": "megacore",
        "chips_per_host_bounds": (2, 2, 1),
        "num_slices": 1,
        "wrap": (True, True, True),
    }
    assert find("v6e-256", 2).arguments() == {
        "platform": "tpu",
        "topology_name": "v6e:16x16",
        "chip_config_name": "default",
        "chips_per_host_bounds": (2, 2, 1),
        "num_slices": 2,
        "wrap": (True, True, False),
    }
    assert find("v5p-32").arguments()["wrap"] == (False, False, False)  # less than a cube: no torus


def test_slices_multiply_the_chips() -> None:
    assert find("v5e-256", 2).chips == 512
    with pytest.raises(ConfigError, match="--slices: must be at least 1"):
        find("v5e-256", 0)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("v5p-100", "v5p-128"), ("v5p128", "v5p-128"), ("v6e-300", "v6e-256"), ("v5p-99999", "v5p-8192")],
)
def test_an_unknown_name_gets_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"no slice is called '{wrong}'; nearest: {nearest};"):
        find(wrong)


def test_other_names_in_use_are_known() -> None:
    assert find("v5litepod-256") == find("v5e-256")


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies, "find_compiler", lambda: False)
    with pytest.raises(UserError, match="`make libtpu` or"):
        topologies.compile_only()
