"""Counting a compiled step, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu2_jax.pods import cost as cost_lib
from emu2_jax.pods import hlo
from emu2_jax.pods.cost import AttentionCall, Traffic
from emu2_jax.pods.estimate import attention_flops, estimate
from emu2_jax.pods.topologies import find
from emu2_jax.pods.trips import trip_count

#: Compiled for v5p-8 from: scan over 3 layers of `tanh(x @ w) @ w.T`, x [64, 512] and w [3, 512, 256] on four chips,
#: then a sum. One chip has 16 rows of x and 128 rows of each w.
SCAN = Path(__file__).parents[1] / "golden/scan_v5p.hlo.txt"

LAYERS = 3


@pytest.fixture(scope="module")
def module() -> hlo.Module:
    return hlo.parse(SCAN.read_text())


def test_a_loop_without_a_stated_count_is_counted_from_its_condition(module: hlo.Module) -> None:
    (loop,) = (instruction for instruction in module.entry if instruction.opcode == "while")
    assert "known_trip_count" not in loop.attributes
    assert trip_count(module, loop, module.entry) == LAYERS


def test_cycles_and_products_of_a_scan(module: hlo.Module) -> None:
    cost = cost_lib.count(module)
    # Once: a copy and the sum. Per layer: a copy, the slice of w, both products in one fusion.
    assert dict(cost.cycles) == {
        "copy": 2167 + LAYERS * 2167,
        "other": 2153,
        "fusion": LAYERS * 2274,
        "matmul": LAYERS * 7437,
    }
    assert cost.total_cycles == 2167 + 2153 + LAYERS * (2167 + 2274 + 7437)
    assert cost.product_flops == LAYERS * 2 * (2 * 16 * 512 * 256)


def test_collectives_of_a_scan(module: hlo.Module) -> None:
    w_bytes = 512 * 256 * 2
    assert dict(cost_lib.count(module).collectives) == {
        ("all-gather", "sync", 4): Traffic(LAYERS, LAYERS * w_bytes, LAYERS * w_bytes * 3 / 4),
        ("all-reduce", "sync", 4): Traffic(1, 2, 2 * 2 * 3 / 4),  # one bfloat16, there and back
    }


FUSED = """\
HloModule step, num_partitions=8

%scatter (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = f32[8]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={8}
}

%begins (w: bf16[8,16]) -> bf16[64,16] {
  %w = bf16[8,16]{1,0} parameter(0)
  ROOT %gather = bf16[64,16]{1,0} all-gather(%w), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%carries (x: bf16[4,64], w: bf16[8,16]) -> bf16[4,16] {
  %x = bf16[4,64]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  %gather.1 = bf16[64,16]{1,0} all-gather(%w), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %dot = bf16[4,16]{1,0} dot(%x, %gather.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (g: f32[64], w: bf16[8,16], x: bf16[4,64], h: f32[32]) -> f32[8] {
  %g = f32[64]{0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  %x = bf16[4,64]{1,0} parameter(2)
  %h = f32[32]{0:S(5)} parameter(3)
  %first = bf16[64,16]{1,0} fusion(%w), kind=kCustom, calls=%begins
  %product = bf16[4,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%carries,
    backend_config={"window_config":{"estimated_cycles":"700"}}
  %up = (f32[32]{0}, f32[32]{0:S(5)}, u32[]) copy-start(%h)
  %up.1 = f32[32]{0} copy-done(%up)
  %token = token[] after-all()
  %send = (f32[64]{0}, u32[], token[]) send(%g, %token), channel_id=9, is_host_transfer=true,
    frontend_attributes={_xla_megascale_target="{1}x{0:3}"}
  %send.1 = token[] send-done(%send), channel_id=9
  ROOT %kept = f32[8]{0} fusion(%g), kind=kCustom, calls=%scatter
}
"""


def test_collectives_inside_fusions() -> None:
    cost = cost_lib.count(hlo.parse(FUSED))
    gathered, summed = 64 * 16 * 2, 64 * 4
    assert dict(cost.collectives) == {
        # Two steps of one channel, one of them beside a product: one gather, which blocks nothing.
        ("all-gather", "async-fused", 8): Traffic(1, gathered, gathered * 7 / 8),
        # A sum of which a slice is kept, alone in its fusion: a reduce-scatter, which blocks.
        ("reduce-scatter", "sync-fused", 8): Traffic(1, summed, summed * 7 / 8),
    }
    assert dict(cost.cycles) == {"matmul": 700}
    assert cost.product_flops == 2 * 4 * 64 * 16


SPARSECORE = """HloModule step, num_partitions=8

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %s = bf16[] add(%a, %b)
}

%offloaded (p: bf16[64,16]) -> bf16[8,16] {
  %p = bf16[64,16]{1,0} parameter(0)
  ROOT %scattered = bf16[8,16]{1,0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}},
    dimensions={0}, to_apply=%add
}

ENTRY %main (g: bf16[64,16]) -> bf16[8,16] {
  %g = bf16[64,16]{1,0} parameter(0)
  %start = ((bf16[64,16]{1,0}, token[]), bf16[8,16]{1,0}) call-start(%g), async_execution_thread="sparsecore",
    to_apply=%offloaded
  ROOT %done = bf16[8,16]{1,0} call-done(%start)
}
"""


def test_what_a_sparsecore_sends_blocks_nothing() -> None:
    cost = cost_lib.count(hlo.parse(SPARSECORE))
    payload = 64 * 16 * 2
    assert dict(cost.collectives) == {("reduce-scatter", "async", 8): Traffic(1, payload, payload * 7 / 8)}
    assert cost.total_cycles == 0


def test_traffic_with_the_host_and_with_other_slices() -> None:
    cost = cost_lib.count(hlo.parse(FUSED))
    assert dict(cost.host_bytes) == {"to_device": 32 * 4}
    assert cost.slice_bytes == 64 * 4


def test_a_text_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing\n")


def test_attention_counts_the_blocks_that_its_mask_leaves() -> None:
    flops = attention_flops({2048})
    queries, blocks, product = (52, 2048, 128), (2, 2), 2 * 52 * 2048 * 2048 * 128
    forward = AttentionCall("splash_mha_fwd_residuals", queries, queries, blocks, results=1)
    assert flops(forward) == 2 * product * 3 / 4  # of 2 x 2 blocks, one lies above the diagonal
    assert flops(forward._replace(blocks=(4, 4))) == 2 * product * 10 / 16
    # The encoder looks both ways.
    patches = (16, 1152, 128)
    assert flops(forward._replace(queries=patches, keys=patches, blocks=(3, 3))) == 2 * 2 * 16 * 1152 * 1152 * 128
    # Gradients: scores, dp, dk, dv, and in a fused kernel dq.
    backward = forward._replace(name="splash_mha_dkv_no_residuals", blocks=None)
    assert flops(backward._replace(results=2)) == 4 * product
    assert flops(backward._replace(results=3)) == 5 * product
    assert flops(forward._replace(name="ragged_dot")) is None


def test_a_step_is_what_the_assumptions_make_of_its_cost(module: hlo.Module) -> None:
    cost = cost_lib.count(module)
    e = estimate(cost, find("v5p-8"), model_flops_per_chip=cost.product_flops / 2)
    assert e.compute_s == cost.total_cycles / 1.75e9
    assert e.blocking_s == (LAYERS * 196_608 + 3) / 540e9
    assert e.step_s == e.compute_s + e.blocking_s
    assert e.compiled_over_model_flops == 2
    assert e.mfu == pytest.approx(cost.product_flops / 2 / 459e12 / e.step_s)
