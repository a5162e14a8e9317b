"""Rows worked on apart: what `tests/sharded_equality.py` shows of whole runs, here of the single pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AbstractMesh

from emu2_jax import compiler_options, sharding, shards
from emu2_jax.errors import ConfigError

MESH = AbstractMesh((2, 4, 1), sharding.AXES)
REGION = shards.Region(compute_dtype="bfloat16", gradient_dtype="float32")


def program(region: shards.Region) -> str:
    """The step's inner part on eight devices that need not be there, as text."""
    params = {"project_up": {"kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32)}}
    params |= {"language_model": {"final_norm": {"scale": jax.ShapeDtypeStruct((32,), jnp.float32)}}}

    def gradients(trained, frozen, batch, key, weights):  # type: ignore[no-untyped-def]
        def loss(trained):  # type: ignore[no-untyped-def]
            whole = shards.whole(trained)
            y = batch["x"].astype(jnp.bfloat16) @ whole["project_up"]["kernel"].astype(jnp.bfloat16)
            return (y * whole["language_model"]["final_norm"]["scale"]).astype(jnp.float32).sum()

        return jax.grad(loss)(trained), {"sum": batch["x"].sum()}

    run = shards.by_rows(gradients, MESH, region)  # type: ignore[arg-type]
    batch = {"x": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
    return str(jax.make_jaxpr(run)(params, {}, batch, jax.random.key(0), {}))


def test_gathers_are_in_half_precision_and_gradients_reduced_as_asked() -> None:
    lines = program(REGION).splitlines()
    (gather,) = [line for line in lines if "all_gather[" in line]
    (scatter,) = [line for line in lines if "reduce_scatter[" in line]
    assert gather.strip().split(":")[1].startswith("bf16[16,32]")
    assert scatter.strip().split(":")[1].startswith("f32[16,16]")  # of a shard's 8 rows, and zeros
    half = program(REGION._replace(gradient_dtype="bfloat16")).splitlines()
    (scatter,) = [line for line in half if "reduce_scatter[" in line]
    assert scatter.strip().split(":")[1].startswith("bf16[16,16]")


def test_gradients_are_kept_in_the_dtype_that_they_are_reduced_in() -> None:
    """Twice the memory would hold nothing more. What is not sharded is not reduced in it either, and stays as it is."""
    for gradient_dtype, kept in (("bfloat16", "bf16"), ("float32", "f32")):
        last = program(REGION._replace(gradient_dtype=gradient_dtype)).splitlines()
        (kernel,) = [line for line in last if "psum" in line and "axes=('data',)" in line]
        assert kernel.strip().split(":")[1].startswith(f"{kept}[4,32]") or kernel.strip().split(":")[1].startswith(
            f"{kept}[16,8]"
        ), kernel
        scale = [line for line in last if "psum" in line and "axes=('data', 'fsdp')" in line]
        assert any(line.strip().split(":")[1].startswith("f32[32]") for line in scale)


def test_what_a_gather_does_not_sum_is_summed_at_the_end() -> None:
    """The kernel is sharded over fsdp: summed over data alone. The scale lies everywhere: over both."""
    text = program(REGION)
    assert "axes=('data',)" in text
    assert text.count("axes=('data', 'fsdp')") == 2  # the scale's gradient, and the sums that are logged


def test_outside_of_the_region_nothing_happens() -> None:
    params = jax.eval_shape(tiny.task().init, jax.random.key(0))
    assert shards.whole(params) is params
    key = jax.random.key(1)
    assert shards.row_keys(key, 3)[2] == jax.random.fold_in(key, 2)


def test_a_parameter_without_a_rule_is_an_error() -> None:
    with shards._entered(REGION), pytest.raises(ConfigError, match=r"^adapter/kernel: no sharding rule"):
        shards.whole({"adapter": {"kernel": jnp.zeros((4, 4))}})


def test_one_device_for_all_rows_is_left_alone() -> None:
    def gradients() -> None: ...

    assert shards.by_rows(gradients, AbstractMesh((1, 1, 2), sharding.AXES), REGION) is gradients  # type: ignore[arg-type]


def test_compiler_options_are_for_tpus_alone() -> None:
    assert compiler_options.for_device(jax.devices("cpu")[0]) == {}
    assert all(options for options in compiler_options.TPU.values())
