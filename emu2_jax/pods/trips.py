"""How often a compiled loop runs: the compiler does not always say.

A scan is a loop `while counter < bound`, the counter one element of the loop's tuple. Bound, start and stride are
constants, behind copies, fusions, and the tuple that the loop begins with.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from emu2_jax.pods.hlo import Computation, Instruction, Module

_SAME_VALUE = {"copy", "bitcast", "convert", "copy-start", "copy-done"}
_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


class _Element(NamedTuple):
    """An element of the loop's tuple."""

    place: int


_Value = _Element | int | None


def trip_count(module: Module, loop: Instruction, caller: Computation) -> int | None:
    """Trips of the `while` instruction `loop` of `caller`; None where they cannot be told from the text."""
    stated = re.search(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:\s*["\\]*(\d+)', loop.attributes)
    if stated:
        return int(stated[1])
    conditions, bodies = loop.called("condition"), loop.called("body")
    if not conditions or not bodies:
        return None
    condition = module.computations[conditions[0]]
    comparison = _comparison(module, condition, condition.root, None)
    if comparison is None:
        return None
    counter, limit, direction = comparison
    first = caller.get(loop.operands[0])
    start = _initial(module, caller, first, counter.place)
    bound = _initial(module, caller, first, limit.place) if isinstance(limit, _Element) else limit
    if bound is None:
        return None
    stride = _stride(module, module.computations[bodies[0]], counter.place) or (-1 if direction in ("GT", "GE") else 1)
    inclusive = direction in ("LE", "GE")
    span = bound - (start or 0) + (0 if not inclusive else 1 if stride > 0 else -1)
    return max(0, -(-span // stride))


def _constant(module: Module, computation: Computation, name: str) -> int | None:
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in _SAME_VALUE and instruction.operands:
        instruction = computation.get(instruction.operands[0])
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        number = re.fullmatch(r"\{?(-?\d+)\}?", instruction.operands[0])
        return int(number[1]) if number else None
    if instruction.opcode == "fusion" and not instruction.operands:
        inner = module.computations[instruction.called("calls")[0]]
        return _constant(module, inner, inner.root.name) if inner.root else None
    return None


def _initial(module: Module, caller: Computation, first: Instruction | None, index: int) -> int | None:
    if first is None or first.opcode != "tuple":
        return None
    return _constant(module, caller, first.operands[index])


def _value(module: Module, computation: Computation, name: str, outside: list[_Value] | None) -> _Value:
    """What an operand of the condition is; `outside` are the values of the parameters of a fused computation."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in _SAME_VALUE:
        instruction = computation.get(instruction.operands[0])
    if instruction is None:
        return None
    if instruction.opcode == "parameter" and outside is not None:
        number = int(instruction.operands[0])
        return outside[number] if number < len(outside) else None
    if instruction.opcode == "get-tuple-element":
        index = instruction.attribute("index")
        return _Element(int(index)) if index else None
    return _constant(module, computation, instruction.name)


def _comparison(
    module: Module, computation: Computation, instruction: Instruction | None, outside: list[_Value] | None
) -> tuple[_Element, _Element | int, str] | None:
    """(counter, bound, direction) of the first comparison that the condition's result depends on."""
    if instruction is None:
        return None
    if instruction.opcode == "compare":
        left, right = (_value(module, computation, name, outside) for name in instruction.operands[:2])
        direction = instruction.attribute("direction") or ""
        if not isinstance(left, _Element):
            left, right, direction = right, left, _SWAPPED.get(direction, direction)
        if isinstance(left, _Element) and right is not None and direction in _SWAPPED:
            return left, right, direction
        return None
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        values = [_value(module, computation, name, outside) for name in instruction.operands]
        return _comparison(module, inner, inner.root, values)
    if instruction.opcode in ("and", "copy", "bitcast", "convert"):
        found = (_comparison(module, computation, operand, outside) for operand in computation.operands(instruction))
        return next((comparison for comparison in found if comparison is not None), None)
    return None


def _stride(module: Module, body: Computation, index: int) -> int | None:
    """What one trip adds to element `index`; None where no constant is added."""
    if body.root is None or body.root.opcode != "tuple":
        return None
    computation, instruction = body, body.get(body.root.operands[index])
    while instruction is not None:
        if instruction.opcode == "add":
            added = (_constant(module, computation, name) for name in instruction.operands)
            return next((number for number in added if number), None)
        if instruction.opcode == "fusion":
            computation = module.computations[instruction.called("calls")[0]]
            instruction = computation.root
        elif instruction.opcode in _SAME_VALUE:
            instruction = computation.get(instruction.operands[0])
        else:
            return None
    return None
