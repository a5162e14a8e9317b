"""The real step gives the same numbers on one device and on eight, with and without accumulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("sharded_equality.py")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, **settings},
        cwd=SCRIPT.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("run", ["data 2 x fsdp 2 x tensor 2", "fsdp 8", "accumulation of 2", "two rows at a time"])
def test_three_steps_on_eight_devices_equal_three_on_one(run: str, report: dict[str, Any]) -> None:
    """Losses and gradient norms to 1e-5, relative; parameters to 1e-4 of the largest of their leaf."""
    assert report["runs"][run]["losses"] < 1e-5
    assert report["runs"][run]["params"] < 1e-4
    assert report["smallest_move"] > 1e-2  # every leaf has moved by far more than the tolerance


@pytest.mark.parametrize("run", ["data 2 x fsdp 2 x tensor 2", "fsdp 8", "accumulation of 2", "two rows at a time"])
def test_the_state_still_lies_where_the_table_says(run: str, report: dict[str, Any]) -> None:
    assert report["runs"][run]["misplaced"] == []


def test_moments_are_sharded_over_fsdp_and_whole_on_replicas(report: dict[str, Any]) -> None:
    """An eighth, and the norms and biases that are small enough to be everywhere (2 % of this tiny model)."""
    assert 1 / 8 < report["moment_share"]["fsdp 8"] < 0.15
    assert report["moment_share"]["data 8"] == 1.0


def test_initial_parameters_are_the_same_on_any_mesh(report: dict[str, Any]) -> None:
    """Up to the last bit, which differs with how XLA vectorises the inverse error function."""
    assert report["initial_params"] < 1e-6


def test_attention_kernels_work_on_the_heads_of_their_device(report: dict[str, Any]) -> None:
    assert report["heads_apart"] < 1e-5


def test_an_encoder_has_one_fingerprint_and_gives_one_answer_on_any_mesh(report: dict[str, Any]) -> None:
    """The answer to a unit in the last place of bfloat16, in which it is stored."""
    assert len(set(report["fingerprints"])) == 1
    assert report["embeddings"] <= 2**-8


def test_a_kernel_that_the_compiler_cannot_cut_is_computed_on_each_devices_rows(report: dict[str, Any]) -> None:
    """The decoder's case, whose rows the compiler spreads: values and gradients, and one image that is everywhere."""
    assert max(report["kernel"].values()) < 2e-5
