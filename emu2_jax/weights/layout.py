"""How a stored array lies inside one of our parameters: two axis patterns with the same letters.

`"(c H K) D"` -> `"L D c H K"` says: the stored array has two axes, of which the first runs over c, H and K (K fastest);
ours has five, of which the first, L, runs over layers that the files store as one array each. A letter's size is the
same on both sides; `1` is an axis of size one.

A letter that one side alone has is fixed there to an index. `"(H K) D"` -> `"L D c=0 H K"`: the stored array is a part
of our parameter, q of q, k and v; arrays with c=1 and c=2 are the rest of it. `"(c=1 H K)"` -> `"L H K"`: our parameter
is a part of the stored array, the bias on k of a bias on all three; two more parameters are the rest of it.

Every layout is a bijection of the elements that it is about: nothing is computed, so that a round trip keeps every bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Shaped

#: The axis that our parameters have and stored arrays have not: one stored array per layer.
LAYERS = "L"

Index = tuple[slice, ...]  #: into an array, with start and stop set


@dataclass(frozen=True)
class Layout:
    """Axis patterns of a stored array and of our parameter, and the size of every letter."""

    stored: str
    ours: str
    sizes: Mapping[str, int]

    def resized(self, **sizes: int) -> Layout:
        """The same with other sizes of some letters."""
        return replace(self, sizes={**self.sizes, **sizes})

    @cached_property
    def stored_letters(self) -> tuple[str, ...]:
        """Letters of the stored array in the order of its bytes, axes of size one left out."""
        return tuple(letter for axis in _axes(self.stored) for letter in axis)

    @cached_property
    def our_axes(self) -> tuple[tuple[str, ...], ...]:
        """Letters of each axis of one layer of our parameter. A fixed letter is an axis of its own."""
        return tuple(axis for axis in _axes(self.ours) if axis != (LAYERS,))

    @cached_property
    def fixed_in_stored(self) -> Mapping[str, int]:
        """Letter -> index, of letters that the stored array alone has."""
        return _fixed(self.stored)

    @cached_property
    def fixed_in_ours(self) -> Mapping[str, int]:
        """Letter -> index, of letters that our parameter alone has."""
        return _fixed(self.ours)

    @property
    def stacked(self) -> bool:
        """Whether our parameter has a leading axis of layers."""
        return _axes(self.ours)[0] == (LAYERS,)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array of one layer."""
        return tuple(self._size(axis) for axis in _axes(self.stored))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Shape of the stored array with one axis per letter."""
        return tuple(self._lengths(self.stored_letters))

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of our parameter without the axis of layers."""
        return tuple(self._size(axis) for axis in self.our_axes)

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our whole parameter."""
        return (self.sizes[LAYERS], *self.layer_shape) if self.stacked else self.layer_shape

    @property
    def our_part(self) -> Index:
        """The part of one layer of our parameter that the stored array is: all of it, but for fixed letters."""
        at = [self.fixed_in_ours.get("".join(axis)) for axis in self.our_axes]
        return tuple(
            slice(0, size) if index is None else slice(index, index + 1)
            for index, size in zip(at, self.layer_shape, strict=True)
        )

    def in_stored_order(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """(A shard of) `our_part` as a view with one axis per letter, in the order of the stored bytes.

        Axes of several letters must be whole; an axis of one letter may be any part of it. Fixed letters have length 1.
        """
        lengths: list[int] = []
        letters: list[str] = []
        for axis, length in zip(self.our_axes, array.shape, strict=True):
            if "".join(axis) not in self.fixed_in_ours:
                lengths += [length] if len(axis) == 1 else self._lengths(axis)
                letters += axis
        free = [letter for letter in self.stored_letters if letter not in self.fixed_in_stored]
        view = array.reshape(lengths).transpose([letters.index(letter) for letter in free])
        at = [axis for axis, letter in enumerate(self.stored_letters) if letter in self.fixed_in_stored]
        return np.expand_dims(view, at)

    def stored_index(self, index: Index) -> Index:
        """Which part of the stored array, one slice per letter, a part of one layer of our parameter is made of."""
        by_letter = {letter: slice(at, at + 1) for letter, at in self.fixed_in_stored.items()}
        for axis, part in zip(self.our_axes, index, strict=True):
            start, stop, _ = part.indices(self._size(axis))
            if len(axis) == 1:
                by_letter[axis[0]] = slice(start, stop)
            else:
                assert (start, stop) == (0, self._size(axis)), f"{self.ours}: {axis} cannot be sharded"
                by_letter |= {letter: slice(0, self.sizes[letter]) for letter in axis}
        return tuple(by_letter[letter] for letter in self.stored_letters)

    def can_cut(self, letter: str) -> bool:
        """Whether a run of this letter of the stored array is a part of ours: `cut` takes no other letters."""
        return letter in self.fixed_in_stored or (letter,) in self.our_axes

    def cut(self, letter: str, start: int, stop: int) -> Index | None:
        """The part of one layer of our parameter that a run of a stored letter is made of; None if it has none."""
        assert self.can_cut(letter), f"{self.ours}: {letter} cannot be cut"
        if letter in self.fixed_in_stored:
            return self.our_part if start <= self.fixed_in_stored[letter] < stop else None
        axis = self.our_axes.index((letter,))
        return (*self.our_part[:axis], slice(start, stop), *self.our_part[axis + 1 :])

    def to_ours(self, stored: Shaped[np.ndarray, "..."], layer: Shaped[np.ndarray, "..."]) -> None:
        """Copy a stored array to where it belongs in one layer of our parameter."""
        part = stored.reshape(self.lengths)[self.stored_index(self.our_part)]
        self.in_stored_order(layer[self.our_part])[...] = part

    def to_stored(self, layer: Shaped[np.ndarray, "..."], stored: Shaped[np.ndarray, "..."]) -> None:
        """Copy one layer of our parameter to where it belongs in a contiguous stored array: `to_ours` reversed."""
        part = stored.reshape(self.lengths)[self.stored_index(self.our_part)]
        part[...] = self.in_stored_order(layer[self.our_part])

    def _size(self, axis: Sequence[str]) -> int:
        return math.prod(self._lengths(axis))

    def _lengths(self, letters: Sequence[str]) -> list[int]:
        return [self.sizes[letter] for letter in letters]


def overlap(part: Index, index: Index) -> Index | None:
    """Where `part` lies within an array that holds `index` of the same whole; None if they have nothing in common."""
    both = [(max(p.start, i.start), min(p.stop, i.stop), i.start) for p, i in zip(part, index, strict=True)]
    if any(start >= stop for start, stop, _ in both):
        return None
    return tuple(slice(start - origin, stop - origin) for start, stop, origin in both)


def _axes(pattern: str) -> list[tuple[str, ...]]:
    """`"(c=0 H K) D 1"` -> [("c", "H", "K"), ("D",), ()]."""
    parts = re.findall(r"\(([^)]*)\)|(\S+)", re.sub(r"=\d+", "", pattern))
    return [tuple(group.split()) if group else () if single == "1" else (single,) for group, single in parts]


def _fixed(pattern: str) -> dict[str, int]:
    """`"(c=0 H K) D 1"` -> {"c": 0}."""
    return {letter: int(index) for letter, index in re.findall(r"(\w)=(\d+)", pattern)}
