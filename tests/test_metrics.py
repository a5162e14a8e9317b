"""The metrics file survives a resumed and a killed run; FLOPs are counted as by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from emu2_jax import metrics
from emu2_jax.metrics import JSONL, MetricWriter


def read(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / JSONL).read_text(encoding="utf-8").splitlines()]


def write(workdir: Path, *, start_step: int, steps: range, loss: float) -> None:
    with MetricWriter(workdir, start_step=start_step, num_steps=10, title="tiny") as writer:
        for step in steps:
            writer.advance(loss, {"tokens/s": 1000.0})
            writer.write(step, {"loss": loss + step, "source": "pairs"})


def test_what_is_written_is_read_in_order(tmp_path: Path) -> None:
    write(tmp_path, start_step=0, steps=range(1, 4), loss=0.5)
    assert read(tmp_path) == [{"step": step, "loss": 0.5 + step, "source": "pairs"} for step in (1, 2, 3)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, start_step=0, num_steps=2, title="tiny") as writer:
        writer.write(1, {"loss": 2.0})
        assert read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_the_last_line_can_be_amended_and_no_other(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, start_step=0, num_steps=3, title="tiny") as writer:
        writer.write(1, {"loss": 2.0})
        writer.amend(1, {"seconds/checkpoint": 1.0})
        writer.amend(2, {"seconds/checkpoint": 3.0})
        writer.write(2, {"loss": 1.0})
    assert read(tmp_path) == [{"step": 1, "loss": 2.0, "seconds/checkpoint": 1.0}, {"step": 2, "loss": 1.0}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, start_step=0, steps=range(1, 6), loss=0.0)
    write(tmp_path, start_step=3, steps=range(4, 7), loss=100.0)
    steps = [(line["step"], line["loss"]) for line in read(tmp_path)]
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0)]


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 1.0'])
def test_a_line_that_was_cut_by_a_kill_is_dropped(cut: str, tmp_path: Path) -> None:
    whole = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2)]
    (tmp_path / JSONL).write_text("\n".join([*whole, cut]), encoding="utf-8")
    write(tmp_path, start_step=2, steps=range(3, 4), loss=0.0)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def shapes(*dims: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in dims]


@pytest.mark.parametrize(
    ("function", "args", "flops"),
    [
        (lambda a, b: a @ b, shapes((2, 3), (3, 5)), 2 * 2 * 3 * 5),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shapes((7, 2, 3), (7, 3, 5)), 7 * 2 * 2 * 3 * 5),
        (lambda a, b: jnp.einsum("ijk,kjl->il", a, b), shapes((2, 3, 5), (5, 3, 4)), 2 * 2 * 3 * 5 * 4),
        (lambda a, b: jnp.tanh(a) + b, shapes((9, 9), (9, 9)), 0),
        (lambda a, b: jax.jit(jnp.matmul)(a, b), shapes((2, 3), (3, 5)), 2 * 2 * 3 * 5),
        (lambda a, b: jax.checkpoint(jnp.matmul)(a, b), shapes((2, 3), (3, 5)), 2 * 2 * 3 * 5),
        # A product of n x n in a loop of 6.
        (
            lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=6),
            shapes((4, 4), (4, 4)),
            6 * 2 * 4**3,
        ),
        # The gradient to both operands: two more products.
        (lambda a, b: jax.grad(lambda a, b: (a @ b).sum(), (0, 1))(a, b), shapes((2, 3), (3, 5)), 3 * 2 * 2 * 3 * 5),
    ],
)
def test_products_count_two_for_each_multiply_add(function: Any, args: list[Any], flops: int) -> None:
    assert metrics.count_flops(function, *args) == flops


@pytest.mark.parametrize(("groups", "inputs_read"), [(1, 6), (3, 2)])
def test_convolutions_count_what_each_output_reads(groups: int, inputs_read: int) -> None:
    """3 x 3 on 8 x 8 pixels, 6 channels to 12, stride 2."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    args = shapes((1, 8, 8, 6), (3, 3, 6 // groups, 12))
    assert metrics.count_flops(convolve, *args) == 2 * (4 * 4 * 12) * (3 * 3 * inputs_read)
