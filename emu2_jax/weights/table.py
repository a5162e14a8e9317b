"""Rows of a names table: which official tensor is which of our parameters, and how it lies there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from emu2_jax.weights.layout import LAYERS, Layout


def numberless(name: str) -> str:
    """A name with every number (or `{L}`) replaced: what tensors of the same kind share at any size."""
    return re.sub(r"\{L\}|\d+", "#", name)


@dataclass(frozen=True)
class Row:
    """One row of a table: an official tensor (or one per layer), the parameter that it is, and how it lies there.

    A tensor may be several parameters and a parameter several tensors: then several rows have the name or the path.
    """

    name: str  #: official; `{L}` stands for the number of a layer
    path: str  #: ours, from the part on
    layout: Layout
    aliases: tuple[str, ...] = ()  #: other names that the tensor has been stored under

    @property
    def names(self) -> tuple[str, ...]:
        """Official names of all layers, in their order; one name for what is not of a layer."""
        return self.named(self.name)

    def named(self, name: str) -> tuple[str, ...]:
        """`name` (the official one or an alias) for every layer."""
        count = self.layout.sizes[LAYERS] if self.layout.stacked else 1
        return tuple(name.replace("{L}", str(layer)) for layer in range(count))


@dataclass(frozen=True)
class Table:
    """All rows of a form at one size, and the names that it may hold besides."""

    form: str
    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def tensors(self) -> tuple[tuple[Row, ...], ...]:
        """The rows of each official name: the parameters that a tensor is made of."""
        return _grouped((row.name, row) for row in self.rows)

    @property
    def parameters(self) -> dict[str, tuple[Row, ...]]:
        """Our path -> its rows: the tensors that a parameter is made of."""
        return {rows[0].path: rows for rows in _grouped((row.path, row) for row in self.rows)}

    def skip_reason(self, name: str) -> str | None:
        """Why the tensor of this name is known and not needed; None if it is not known as that."""
        return next((reason for pattern, reason in self.skipped if re.fullmatch(pattern, name)), None)

    def only(self, parts: Iterable[str]) -> Table:
        """The rows of some parts alone."""
        wanted = set(parts)
        return Table(self.form, tuple(row for row in self.rows if row.path.split("/")[0] in wanted), self.skipped)

    def taking(self, parts: Iterable[str]) -> Table:
        """The same for a model that has only some of the parts: tensors of the others are known, and not needed."""
        kept = self.only(parts)
        left = [row for row in self.rows if row not in kept.rows]
        skipped = tuple(
            (re.escape(name).replace(re.escape("{L}"), r"\d+"), f"{row.path.split('/')[0]}, not a part of this model")
            for row in left
            for name in (row.name, *row.aliases)
        )
        return Table(self.form, kept.rows, (*self.skipped, *skipped))

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that the form holds, in the order of its rows."""
        return tuple(dict.fromkeys(row.path.split("/")[0] for row in self.rows))


def _grouped(rows: Iterable[tuple[str, Row]]) -> tuple[tuple[Row, ...], ...]:
    groups: dict[str, list[Row]] = {}
    for key, row in rows:
        groups.setdefault(key, []).append(row)
    return tuple(tuple(group) for group in groups.values())
