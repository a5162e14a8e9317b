"""Parameters that are read part by part: from weight files, grown, resized or drawn at random.

A part is an index into our parameter (one slice per axis). Whoever wants parts gives the arrays to fill, several at
once, so that the bytes of a stored tensor pass through memory once, a block at a time, however many devices share it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Shaped

from emu2_jax.weights.files import StoredTensor
from emu2_jax.weights.layout import Index, Layout, overlap

#: Bytes of a stored tensor that are in memory at once.
BLOCK_BYTES = 32 << 20

#: Indices into a whole parameter, each with the array, of the index's shape, to fill.
Parts = Sequence[tuple[Index, Shaped[np.ndarray, "..."]]]


class Parameter(Protocol):
    """One of our parameters, somewhere."""

    shape: tuple[int, ...]
    dtype: np.dtype  #: as it is stored
    stacked: bool  #: whether the first axis runs over layers, which lie apart

    def read_into(self, parts: Parts) -> None:
        """Fill the arrays with the parts that their indices name, cast to the arrays' dtypes."""
        ...


def read(parameter: Parameter, index: Index, dtype: np.dtype | None = None) -> Shaped[np.ndarray, "..."]:
    """One part of a parameter as an array of its own, in the stored dtype or another."""
    array = np.empty(tuple(part.stop - part.start for part in index), dtype or parameter.dtype)
    parameter.read_into([(index, array)])
    return array


def whole(shape: Sequence[int]) -> Index:
    """The index of everything."""
    return tuple(slice(0, size) for size in shape)


def grid(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Index]:
    """Indices that cover a parameter chunk by chunk, in the order of its axes."""
    starts = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size)) for start, step, size in zip(corner, chunk, shape, strict=True)
        )


class StoredParameter:
    """A parameter as a file holds it, in one piece or several: each is one stored tensor, or one per layer."""

    def __init__(self, pieces: Sequence[tuple[Layout, Sequence[StoredTensor]]]) -> None:
        dtypes = {tensor.dtype for _, tensors in pieces for tensor in tensors}
        assert None not in dtypes
        layout = pieces[0][0]
        self.shape, self.stacked = layout.our_shape, layout.stacked
        self.dtype = np.result_type(*(dtype for dtype in dtypes if dtype))
        self._pieces = pieces

    def read_into(self, parts: Parts) -> None:
        """Fill parts, layer by layer."""
        for layer in range(self.shape[0] if self.stacked else 1):
            wanted = parts
            if self.stacked:
                wanted = [
                    (index[1:], array[layer - index[0].start])
                    for index, array in parts
                    if index[0].start <= layer < index[0].stop
                ]
            for layout, tensors in self._pieces:
                _read_layer(layout, tensors[layer], wanted)


def _read_layer(layout: Layout, tensor: StoredTensor, parts: Parts) -> None:
    """Fill what a stored tensor holds of parts of one layer, block by block."""
    views = []
    for index, array in parts:
        held = overlap(layout.our_part, index)
        if held is not None:
            views.append((layout.stored_index(index), layout.in_stored_order(array[held])))
    if not views:
        return
    _, *rest = layout.lengths
    row_size = math.prod(rest)
    first = min(index[0].start for index, _ in views)
    last = max(index[0].stop for index, _ in views)
    step = max(1, BLOCK_BYTES // (row_size * tensor.dtype.itemsize))  # type: ignore[union-attr]
    for start in range(first, last, step):
        stop = min(start + step, last)
        block = tensor.read(start * row_size, stop * row_size).reshape(stop - start, *rest)
        for index, view in views:
            a, b = max(start, index[0].start), min(stop, index[0].stop)
            if a < b:
                fill(view[a - index[0].start : b - index[0].start], block[(slice(a - start, b - start), *index[1:])])


def fill(target: Shaped[np.ndarray, "..."], source: Shaped[np.ndarray, "..."]) -> None:
    """Copy into a view, or cast (to nearest, ties to even). Equal dtypes go as integers, which NumPy copies faster."""
    if target.dtype == source.dtype:
        bits = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(bits), source.view(bits)
    target[...] = source


class GrownParameter:
    """A parameter with more rows of the vocabulary than the files hold: the new ones are the mean of the old."""

    def __init__(self, stored: StoredParameter, axis: int, size: int, tensor: StoredTensor) -> None:
        self.shape = (*stored.shape[:axis], size, *stored.shape[axis + 1 :])
        self.dtype = stored.dtype
        self.stacked = False
        self._stored, self._axis, self._old = stored, axis, stored.shape[axis]
        self._mean = _mean_row(tensor)

    def read_into(self, parts: Parts) -> None:
        """Fill old rows from the files, new ones with the mean."""
        old_parts = []
        for index, array in parts:
            part = index[self._axis]
            old = max(0, min(part.stop, self._old) - part.start)
            before = (slice(None),) * self._axis
            if old:
                old_index = (*index[: self._axis], slice(part.start, part.start + old), *index[self._axis + 1 :])
                old_parts.append((old_index, array[(*before, slice(0, old))]))
            (other,) = (axis for axis in range(2) if axis != self._axis)
            mean = self._mean[index[other]].astype(self.dtype)  # rounded as the old rows are
            array[(*before, slice(old, None))] = np.expand_dims(mean, self._axis)
        self._stored.read_into(old_parts)


def _mean_row(tensor: StoredTensor) -> Shaped[np.ndarray, " D"]:
    rows, width = tensor.shape
    step = max(1, BLOCK_BYTES // (8 * width))
    total = np.zeros(width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        total += tensor.read(start * width, stop * width).reshape(-1, width).astype(np.float64).sum(0)
    return total / rows


class ComputedParameter:
    """A parameter that is computed when it is first read, and forgotten by `release`."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], Shaped[np.ndarray, "..."]]
    ) -> None:
        self.shape, self.dtype, self.stacked = shape, dtype, False
        self._compute = compute
        self._value: Shaped[np.ndarray, "..."] | None = None

    def read_into(self, parts: Parts) -> None:
        """Fill parts from the computed array."""
        if self._value is None:
            self._value = self._compute()
        for index, array in parts:
            array[...] = self._value[index]

    def release(self) -> None:
        """Give the memory back; the next read computes it again."""
        self._value = None
