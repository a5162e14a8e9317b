"""Floating-point operations of one product in a compiled program.

TPUs write products as convolutions, a batch dimension as a window with dilation and padding: only window positions that
meet data are counted, as XLA's own analysis does. Padding of tiles is not work.
"""

from __future__ import annotations

import functools
import math
import re

from emu2_jax.pods.hlo import Computation, Instruction

#: A window with more positions than this is counted whole: walking through it would take longer than it is worth.
_MAX_WALK = 20_000_000


def product_flops(instruction: Instruction, computation: Computation) -> int:
    """Two for each multiplication of a `dot` or `convolution`."""
    out = instruction.arrays[0].dims
    operands = [operand.arrays[0].dims for operand in computation.operands(instruction)]
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        return 2 * math.prod(operands[0][int(dim)] for dim in contracted) * math.prod(out)
    labels = instruction.attribute("dim_labels")
    if labels is None or len(operands) < 2:
        return 0
    left, right = operands[:2]
    left_labels, rest = labels.split("_", 1)
    right_labels, out_labels = rest.split("->")
    window = {
        key: value.split("x") for key, value in re.findall(r"(\w+)=([^\s}]+)", instruction.attribute("window") or "")
    }
    flops = 2 * out[out_labels.index("b")] * out[out_labels.index("f")] * right[right_labels.index("i")]
    for dim in range(sum(label.isdigit() for label in right_labels)):

        def setting(key: str, dim: int = dim) -> int:
            return int(window[key][dim]) if key in window else 1

        flops *= _positions(
            size_in=left[left_labels.index(str(dim))],
            kernel=right[right_labels.index(str(dim))],
            size_out=out[out_labels.index(str(dim))],
            stride=setting("stride"),
            padding=int(window["pad"][dim].split("_")[0]) if "pad" in window else 0,
            kernel_dilation=setting("rhs_dilate"),
            input_dilation=setting("lhs_dilate"),
        )
    return flops // int(instruction.attribute("batch_group_count") or 1)


@functools.cache
def _positions(
    *, size_in: int, kernel: int, size_out: int, stride: int, padding: int, kernel_dilation: int, input_dilation: int
) -> int:
    """Pairs of output and kernel positions along one dimension that meet an element of the input."""
    if (kernel == 1 and padding == 0 and input_dilation == 1) or size_out * kernel > _MAX_WALK:
        return size_out * kernel
    extent = (size_in - 1) * input_dilation + 1 if size_in else 0
    places = (out * stride + k * kernel_dilation - padding for k in range(kernel) for out in range(size_out))
    return sum(0 <= place < extent and place % input_dilation == 0 for place in places)
