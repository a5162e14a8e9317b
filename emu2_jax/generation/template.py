"""Templates: texts with fields in braces, filled from rows of values.

    fill("a {colour} apple", {"colour": "red"}, "row 1")          # "a red apple"

A brace that stands for itself is written twice.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from emu2_jax.errors import UserError


def fields(template: str) -> list[str]:
    """The names of the fields of a template, in their order. Raises `UserError` when its braces do not match."""
    try:
        parsed = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; a brace that stands for itself is written twice") from error
    names = [name for name, _, _ in parsed if name is not None]
    for name, spec, conversion in parsed:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise UserError(f"template {template!r}: a field is a name in braces; got {{{name}}} with more to it")
    return names


def fill(template: str, values: Mapping[str, Any], row: str) -> str:
    """The template with its fields replaced by `values`; `row` says where these come from.

    Raises `UserError` that names a field which the values have not.
    """
    for name in fields(template):
        if name not in values:
            raise UserError(
                f"template {template!r}: names the field {{{name}}}, which {row} has not; it has "
                f"{', '.join(map(str, values)) or 'none'}"
            )
    return template.format_map({name: str(value) for name, value in values.items()})
