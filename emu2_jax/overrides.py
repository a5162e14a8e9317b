"""Gin-style lines that change leaves of a config, and the operative config that a run writes down.

A *leaf* is a setting at the end of a dotted path through nested dataclasses: `optimizer.learning_rate`. A member of a
tuple of dataclasses is addressed by its `name`: `data.sources.pairs.weight`. Lines come from files and from flags:

    include "base.gin"             # relative to this file; include lines come before all others
    optimizer.learning_rate = 3e-5
    data.tokenizer = runs/demo/tokenizer.model

Each file is one *source*, all flags together are another. Later sources win: recipe < files in order < flags; an
included file comes before the file that includes it. pydantic checks types and choices. See docs/config.md.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.metadata
import platform
import re
import typing
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

import emu2_jax
from emu2_jax.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")

FLAG_PREFIX = "--gin."
FLAG_ORIGIN = "--gin flag"
ALLOW_FLAG = "--allow_config_change"

#: What a line holds before its comment. A quote that is not closed ends the match early.
_BEFORE_COMMENT = re.compile(r"""(?:[^#'"]|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")*""")
_INCLUDE = re.compile(r"""include\s+(?P<quote>['"])(?P<file>[^'"]+)(?P=quote)""")
_ELEMENT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_WANTED = {  #: pydantic's error types that a user meets most, in plain words
    "bool_type": "True or False",
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "tuple_type": "a tuple, such as (a, b) or (a,)",
}
_MAX_SHOWN = 6  #: differing leaves that one error line spells out


@dataclass(frozen=True)
class Leaf:
    """One setting: its path, its value and what its annotation allows."""

    path: str
    value: object
    annotation: Any


@dataclass(frozen=True)
class Section:
    """A node that holds others: a dataclass with its fields, or a tuple of dataclasses with its members' names."""

    names: tuple[str, ...]
    is_tuple: bool = False


@dataclass(frozen=True)
class Override:
    """One line or flag that sets a leaf: the value still as text, and the file:line or flag it came from."""

    path: str
    text: str
    origin: str


@dataclass(frozen=True)
class Origin:
    """Who set a leaf that the recipe alone does not decide, and what the recipe had there."""

    source: str
    recipe_value: object


#: By path of leaf. A leaf that is not in it has the recipe's value.
Provenance: TypeAlias = dict[str, Origin]


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


#: Stands in a difference for the value of a leaf that one side does not have.
ABSENT = _Absent()


# The tree of leaves ---------------------------------------------------------------------------------------------------


def leaves(config: DataclassInstance) -> dict[str, Leaf]:
    """The settings of a config by dotted path, in the order of the schema."""
    return {path: node for path, node in _nodes(config) if isinstance(node, Leaf)}


def _nodes(config: DataclassInstance, prefix: str = "", omit: str = "") -> Iterator[tuple[str, Leaf | Section]]:
    """Every path from here on, in the order of the schema, sections before what they hold; "" is the config."""
    hints = typing.get_type_hints(type(config))
    names = tuple(f.name for f in dataclasses.fields(config) if f.name != omit)
    yield prefix, Section(names)
    for name in names:
        path, value = _join(prefix, name), getattr(config, name)
        if _is_dataclass(value):
            yield from _nodes(value, path)
        elif _holds_dataclasses(hints[name]):
            elements = _by_name(path, value)
            yield path, Section(tuple(elements), is_tuple=True)
            for element_name, element in elements.items():
                # The name is part of the path: were it a leaf too, setting it would move all its sisters.
                yield from _nodes(element, _join(path, element_name), omit="name")
        else:
            yield path, Leaf(path, value, hints[name])


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_dataclass(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _holds_dataclasses(annotation: Any) -> bool:
    arguments = typing.get_args(annotation)
    return typing.get_origin(annotation) is tuple and bool(arguments) and dataclasses.is_dataclass(arguments[0])


def _by_name(path: str, elements: Iterable[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for element in elements:
        if not _ELEMENT_NAME.fullmatch(element.name):
            raise ConfigError(f"{path}: name {element.name!r}: wanted letters, digits, _ and - alone")
        if element.name in named:
            raise ConfigError(f"{path}: two members are named {element.name!r}; names must differ")
        named[element.name] = element
    return named


def _with_values(value: Any, path: str, values: Mapping[str, object]) -> Any:
    """A copy of a (sub)config with the given leaves, by path, replaced."""
    if path in values:
        return values[path]
    if _is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value)]
        changed = {name: _with_values(getattr(value, name), _join(path, name), values) for name in fields}
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple) and value and _is_dataclass(value[0]):
        return tuple(_with_values(element, _join(path, element.name), values) for element in value)
    return value


# Sources of overrides -------------------------------------------------------------------------------------------------


def read_sources(files: Iterable[Path], flags: Iterable[str]) -> list[Override]:
    """Overrides of `--gin_file` files and `--gin.PATH=VALUE` flags, weakest first: files in order, then flags."""
    return [override for file in files for override in parse_file(file)] + parse_flags(flags)


def parse_flags(flags: Iterable[str]) -> list[Override]:
    """Overrides of flags spelled `--gin.PATH=VALUE`. All flags are one source. Any other flag is an error."""
    overrides = []
    for flag in flags:
        path, equals, text = flag.removeprefix(FLAG_PREFIX).partition("=")
        if not (flag.startswith(FLAG_PREFIX) and equals):
            raise ConfigError(f"{flag}: unknown flag; wanted {FLAG_PREFIX}PATH=VALUE")
        overrides.append(_override(path, text, FLAG_ORIGIN))
    return _each_path_once(overrides)


def parse_file(file: Path) -> list[Override]:
    """Overrides of a file, after those of the files it includes. A file that is included twice is read once."""
    return _parse_included(file, "", chain=(), done=set())


def parse_text(text: str, origin: str) -> list[Override]:
    """Overrides of lines that include nothing. `origin` stands where the name of a file would."""
    includes, overrides = _parse_lines(text, origin)
    for _, where in includes:
        raise ConfigError(f"{where}: include: only a file can include another")
    return overrides


def _parse_included(file: Path, included_at: str, chain: tuple[Path, ...], done: set[Path]) -> list[Override]:
    resolved, where = file.resolve(), f"{file} (included at {included_at})" if included_at else str(file)
    if resolved in chain:
        circle = " -> ".join(path.name for path in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{where}: include cycle: {circle}")
    if resolved in done:
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    includes, own = _parse_lines(text, str(file))
    included = [_parse_included(file.parent / name, at, (*chain, resolved), done) for name, at in includes]
    done.add(resolved)
    return [override for overrides in included for override in overrides] + own


def _parse_lines(text: str, file: str) -> tuple[list[tuple[str, str]], list[Override]]:
    """The include lines (file, where) and the overrides of one source."""
    includes: list[tuple[str, str]] = []
    overrides: list[Override] = []
    for number, raw in enumerate(text.split("\n"), start=1):
        where, line = f"{file}:{number}", _without_comment(raw)
        if include := _INCLUDE.fullmatch(line):
            if overrides:  # its place among the lines would silently decide who wins
                raise ConfigError(f"{where}: include must come before the first `path = value` line")
            includes.append((include["file"], where))
        elif line:
            path, equals, value = line.partition("=")
            if not equals:
                raise ConfigError(f'{where}: {line!r}: wanted `path = value` or `include "file.gin"`')
            overrides.append(_override(path, value, where))
    return includes, _each_path_once(overrides)


def _without_comment(line: str) -> str:
    end = typing.cast(re.Match[str], _BEFORE_COMMENT.match(line)).end()
    # Stopped at a quote that never closes: keep the line whole, so that the value is refused and not cut.
    return (line[:end] if line[end : end + 1] in ("", "#") else line).strip()


def _override(path: str, text: str, origin: str) -> Override:
    path, text = path.strip(), text.strip()
    if not path:
        raise ConfigError(f"{origin}: no path before the equals sign; wanted `path = value`")
    if not text:
        raise ConfigError(f"{path} ({origin}): no value; an empty string is written ''")
    return Override(path, text, origin)


def _each_path_once(overrides: list[Override]) -> list[Override]:
    first: dict[str, Override] = {}
    for override in overrides:
        before = first.setdefault(override.path, override)
        if before is not override:
            raise ConfigError(
                f"{override.path} ({override.origin}): set twice in one source: "
                f"first to {before.text} ({before.origin}), then to {override.text}"
            )
    return overrides


# Values ---------------------------------------------------------------------------------------------------------------


class _WordsAsStrings(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant(node.id)


def _parse_value(text: str) -> object:
    """A Python literal, in which bare words are strings; the text itself if it is none. Raises ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an invalid escape such as "\d" is an error, not a warning on stderr
            tree = ast.parse(text, mode="eval")
        if isinstance(tree.body, ast.Name):
            return text
        return ast.literal_eval(_WordsAsStrings().visit(tree))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if "'" in text or '"' in text:
            raise ValueError(f"{text} is not a Python literal; quote the whole string, or nothing of it") from error
        return text


def _value_for(leaf: Leaf, override: Override) -> object:
    """The value of an override as the leaf's type. Raises ConfigError naming leaf, origin and what is wanted."""
    where = f"{override.path} ({override.origin})"
    try:
        value = _parse_value(override.text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    adapter: TypeAdapter[object] = TypeAdapter(leaf.annotation, config=ConfigDict(strict=True, allow_inf_nan=False))
    readings = [value, _relaxed(value)]
    if value is not None and not isinstance(value, str):
        readings.append(override.text)  # `3` for a string is "3"; None for a string stays an error
    errors: list[ValidationError] = []
    for reading in readings:
        try:
            return adapter.validate_python(reading)
        except ValidationError as error:
            errors.append(error)
    reason = errors[1]  # of the relaxed reading: what is wrong with the value after all allowances
    raise ConfigError(f"{where}: {_wanted(reason, leaf.annotation)}, got {override.text}") from reason


def _relaxed(value: object) -> object:
    """What pydantic's strict mode refuses and we allow: a list for a tuple, 1e3 for an integer."""
    if isinstance(value, (list, tuple)):
        return tuple(_relaxed(item) for item in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wanted(error: ValidationError, annotation: Any) -> str:
    details = error.errors(include_url=False)[0]
    wanted = _WANTED.get(details["type"]) or details["msg"].removeprefix("Input should be ")
    if type(None) in typing.get_args(annotation):
        wanted += ", or None"
    index = next((part for part in details["loc"] if isinstance(part, int)), None)
    return f"wanted {wanted}" if index is None else f"index {index}: wanted {wanted}"


# Config and overrides -------------------------------------------------------------------------------------------------


def apply(config: ConfigT, overrides: Iterable[Override]) -> tuple[ConfigT, Provenance]:
    """The config with overrides in force, later ones winning, and who set what.

    Raises ConfigError for a path that is no leaf and for a value that the leaf's type does not allow, also when a
    later override of the same leaf would win.
    """
    nodes = dict(_nodes(config))
    values: dict[str, object] = {}
    provenance: Provenance = {}
    for override in overrides:
        leaf = nodes.get(override.path)
        if not isinstance(leaf, Leaf):
            raise _no_leaf(override.path, override.origin, nodes)
        values[leaf.path] = _value_for(leaf, override)
        provenance[leaf.path] = Origin(override.origin, leaf.value)
    return _with_values(config, "", values), provenance


def _no_leaf(path: str, origin: str, nodes: Mapping[str, Leaf | Section]) -> ConfigError:
    parent = path
    while not isinstance(section := nodes.get(parent), Section):
        parent = parent.rpartition(".")[0]
    fields = ", ".join(section.names) or "none"
    if parent == path:
        return ConfigError(f"{path} ({origin}): is a section and takes no value; fields of {path}: {fields}")
    paths = [name for name, node in nodes.items() if isinstance(node, Leaf)]
    same_field = [name for name in paths if name.rpartition(".")[2] == path.rpartition(".")[2]]
    close = difflib.get_close_matches(path, same_field, n=2, cutoff=0.0) or difflib.get_close_matches(path, paths, n=1)
    nearest = f"nearest: {' or '.join(close)}; " if close else ""
    return ConfigError(f"{path} ({origin}): unknown path; {nearest}fields of {parent or 'the config'}: {fields}")


# The operative config -------------------------------------------------------------------------------------------------


def dump(config: DataclassInstance, provenance: Provenance) -> str:
    """The operative config: versions, then every leaf with who set it. The same parser reads it back."""
    lines = [f"# Operative config of emu2_jax {emu2_jax.__version__}, python {platform.python_version()}"]
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    lines.append("# " + ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages))
    section = None
    for path, leaf in leaves(config).items():
        if section != (section := path.partition(".")[0]):
            lines.append("")
        lines.append(f"{path} = {leaf.value!r}  # {_describe(leaf, provenance)}")
    return "\n".join(lines) + "\n"


def _describe(leaf: Leaf, provenance: Provenance) -> str:
    origin = provenance.get(leaf.path)
    if origin is None:
        return "recipe"
    same = origin.recipe_value == leaf.value
    return origin.source if same else f"{origin.source} (recipe: {origin.recipe_value!r})"


def load(source: str | Path) -> dict[str, object]:
    """Values by path of an operative config, given as text or as the path of its file, without asking any schema."""
    overrides = parse_text(source, "operative config") if isinstance(source, str) else parse_file(source)
    values = {}
    for override in overrides:
        try:
            values[override.path] = _parse_value(override.text)
        except ValueError as error:
            raise ConfigError(f"{override.path} ({override.origin}): {error}") from error
    return values


def diff(a: DataclassInstance, b: DataclassInstance) -> list[tuple[str, object, object]]:
    """Leaves that differ between two configs: (path, value in a, value in b), ABSENT where one has no such leaf.

    Members of a tuple of dataclasses that stand in another order are one more row: (path of the tuple, names, names).
    """
    return _differences({path: leaf.value for path, leaf in leaves(a).items()}, b)


def _differences(before: Mapping[str, object], config: DataclassInstance) -> list[tuple[str, object, object]]:
    now = {path: leaf.value for path, leaf in leaves(config).items()}
    rows = [(path, before.get(path, ABSENT), now.get(path, ABSENT)) for path in {**now, **before}]
    for path, node in _nodes(config):
        if isinstance(node, Section) and node.is_tuple:
            depth = path.count(".") + 1
            names = tuple(dict.fromkeys(p.split(".")[depth] for p in before if p.startswith(path + ".")))
            if sorted(names) == sorted(node.names):  # else the rows of their leaves tell the difference
                rows.append((path, names, node.names))
    return [row for row in rows if row[1] != row[2]]


def compare_with_saved(config: DataclassInstance, saved_path: Path, allowed: Collection[str] = ()) -> None:
    """Raises ConfigError if a leaf differs from the saved operative config and is not allowed to.

    `allowed` holds paths of leaves, or of sections for all leaves below them. One that is neither here nor in the saved
    config is an error too: a mistyped permission must not look like one that was not needed.
    """
    saved, nodes = load(saved_path), dict(_nodes(config))
    for path in allowed:
        if path not in nodes and not any(_is_within(name, [path]) for name in saved):
            raise _no_leaf(path, ALLOW_FLAG, nodes)
    rows = [row for row in _differences(saved, config) if not _is_within(row[0], allowed)]
    if not rows:
        return
    shown = "; ".join(f"{path}: {_saved_and_now(before, now)}" for path, before, now in rows[:_MAX_SHOWN])
    more = f"; and {len(rows) - _MAX_SHOWN} more" if len(rows) > _MAX_SHOWN else ""
    raise ConfigError(
        f"{saved_path}: saved by a run of another config (saved -> now): {shown}{more}. Take another work directory, "
        f"or go on regardless with {ALLOW_FLAG}={rows[0][0] if len(rows) == 1 else 'PATH for each (leaf or section)'}"
    )


def _is_within(path: str, sections: Collection[str]) -> bool:
    return any(path == section or path.startswith(section + ".") for section in sections)


def _saved_and_now(saved: object, now: object) -> str:
    if saved is ABSENT:
        return f"not in the saved config -> {now!r}"
    return f"{saved!r} -> {'no such leaf in this config' if now is ABSENT else repr(now)}"


def format_diff(config: DataclassInstance, provenance: Provenance) -> str:
    """A table of the leaves that differ from the recipe: path, recipe's value, value now, who set it."""
    rows = [("path", "recipe", "now", "set by")]
    for path, leaf in leaves(config).items():
        origin = provenance.get(path)
        if origin and origin.recipe_value != leaf.value:
            rows.append((path, repr(origin.recipe_value), repr(leaf.value), origin.source))
    if len(rows) == 1:
        return "no differences from the recipe\n"
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(line.rstrip() + "\n" for line in lines)
