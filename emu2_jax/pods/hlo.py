"""The text of a compiled program, read into computations and instructions.

Only what counting needs: names, shapes, operands, called computations, attributes. The text is what
`compiled.as_text()` gives; its grammar is XLA's HLO.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Bytes of an element.
_BYTES: Mapping[str, float] = {
    "pred": 1, "token": 0, "opaque": 0, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5,
    "bf16": 2, "c64": 8, "c128": 16,
}  # fmt: skip

_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[subfc]\w*?\d\w*)\[([^\]]*)\](\{[^{}]*\})?")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_STARTS_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_STARTS_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+).*\{$")
_TABLES = {"HloModule", "FileNames", "FunctionNames", "FileLocations", "StackFrames"}
_CALLS = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations|"
    r"async_wrapped_computation)=(\{[^{}]*\}|%?[\w.\-]+)"
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class ArrayShape:
    """One array of a result: `bf16[8,128]{1,0:T(8,128)S(5)}`."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int  #: 0 = HBM, 1 = VMEM, 5 = host

    @property
    def bytes(self) -> float:
        """Without the padding of tiles."""
        width = _BYTES.get(self.dtype)
        if width is None:
            bits = re.search(r"\d+", self.dtype)
            width = int(bits[0]) / 8 if bits else 1
        return width * math.prod(self.dims)


def arrays(shape: str) -> list[ArrayShape]:
    """Every array of a shape, which may be a tuple."""
    return [
        ArrayShape(
            dtype,
            tuple(int(re.sub(r"\D", "", size) or 1) for size in dims.split(",") if size.strip()),
            int(space[1]) if (space := _MEMORY_SPACE.search(layout or "")) else 0,
        )
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


@dataclass
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: list[str]  #: names; of a constant or a parameter, its one literal
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> list[ArrayShape]:
        """Arrays of the result."""
        return arrays(self.shape)

    @property
    def bytes(self) -> float:
        """Of all arrays of the result."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def backend_config(self) -> Mapping[str, Any]:
        """What the compiler notes for its own later passes."""
        start = self.attributes.find("backend_config=")
        if start < 0:
            return {}
        try:
            value = json.JSONDecoder().raw_decode(self.attributes, start + len("backend_config="))[0]
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return {}  # other backends write other things there
        return value if isinstance(value, dict) else {}

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of this instruction alone; None where it makes none."""
        config = self.backend_config
        cycles = (config.get("window_config") or {}).get("estimated_cycles", config.get("estimated_cycles"))
        return None if cycles is None else int(cycles)

    def called(self, *kinds: str) -> list[str]:
        """Names of computations that it calls as one of `kinds` (`body`, `to_apply`, ...); all without `kinds`."""
        plain = _STRING.sub('""', self.attributes.partition(", backend_config=")[0])
        groups = [names for kind, names in _CALLS.findall(plain) if not kinds or kind in kinds]
        return [name.strip().lstrip("%") for group in groups for name in group.strip("{}").split(",") if name.strip()]

    def attribute(self, name: str) -> str | None:
        """The text of `name=...`, up to a comma outside braces."""
        found = re.search(rf"\b{name}=(\{{[^{{}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """The path of jax operations it comes from: `jit(step)/jvp()/dot_general`; empty for the compiler's own."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def get(self, name: str) -> Instruction | None:
        """The instruction of that name."""
        return self.instructions.get(name)

    @property
    def root(self) -> Instruction | None:
        """What the computation returns."""
        return next((i for i in self if i.is_root), next(reversed(self.instructions.values()), None))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Those operands that are instructions of this computation."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    def operand_bytes(self, instruction: Instruction) -> float:
        """Bytes of all operands."""
        return sum(operand.bytes for operand in self.operands(instruction))


@dataclass
class Module:
    """A compiled program as one device runs it."""

    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int


def parse(text: str) -> Module:
    """Read a module. Raises `ValueError` when the text is none."""
    computations: dict[str, Computation] = {}
    entry = None
    current: Computation | None = None
    pending: list[str] = []  # the lines of one instruction: long ones are broken

    def finish() -> None:
        if current is not None and pending:
            instruction = _instruction("".join(pending))
            if instruction is not None:
                current.instructions[instruction.name] = instruction
        pending.clear()

    for line in text.splitlines():
        if current is None:
            head = None if line.startswith(" ") else _STARTS_COMPUTATION.match(line.rstrip())
            if head and head[2] not in _TABLES:
                current = computations[head[2]] = Computation(head[2])
                entry = current if head[1] else entry
        elif _STARTS_INSTRUCTION.match(line):
            finish()
            pending.append(line)
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            finish()
            current = None
        elif pending:
            pending.append(line)
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(text: str) -> Instruction | None:
    head = _STARTS_INSTRUCTION.match(text)
    assert head is not None
    end_of_shape = _end_of_shape(text, head.end())
    opcode = _OPCODE.match(text, end_of_shape)
    if opcode is None:
        return None
    end = _after_brackets(text, opcode.end() - 1)
    inside = text[opcode.end() : end - 1]
    literal = opcode[1] in ("constant", "parameter")
    operands = [inside.strip()] if literal else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(head[2], text[head.end() : end_of_shape], opcode[1], operands, text[end:], bool(head[1]))


def _end_of_shape(text: str, position: int) -> int:
    if text[position] == "(":
        return _after_brackets(text, position)
    while position < len(text) and text[position] != " ":
        position = _after_brackets(text, position) if text[position] in "{[(" else position + 1
    return position


_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\]]')


def _after_brackets(text: str, position: int) -> int:
    """Index after the bracket that closes the one at `position`; brackets in strings do not count."""
    depth = 0
    for found in _BRACKET.finditer(text, position):
        if found[0] in "([{":
            depth += 1
        elif found[0] in ")]}":
            depth -= 1
            if depth == 0:
                return found.end()
    return len(text)
