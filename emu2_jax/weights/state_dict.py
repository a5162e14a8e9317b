"""State dicts (official name -> array) to and from our parameter trees, in memory, at any size."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from emu2_jax.errors import WeightsError
from emu2_jax.task import Params
from emu2_jax.weights.layout import LAYERS
from emu2_jax.weights.table import Row, Table

#: Names that an error lists of each kind before it says how many more there are.
LISTED = 6


@dataclass(frozen=True)
class Resolution:
    """Which name of a state dict is which row, layer by layer, and what is skipped."""

    names: tuple[tuple[Row, tuple[str, ...]], ...]  #: each row with the names, as given, of its layers
    skipped: Mapping[str, str]  #: name -> why it is not needed

    @property
    def parameters(self) -> dict[str, list[tuple[Row, tuple[str, ...]]]]:
        """Our path -> the rows that it is made of, with their names."""
        by_path: dict[str, list[tuple[Row, tuple[str, ...]]]] = {}
        for row, names in self.names:
            by_path.setdefault(row.path, []).append((row, names))
        return by_path


def resolve(
    table: Table, shapes: Mapping[str, Sequence[int]], *, source: str, free: Collection[str] = ()
) -> Resolution:
    """Find every row of `table` among names with shapes. Nothing is read, so that an index of any size will do.

    `free` holds paths whose shape may differ (the caller fits them). Raises `WeightsError`, in one message that names
    `source`, for what is missing, what nobody knows and what has another shape.
    """
    found: list[tuple[Row, tuple[str, ...]]] = []
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for rows in table.tensors:
        row = rows[0]  # name and stored shape are the same in all rows of a tensor
        candidates = [row.named(name) for name in (row.name, *row.aliases)]
        names = max(candidates, key=lambda names: sum(name in shapes for name in names))
        missing += [name for name in names if name not in shapes]
        wanted = row.layout.stored_shape
        for name in names:
            if name in shapes and tuple(shapes[name]) != wanted and row.path not in free:
                misshapen.append(f"{name} is {_dims(shapes[name])}, wanted {_dims(wanted)}")
        used.update(names)
        found += [(row, names) for row in rows]
    skipped = {name: reason for name in shapes if name not in used and (reason := table.skip_reason(name))}
    unexpected = [name for name in shapes if name not in used and name not in skipped]
    if missing or unexpected or misshapen:
        kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        problems = _layer_counts(table, shapes)
        problems += [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]
        raise WeightsError(f"{source}: does not hold the tensors of form {table.form!r}: {'; '.join(problems)}")
    return Resolution(tuple(found), skipped)


def to_params(
    state_dict: Mapping[str, Shaped[np.ndarray, "..."]], table: Table, *, source: str = "state dict"
) -> Params:
    """The parameter tree that a state dict holds, as NumPy arrays of its own dtypes."""
    resolution = resolve(table, {name: array.shape for name, array in state_dict.items()}, source=source)
    flat = {}
    for path, pieces in resolution.parameters.items():
        dtype = np.result_type(*(state_dict[name].dtype for _, names in pieces for name in names))
        flat[path] = np.empty(pieces[0][0].layout.our_shape, dtype)
        for row, names in pieces:
            for name, layer in zip(names, _layers(row, flat[path]), strict=True):
                row.layout.to_ours(np.asarray(state_dict[name]), layer)
    return nest(flat)


def to_state_dict(params: Params, table: Table) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The inverse of `to_params`, under the official names. Parts that `params` has not are left out."""
    flat = flatten(params)
    state_dict: dict[str, Shaped[np.ndarray, "..."]] = {}
    for rows in table.only(params).tensors:
        arrays = [np.asarray(flat[row.path]) for row in rows]
        dtype = np.result_type(*(array.dtype for array in arrays))
        stored = {name: np.empty(rows[0].layout.stored_shape, dtype) for name in rows[0].names}
        for row, array in zip(rows, arrays, strict=True):
            for tensor, layer in zip(stored.values(), _layers(row, array), strict=True):
                row.layout.to_stored(layer, tensor)
        state_dict |= stored
    return state_dict


def _layers(row: Row, parameter: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "L ..."]:
    return parameter if row.layout.stacked else parameter[None]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def _layer_counts(table: Table, names: Iterable[str]) -> list[str]:
    """What to say of stacks that have another number of layers than the config: that one fact explains many names."""
    stacked = [row for row in table.rows if row.layout.stacked]
    wanted = {name.split("{L}")[0]: row.layout.sizes[LAYERS] for row in stacked for name in (row.name, *row.aliases)}
    said = []
    for stem, count in wanted.items():
        numbers = {name.removeprefix(stem).split(".")[0] for name in names if name.startswith(stem)}
        found = sum(number.isdecimal() for number in numbers)
        if 0 < found != count:
            said.append(f"it has {found} layers {stem}N, the config {count}")
    return said


def listed(names: Iterable[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _dims(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
