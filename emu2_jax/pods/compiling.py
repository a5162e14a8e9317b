"""A step compiled for devices that may not be there, and what the compiler says of its memory."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from emu2_jax import sharding
from emu2_jax.pods.hlo import Module
from emu2_jax.train import Program

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # of a global batch, by field

_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+)([KMGT])\) exceeds available HBM")
_OVER = re.compile(r"Exceeded hbm capacity by ([\d.]+)([KMGT])")
_ALLOCATION = re.compile(
    r"Size: ([\d.]+)([KMGT]?)B?\s*\n(?:\s*Operator: op_name=\"([^\"]*)\"[^\n]*\n)?\s*Shape: (\S+)", re.MULTILINE
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Buffer:
    """A large array of the step on one device."""

    bytes: int
    name: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: int  #: state and batch
    outputs: int  #: of them, those that do not take an argument's place
    temporaries: int
    code: int
    host: int  #: the device's share of its host's memory: what is offloaded

    @property
    def peak(self) -> int:
        """What the step's arrays take at once."""
        return self.arguments + self.outputs + self.temporaries


@dataclass(frozen=True)
class CompiledStep:
    """The executable, its text, its memory, and the CPU and wall time that compiling took."""

    executable: jax.stages.Compiled
    program_text: str  #: StableHLO, before compilation
    text: str  #: HLO as it is scheduled
    memory: Memory
    lower_s: float
    compile_s: float
    compile_cpu_s: float


class DoesNotFit(Exception):
    """The compiler gave up: the step needs more HBM than a chip has."""

    def __init__(self, used_bytes: int | None, largest: list[Buffer], message: str) -> None:
        super().__init__(message)
        self.used_bytes = used_bytes
        self.largest = largest


def abstract_batch(shapes: Shapes, program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch that lies as the trainer places it."""
    rows = sharding.batch_sharding(program.mesh)
    return {name: jax.ShapeDtypeStruct(dims, dtype, sharding=rows) for name, (dims, dtype) in shapes.items()}


def compile_step(program: Program, shapes: Shapes) -> CompiledStep:
    """Compile the run's own step for one batch shape. Raises `DoesNotFit`."""
    started = time.perf_counter()
    lowered = program.step.lower(program.abstract_state, abstract_batch(shapes, program))  # type: ignore[attr-defined]
    lowered_at, cpu = time.perf_counter(), time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(str(error)) from error
    compile_cpu_s, compile_s = time.process_time() - cpu, time.perf_counter() - lowered_at
    stats = executable.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    )
    text = executable.as_text()
    assert text is not None, "the compiler keeps the text of what it compiles"
    return CompiledStep(executable, lowered.as_text(), text, memory, lowered_at - started, compile_s, compile_cpu_s)


def out_of_memory(message: str) -> DoesNotFit:
    """What the compiler's refusal says: bytes wanted, and the largest allocations where it lists them."""
    used = _USED.search(message)
    groups = [group for group in used.groups() if group] if used else []
    wanted = int(float(groups[0]) * _UNITS[groups[1]]) if groups else None
    largest = [
        Buffer(int(float(size) * _UNITS[unit]), f"{name or 'the compiler'} {shape}")
        for size, unit, name, shape in _ALLOCATION.findall(message)
    ]
    return DoesNotFit(wanted, largest, message)


def state_buffers(program: Program) -> list[Buffer]:
    """Parameters and moments on one device, by path, largest first."""

    def buffer(key_path: Any, leaf: jax.ShapeDtypeStruct) -> Buffer:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        assert leaf.sharding is not None
        dims = leaf.sharding.shard_shape(leaf.shape)
        return Buffer(int(np.prod(dims)) * leaf.dtype.itemsize, f"{path} {leaf.dtype}{list(dims)}")

    leaves = jax.tree_util.tree_leaves_with_path(program.abstract_state)
    return sorted((buffer(path, leaf) for path, leaf in leaves), key=lambda buffer: -buffer.bytes)


def result_buffers(module: Module) -> list[Buffer]:
    """The largest results in HBM, largest first: what temporaries are made of, though not all live at once."""
    views = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant"}
    fused = {name for c in module.computations.values() for i in c if i.opcode == "fusion" for name in i.called()}
    sizes: dict[str, int] = {}
    for computation in module.computations.values():
        if computation.name in fused:
            continue
        for instruction in computation:
            if instruction.opcode in views or instruction.opcode.endswith("-done"):
                continue
            for array in instruction.arrays:
                if array.memory_space == 0:
                    source = "/".join(instruction.source.split("/")[1:]) or instruction.name
                    sizes[f"{source} {array.dtype}{list(array.dims)}"] = int(array.bytes)
    return sorted((Buffer(size, name) for name, size in sizes.items()), key=lambda buffer: -buffer.bytes)
