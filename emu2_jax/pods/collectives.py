"""What one collective of a compiled program sends."""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from emu2_jax.pods.hlo import Computation, Instruction, arrays

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

#: sync: nothing runs beside it. sync-fused: alone in a fusion, the same. async: started, and waited for later.
#: async-fused: cut into steps that products carry.
Mode = Literal["sync", "sync-fused", "async", "async-fused"]

_MESH_GROUPS = re.compile(
    r"(?:replica_groups|device_list)=mesh\[([^\]]*)\](?:,\s*device_ids=\((?:[^()]|\([^()]*\))*\))?\s*\{([^}]*)\}"
)


class Transfer(NamedTuple):
    """One call of a collective on one device."""

    kind: str
    group: int  #: devices that take part
    payload: float  #: bytes of the whole array: gathered, or to be reduced
    wire: float  #: bytes that leave the device, in a ring
    channel: str | None  #: instructions of one channel are steps of one collective


def kind_of(opcode: str) -> str | None:
    """`all-gather` for all-gather and all-gather-start; None for what is no collective, and for -done."""
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def transfer(
    instruction: Instruction, computation: Computation, num_partitions: int, *, scatters: bool = False
) -> Transfer:
    """What `instruction` sends. `scatters`: an all-reduce of which each device keeps its part, a reduce-scatter."""
    kind = kind_of(instruction.opcode)
    assert kind is not None, instruction.opcode
    started = instruction.opcode.endswith("-start")
    operands = computation.operand_bytes(instruction)
    group = _group_size(instruction.attributes)
    if not group and kind == "all-gather" and operands and not started:
        group = round(instruction.bytes / operands)
    group = group or num_partitions
    share = (group - 1) / group
    if kind == "all-gather":
        payload = operands * group
        wire = payload * share
    elif kind == "all-reduce":
        payload = operands
        kind, passes = ("reduce-scatter", 1) if scatters else (kind, 2)
        wire = passes * payload * share
    elif kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        payload = operands
        wire = payload * share
    else:
        # A started permute gives (source, destination, ...): the bytes of one.
        payload = wire = arrays(instruction.shape)[0].bytes if started else operands
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return Transfer(kind, group, payload, wire, channel[1] if channel else None)


def _group_size(attributes: str) -> int:
    """Devices in a replica group, in any of the forms that XLA writes; 0 where none is written."""
    mesh = _MESH_GROUPS.search(attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes.get(axis, 1) for axis, part in parts)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else 0
