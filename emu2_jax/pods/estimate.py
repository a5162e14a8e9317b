"""From what the compiler says to a step time: the few assumptions it takes, in one place and printed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from emu2_jax.pods.cost import AttentionCall, AttentionFlops, Cost
from emu2_jax.pods.topologies import Topology

#: Pallas kernels carry no estimate: attention is taken to run at this share of the chip's peak.
KERNEL_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Estimate:
    """One step on one chip, seconds."""

    compute_s: float  #: the compiler's estimated cycles
    kernel_s: float  #: attention, at KERNEL_EFFICIENCY of peak
    blocking_s: float  #: collectives that nothing runs beside, at the assumed rate of the links
    slices_s: float  #: transfers between slices, as if nothing ran beside them
    ideal_s: float  #: model FLOPs at peak
    compiled_over_model_flops: float
    matmul_efficiency: float  #: share of peak that products reach in their own cycles

    @property
    def step_s(self) -> float:
        """The sum. What hides behind something else is left out: asynchronous collectives, prefetches."""
        return self.compute_s + self.kernel_s + self.blocking_s + self.slices_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.ideal_s / self.step_s


def estimate(cost: Cost, topology: Topology, model_flops_per_chip: float) -> Estimate:
    """Apply the assumptions to a step's cost."""
    chip = topology.generation
    product_s = cost.cycles["matmul"] / chip.clock_hz
    return Estimate(
        compute_s=cost.total_cycles / chip.clock_hz,
        kernel_s=cost.kernel_flops / (KERNEL_EFFICIENCY * chip.peak_flops),
        blocking_s=cost.wire("sync", "sync-fused") / chip.ici_bytes_per_s,
        slices_s=cost.slice_bytes / chip.dcn_bytes_per_s,
        ideal_s=model_flops_per_chip / chip.peak_flops,
        compiled_over_model_flops=(cost.product_flops + cost.kernel_flops) / model_flops_per_chip,
        matmul_efficiency=cost.product_flops / chip.peak_flops / product_s if product_s else 0.0,
    )


def assumptions(topology: Topology) -> list[str]:
    """In words, for every report."""
    chip = topology.generation
    lines = [
        f"compute: the compiler's own cycles at {chip.clock_hz / 1e9:g} GHz; peak {chip.peak_flops / 1e12:g} TFLOP/s",
        f"attention kernels: {KERNEL_EFFICIENCY:.0%} of peak (the compiler does not estimate them)",
        f"blocking collectives: {chip.ici_bytes_per_s / 1e9:g} GB/s per chip; asynchronous ones hide behind products",
    ]
    if topology.slices > 1:
        rate = chip.dcn_bytes_per_s / 1e9
        lines.append(f"between slices: {rate:g} GB/s per chip (a host's 200 Gbit/s over four chips), nothing hidden")
    return [*lines, "input, dispatch and checkpoints: not counted; nothing was timed on a TPU"]


def attention_flops(causal_lengths: Collection[int]) -> AttentionFlops:
    """Operations of flash and splash attention kernels, from the shapes of their queries and keys.

    A kernel on a length in `causal_lengths` computes the blocks on and below the diagonal alone. Documents of a packed
    row leave out more, which is not counted.
    """

    def flops(call: AttentionCall) -> float | None:
        if not re.search("splash|flash|mha|attention", call.name):
            return None
        if "dkv" in call.name:
            products = 5 if call.results > 2 else 4  # scores, dp, dk, dv; a fused kernel gives dq, too
        elif "_dq" in call.name:
            products = 3
        else:
            products = 5 if "bwd" in call.name and "fwd" not in call.name else 2
        share = 1.0
        if call.keys[-2] in causal_lengths and call.blocks is not None:
            rows, columns = call.blocks
            computed = sum(min(columns, math.ceil((row + 1) * columns / rows)) for row in range(rows))
            share = computed / (rows * columns)
        return products * 2.0 * math.prod(call.queries) * call.keys[-2] * share

    return flops
