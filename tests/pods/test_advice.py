"""What to change when a step does not fit."""

from __future__ import annotations

import dataclasses

import tiny

from emu2_jax.config import ExperimentConfig
from emu2_jax.pods.advice import Needs, changes
from emu2_jax.pods.compiling import Buffer, out_of_memory
from emu2_jax.pods.topologies import find

GIB = 2**30


def test_three_settings_each_of_which_should_fit() -> None:
    # 20 GiB of state, 4 of gradients, 96 of activations on chips with 95.74, eight rows at a time.
    needs = Needs(used=120 * GIB, state=20 * GIB, gradients=4 * GIB, rows=512, common_rows=512)

    def state_bytes(other: ExperimentConfig) -> int:
        return (16 if other.optimizer.moment_dtype == "bfloat16" else 20) * GIB

    found = changes(tiny.CONFIG, find("v5p-128"), needs, state_bytes)
    assert [change.flags for change in found] == [
        "--gin.optimizer.accumulation_steps=2",
        "--gin.model.remat=full",
        "--topology v5p-256",
    ]
    # Half of the activations, and the gradients that are summed.
    assert found[0].bytes == (20 + 4 + 4 + 48) * GIB
    # Half of everything.
    assert found[2].bytes == 60 * GIB


def test_smaller_micro_batches_are_not_advised_where_a_chip_has_one_row() -> None:
    needs = Needs(used=100 * GIB, state=20 * GIB, gradients=4 * GIB, rows=64, common_rows=64)
    full = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, remat="full"))
    found = changes(full, find("v5p-128"), needs, lambda other: 14 * GIB)
    assert [change.flags for change in found] == ["--gin.optimizer.moment_dtype=bfloat16"]


def test_only_what_divides_every_batch_of_the_run_is_advised() -> None:
    # 640 rows here and 832 of another source: 64 chips have 10 and 13, which no number of micro-batches divides.
    needs = Needs(used=120 * GIB, state=20 * GIB, gradients=4 * GIB, rows=640, common_rows=64)
    found = changes(tiny.CONFIG, find("v5p-128"), needs, lambda other: 20 * GIB)
    assert not [change for change in found if "accumulation" in change.flags or "topology" in change.flags]


def test_copies_of_the_parameters_are_given_up() -> None:
    config = dataclasses.replace(tiny.CONFIG, mesh=dataclasses.replace(tiny.CONFIG.mesh, data=2, fsdp=32))
    needs = Needs(used=100 * GIB, state=40 * GIB, gradients=8 * GIB, rows=64, common_rows=64)
    found = changes(config, find("v5p-128"), needs, lambda other: (20 if other.mesh.data == 1 else 40) * GIB)
    (change,) = (change for change in found if "mesh" in change.flags)
    assert change.flags == "--gin.mesh.data=1 --gin.mesh.fsdp=None"
    assert change.bytes == (20 + 4 + 52) * GIB


def test_the_compilers_refusal_is_read() -> None:
    error = out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.50G of 15.75G hbm. Exceeded hbm capacity "
        "by 3.75G.\n\n  Largest program allocations in hbm:\n\n  1. Size: 8.00G\n     Operator: "
        'op_name="jit(step)/while" source_file="x.py"\n     Shape: f32[4,1024]{1,0:T(8,128)}\n'
    )
    assert error.used_bytes == int(19.5 * GIB)
    assert error.largest == [Buffer(8 * GIB, "jit(step)/while f32[4,1024]{1,0:T(8,128)}")]
    other = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (240.00G) exceeds available HBM (30.75G)."
    )
    assert out_of_memory(other).used_bytes == 240 * GIB
