"""How one stored array lies inside one of our parameters: two axis patterns with the same letters.

`"(c H K) D"` -> `"L D c H K"` says: the stored array has two axes, of which the first runs over c, H and K (K fastest);
ours has five, of which the first, L, runs over layers that the files store as one array each. A letter's size is the
same on both sides; `1` is an axis of size one. Every layout is a bijection of elements: nothing is computed, so that a
round trip keeps every bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Shaped

#: The axis that our parameters have and stored arrays have not: one stored array per layer.
LAYERS = "L"


@dataclass(frozen=True)
class Layout:
    """Axis patterns of a stored array and of our parameter, and the size of every letter."""

    stored: str
    ours: str
    sizes: Mapping[str, int]

    @cached_property
    def stored_letters(self) -> tuple[str, ...]:
        """Letters of the stored array in the order of its bytes, axes of size one left out."""
        return tuple(letter for axis in _axes(self.stored) for letter in axis)

    @cached_property
    def our_axes(self) -> tuple[tuple[str, ...], ...]:
        """Letters of each axis of one layer of our parameter."""
        return tuple(axis for axis in _axes(self.ours) if axis != (LAYERS,))

    @property
    def stacked(self) -> bool:
        """Whether our parameter has a leading axis of layers."""
        return _axes(self.ours)[0] == (LAYERS,)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array of one layer."""
        return tuple(self._size(axis) for axis in _axes(self.stored))

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of our parameter without the axis of layers."""
        return tuple(self._size(axis) for axis in self.our_axes)

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our whole parameter."""
        return (self.sizes[LAYERS], *self.layer_shape) if self.stacked else self.layer_shape

    def to_ours(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """One stored array as (one layer of) our parameter; a view where the axes allow it."""
        order = [self.stored_letters.index(letter) for axis in self.our_axes for letter in axis]
        return array.reshape(self._lengths(self.stored_letters)).transpose(order).reshape(self.layer_shape)

    def to_stored(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """(One layer of) our parameter as the stored array: the inverse of `to_ours`."""
        return self.in_stored_order(array).reshape(self.stored_shape)

    def in_stored_order(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """(A shard of) one layer of ours as a view with one axis per letter, in the order of the stored bytes.

        Axes of several letters must be whole; an axis of one letter may be any part of it.
        """
        lengths: list[int] = []
        for axis, length in zip(self.our_axes, array.shape, strict=True):
            lengths += [length] if len(axis) == 1 else self._lengths(axis)
        letters = [letter for axis in self.our_axes for letter in axis]
        return array.reshape(lengths).transpose([letters.index(letter) for letter in self.stored_letters])

    def stored_index(self, index: Sequence[slice]) -> tuple[slice, ...]:
        """Which part of the stored array, one slice per letter, a part of one layer of our parameter is made of."""
        by_letter: dict[str, slice] = {}
        for axis, part in zip(self.our_axes, index, strict=True):
            start, stop, _ = part.indices(self._size(axis))
            if len(axis) == 1:
                by_letter[axis[0]] = slice(start, stop)
            else:
                assert (start, stop) == (0, self._size(axis)), f"{self.ours}: {axis} cannot be sharded"
                by_letter |= {letter: slice(0, self.sizes[letter]) for letter in axis}
        return tuple(by_letter[letter] for letter in self.stored_letters)

    def _size(self, axis: Sequence[str]) -> int:
        return math.prod(self._lengths(axis))

    def _lengths(self, letters: Sequence[str]) -> list[int]:
        return [self.sizes[letter] for letter in letters]


def _axes(pattern: str) -> list[tuple[str, ...]]:
    """`"(c H K) D 1"` -> [("c", "H", "K"), ("D",), ()]."""
    parts = re.findall(r"\(([^)]*)\)|(\S+)", pattern)
    return [tuple(group.split()) if group else () if single == "1" else (single,) for group, single in parts]
