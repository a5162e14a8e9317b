"""How often a compiled loop runs, read from its condition, its counter's first value and its step."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from emu2_jax.pods.hlo import Computation, Instruction, Module

_PASS_THROUGH = ("copy", "bitcast", "convert", "copy-start", "copy-done")
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


class _Value(NamedTuple):
    """A constant, or the element of the loop's tuple with this index."""

    is_constant: bool
    number: int


class _Bound(NamedTuple):
    counter: int  # index in the loop's tuple
    limit: _Value
    direction: str


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Runs of the `while` instruction of `computation`; None where it cannot be told."""
    noted = re.search(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:\s*["\\]*(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations.get((loop.called("condition") or [""])[0])
    body = module.computations.get((loop.called("body") or [""])[0])
    bound = _bound(module, condition, condition.root, None) if condition and condition.root else None
    if bound is None or body is None:
        return None
    first = next(iter(computation.operands(loop)), None)
    elements = first.operands if first is not None and first.opcode == "tuple" else ()

    def initial(index: int) -> int | None:
        return _constant(module, computation, elements[index]) if index < len(elements) else None

    limit = bound.limit.number if bound.limit.is_constant else initial(bound.limit.number)
    if limit is None:
        return None
    start = initial(bound.counter) or 0
    step = _step_of(module, body, bound.counter) or 1
    if bound.direction in ("GT", "GE") and step > 0:
        step = -1
    inclusive = bound.direction in ("LE", "GE")
    return max(0, math.ceil((limit - start + inclusive * (1 if step > 0 else -1)) / step))


def _constant(module: Module, computation: Computation, name: str, depth: int = 0) -> int | None:
    one = computation.by_name.get(name)
    if one is None or depth > 6:
        return None
    if one.opcode == "constant":
        found = re.fullmatch(r"\{?(-?\d+)\}?", one.operands[0])
        return int(found[1]) if found else None
    if one.opcode in _PASS_THROUGH and one.operands:
        return _constant(module, computation, one.operands[0], depth + 1)
    if one.opcode == "fusion" and not one.operands:
        inner = module.computations.get((one.called("calls") or [""])[0])
        return _constant(module, inner, inner.root.name, depth + 1) if inner and inner.root else None
    return None


def _value(
    module: Module, computation: Computation, name: str, parameters: list[_Value | None] | None
) -> _Value | None:
    one = computation.by_name.get(name)
    while one is not None and one.opcode in _PASS_THROUGH:
        one = computation.by_name.get(one.operands[0])
    if one is None:
        return None
    if one.opcode == "parameter" and parameters is not None:
        number = int(one.operands[0])
        return parameters[number] if number < len(parameters) else None
    if one.opcode == "constant":
        constant = _constant(module, computation, one.name)
        return None if constant is None else _Value(True, constant)
    index = re.search(r"index=(\d+)", one.attributes) if one.opcode == "get-tuple-element" else None
    return _Value(False, int(index[1])) if index else None


def _bound(
    module: Module,
    computation: Computation,
    one: Instruction | None,
    parameters: list[_Value | None] | None,
    depth: int = 0,
) -> _Bound | None:
    """The comparison that a condition makes, through fusions."""
    if one is None or depth > 4:
        return None
    if one.opcode == "compare":
        left, right = (_value(module, computation, name, parameters) for name in one.operands[:2])
        direction = one.attribute("direction") or ""
        if left is None or right is None:
            return None
        if left.is_constant:
            left, right, direction = right, left, _FLIPPED.get(direction, direction)
        return None if left.is_constant or direction not in _FLIPPED else _Bound(left.number, right, direction)
    if one.opcode == "fusion":
        inner = module.computations.get((one.called("calls") or [""])[0])
        given = [_value(module, computation, name, parameters) for name in one.operands]
        return _bound(module, inner, inner.root, given, depth + 1) if inner else None
    if one.opcode in ("and", *_PASS_THROUGH):
        found = (_bound(module, computation, other, parameters, depth + 1) for other in computation.operands(one))
        return next((bound for bound in found if bound), None)
    return None


def _step_of(module: Module, body: Computation, counter: int) -> int | None:
    root = body.root
    if root is None or root.opcode != "tuple" or counter >= len(root.operands):
        return None
    return _added(module, body, root.operands[counter])


def _added(module: Module, computation: Computation, name: str, depth: int = 0) -> int | None:
    one = computation.by_name.get(name)
    if one is None or depth > 5:
        return None
    if one.opcode == "add":
        constants = (_constant(module, computation, operand) for operand in one.operands)
        return next((constant for constant in constants if constant is not None), None)
    if one.opcode == "fusion":
        inner = module.computations.get((one.called("calls") or [""])[0])
        is_sum = inner is not None and inner.root is not None and inner.root.opcode == "add"
        return _added(module, inner, inner.root.name, depth + 1) if is_sum else None  # type: ignore[arg-type,union-attr]
    if one.opcode in _PASS_THROUGH and one.operands:
        return _added(module, computation, one.operands[0], depth + 1)
    return None
