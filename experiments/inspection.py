"""`emu2 inspect`: what a work directory or weight files hold, what of it trains, and what a device of a mesh takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from emu2_jax import optimizer as optimizer_lib
from emu2_jax import sharding
from emu2_jax.checkpoint import FOLDER
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError
from emu2_jax.weights.convert import adapted, recognise
from emu2_jax.weights.diffusers_weights import fit_condition
from emu2_jax.weights.files import missing_files, open_weights
from emu2_jax.weights.names import Form, all_names, official_shapes, table
from emu2_jax.weights.state_dict import resolve
from emu2_jax.weights.stream import open_parameters
from emu2_jax.weights.table import numberless
from experiments.inputs import make_task
from experiments.runs import CONFIG, load_config
from experiments.runs import resolve as resolve_config


@dataclass(frozen=True)
class _Entry:
    """One array of what is inspected."""

    name: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def inspect(
    path: str,
    recipe: str | None,
    gin_files: Iterable[Path],
    gin_flags: Iterable[str],
    *,
    mesh: str | None = None,
    tensors: bool = False,
) -> str:
    """The text of `emu2 inspect`. With a recipe, official names are resolved at its size; all must be there."""
    gin_files, gin_flags = list(gin_files), list(gin_flags)
    if recipe is None and (gin_files or gin_flags):
        raise ConfigError("--gin: settings change a recipe; name it with --recipe")
    config = resolve_config(recipe, gin_files, gin_flags)[0] if recipe else None
    if (Path(path) / FOLDER).is_dir() or (Path(path) / CONFIG).exists():
        entries, title, config = _saved_entries(Path(path), config)
    elif (names := missing_files(path)) is not None:
        entries, title = [], _names_alone(path, names, config)
    else:
        entries, title = _file_entries(path, config)
    lines = [title]
    if entries:
        lines += ["", *_parts_table(entries, config)]
    if mesh is not None:
        if config is None:
            raise ConfigError("--mesh: what a device takes depends on what trains; name a recipe with --recipe")
        lines += ["", *_device_table(config, _mesh_of(mesh))]
    if tensors:
        width = max((len(entry.name) for entry in entries), default=0)
        lines += ["", *(f"  {e.name:<{width}}  {e.dtype:<9} {' x '.join(map(str, e.shape))}" for e in entries)]
    return "\n".join(lines)


def _saved_entries(workdir: Path, config: ExperimentConfig | None) -> tuple[list[_Entry], str, ExperimentConfig]:
    own = load_config(workdir)
    entries = [
        _Entry(path, path.split("/")[0], tuple(parameter.shape), str(parameter.dtype), parameter.dtype.itemsize)
        for path, parameter in open_parameters(workdir).items()
    ]
    return entries, f"{workdir}: a work directory of {own.name}", config or own


def _names_alone(path: str, names: Sequence[str], config: ExperimentConfig | None) -> str:
    """An index whose weight files are elsewhere tells names, not shapes."""
    form = recognise(names, path)
    line = f"{path}: {len(names)} names of form {form}; the files that it names are not here"
    if config is None:
        return line
    rows = table(form, config.model, config.decoder)
    shapes = official_shapes(form, config.model, config.decoder)
    free = {row.path for row in rows.rows}
    resolution = resolve(rows, {name: shapes.get(name, ()) for name in names}, source=path, free=free)
    return f"{line}\n{_all_resolved(config, len(names), len(resolution.skipped))}"


def _all_resolved(config: ExperimentConfig, count: int, skipped: int) -> str:
    return f"all {count - skipped} tensors of {config.name} are there; {skipped} more are known and skipped"


def _file_entries(path: str, config: ExperimentConfig | None) -> tuple[list[_Entry], str]:
    opened = open_weights(path)
    form = recognise(list(opened), path)
    title = f"{path}: {len(opened)} tensors of form {form}"
    if config is not None:
        rows = table(form, config.model, config.decoder)
        shapes = {name: tensor.shape for name, tensor in opened.items()}
        if form == "unet":
            fitted = fit_condition(opened, config.decoder.unet, jax.random.key(0), source=path)
            shapes = {name: tensor.shape for name, tensor in fitted.tensors.items()}
            title = "\n".join([title, *fitted.notes])
        resolution = resolve(rows, shapes, source=path, free=adapted(form))
        title += f"\n{_all_resolved(config, len(opened), len(resolution.skipped))}"
    part_of = _part_finder(form)
    entries = []
    for name, tensor in opened.items():
        itemsize = tensor.dtype.itemsize if tensor.dtype else 0
        entries.append(_Entry(name, part_of(name), tensor.shape, str(tensor.dtype or tensor.dtype_name), itemsize))
    return entries, title


def _part_finder(form: Form) -> Callable[[str], str]:
    """Which part a tensor belongs to, by its name, whatever the number of layers."""
    rows = all_names(form)
    parts = {numberless(name): row.path.split("/")[0] for row in rows.rows for name in (row.name, *row.aliases)}

    def part_of(name: str) -> str:
        return "(skipped)" if rows.skip_reason(name) else parts.get(numberless(name), "(unknown)")

    return part_of


def _parts_table(entries: Sequence[_Entry], config: ExperimentConfig | None) -> list[str]:
    shapes = _shapes(config) if config else {}
    trained = optimizer_lib.split_frozen(config.optimizer, shapes)[0] if config else {}
    heading = f"under {config.name}" if config else ""
    lines = [f"  {'part':<16} {'tensors':>8} {'parameters':>16} {'GB':>9}  {'dtype':<10} {heading}".rstrip()]

    def line(title: str, own: Sequence[_Entry], fate: str) -> str:
        dtypes = ", ".join(sorted({entry.dtype for entry in own}))
        nbytes = sum(entry.count * entry.itemsize for entry in own)
        count = sum(entry.count for entry in own)
        return f"  {title:<16} {len(own):>8,} {count:>16,} {nbytes / 1e9:>9.3f}  {dtypes:<10} {fate}".rstrip()

    for part in dict.fromkeys(entry.part for entry in entries):
        fate = "" if config is None else "trains" if part in trained else "frozen" if part in shapes else "not in it"
        lines.append(line(part, [entry for entry in entries if entry.part == part], fate))
    return [*lines, line("total", entries, "")]


def _shapes(config: ExperimentConfig) -> dict[str, Any]:
    return dict(jax.eval_shape(make_task(config, None).init, jax.random.key(0)))


def _mesh_of(text: str) -> Mesh:
    """`data=1,fsdp=8,tensor=2` as a mesh of devices that need not be there; an axis that is not named has size 1."""
    sizes = dict.fromkeys(sharding.AXES, 1)
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh: got {item!r}; wanted {','.join(f'{name}=SIZE' for name in sizes)}")
        sizes[axis] = int(size)
    return cast(Mesh, AbstractMesh(tuple(sizes.values()), sharding.AXES))


def _device_table(config: ExperimentConfig, mesh: Mesh) -> list[str]:
    """Bytes that each part takes on one device while the recipe runs: parameters, gradients, Adam's moments."""
    trained, frozen = optimizer_lib.split_frozen(config.optimizer, _shapes(config))
    storage = np.dtype(jax.dtypes.canonicalize_dtype(config.model.frozen_dtype))
    optimizer = optimizer_lib.build(config.optimizer, config.train.num_steps)

    def on_device(tree: Any) -> int:
        return sharding.bytes_per_device(tree, sharding.parameter_shardings(tree, mesh))

    sizes = "  x  ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"  on one device of {sizes} ({math.prod(mesh.shape.values())} devices), GB",
        f"  {'part':<16} {'parameters':>11} {'gradients':>11} {'moments':>11}",
    ]
    rows: list[tuple[str, int, int, int]] = []
    for part, tree in trained.items():
        own = {part: tree}
        state = jax.eval_shape(optimizer.init, own)
        moments = sharding.bytes_per_device(state, sharding.optimizer_shardings(optimizer, state, own, mesh))
        rows.append((part, on_device(own), on_device(own), moments))
    for part, tree in frozen.items():
        stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, storage), tree)
        rows.append((part, on_device({part: stored}), 0, 0))
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows), sum(row[3] for row in rows)))
    for name, *columns in rows:
        lines.append(f"  {name:<16} " + " ".join(f"{nbytes / 1e9:>11.3f}" for nbytes in columns))
    return [*lines, "  activations and batches come on top; the compiled step says how much"]
