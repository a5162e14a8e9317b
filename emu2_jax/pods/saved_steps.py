"""Compiled steps on disk: made where there is time, loaded where every minute is paid for.

A directory holds one file per batch shape, and beside it what the step was compiled from. A run loads a step only when
all of that is its own; otherwise it says what differs, and compiles. The files are executables: load none that you, or
someone you trust, did not write.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from emu2_jax import compiler_options
from emu2_jax.errors import CheckpointError
from emu2_jax.pods.compiling import CompiledStep, Shapes, abstract_batch
from emu2_jax.task import Batch
from emu2_jax.train import Program, State

SUFFIX = ".compiled"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a compiled step was made from. Two steps of equal origins are the same."""

    batch: str  #: shapes of the global batch
    devices: str
    mesh: str
    jax: str
    jaxlib: str
    compiler: str
    options: str
    program: str  #: fingerprint of the step as it is traced, before compilation

    def difference(self, other: Origin) -> str | None:
        """The first thing that `other` has otherwise, in words; None when there is none."""
        for field in fields(self):
            own, its = getattr(self, field.name), getattr(other, field.name)
            if own != its:
                return f"its {field.name} is {its!r}, this run's {own!r}"
        return None


def origin(program: Program, shapes: Shapes, program_text: str) -> Origin:
    """Where a step of `program` for `shapes` comes from."""
    device = program.mesh.devices.flat[0]
    # TPUs number their devices along the slice, so that kind and number say how they are wired.
    slices = len({getattr(device, "slice_index", 0) for device in program.mesh.devices.flat})
    options = compiler_options.for_device(device)
    return Origin(
        batch=_described(shapes),
        devices=f"{program.mesh.devices.size} x {device.device_kind}, {slices} slice(s)",
        mesh=", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items()),
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        compiler=" ".join(device.client.platform_version.split()),
        options=", ".join(f"{name}={value}" for name, value in sorted(options.items())),
        program=hashlib.sha256(program_text.encode()).hexdigest()[:16],
    )


def _described(shapes: Shapes) -> str:
    return ", ".join(f"{name} {dtype.name}{list(dims)}" for name, (dims, dtype) in sorted(shapes.items()))


def save(step: CompiledStep, program: Program, shapes: Shapes, directory: Path) -> Path:
    """Write a compiled step into `directory`, in place of one for the same batch. Returns the file."""
    made_from = origin(program, shapes, step.program_text)
    executable, _, _ = serialize_executable.serialize(step.executable)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / (hashlib.sha256(made_from.batch.encode()).hexdigest()[:16] + SUFFIX)
        _write(path, executable)
        # Last: a step without its origin is none.
        digest = hashlib.sha256(executable).hexdigest()
        _write(path.with_suffix(".json"), json.dumps({**asdict(made_from), "sha256": digest}, indent=1).encode())
    except OSError as error:
        raise CheckpointError(f"--save {directory}: cannot be written: {error.strerror}") from error
    return path


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def load(
    program: Program, batches: Sequence[Shapes], directory: Path, say: Callable[[str], None]
) -> Callable[[State, Batch], tuple[State, dict[str, Any]]]:
    """The step of `program`, with what `directory` holds in place of compiling, batch shape by batch shape.

    Raises `CheckpointError` when there is no such directory. A step that does not agree is left alone, with the reason.
    """
    if not directory.is_dir():
        raise CheckpointError(f"--compiled {directory}: is no directory; `emu2 plan ... --save {directory}` makes it")
    steps: dict[str, Callable[..., Any]] = {}
    for shapes in batches:
        found, reason = _load_one(program, shapes, directory)
        rows = next(iter(shapes.values()))[0][0]
        if found is None:
            say(f"--compiled {directory}: not used for batches of {rows} rows, which compile anew: {reason}")
        else:
            say(f"--compiled {directory}: the step for batches of {rows} rows is loaded, not compiled")
            steps[_described(shapes)] = found
    if not steps:
        return program.step

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
        return steps.get(_described(shapes), program.step)(state, dict(batch))

    return step


def _load_one(program: Program, shapes: Shapes, directory: Path) -> tuple[Callable[..., Any] | None, str]:
    """A loaded step, or None and why."""
    batch = abstract_batch(shapes, program)
    path = directory / (hashlib.sha256(_described(shapes).encode()).hexdigest()[:16] + SUFFIX)
    try:
        noted: Mapping[str, str] = json.loads(path.with_suffix(".json").read_text())
        saved = Origin(**{field.name: noted[field.name] for field in fields(Origin)})
        executable = path.read_bytes()
    except FileNotFoundError:
        return None, "it holds none for them"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path.with_suffix('.json')} cannot be read ({error})"
    lowered = program.step.lower(program.abstract_state, batch)  # type: ignore[attr-defined]
    difference = origin(program, shapes, lowered.as_text()).difference(saved)
    if difference:
        return None, difference
    if hashlib.sha256(executable).hexdigest() != noted.get("sha256"):
        return None, f"{path} is damaged: its checksum differs"
    devices = list(program.mesh.devices.flat)
    in_tree = jax.tree.structure(((program.abstract_state, batch), {}))
    out_tree = jax.tree.structure(lowered.out_info)
    try:
        loaded = serialize_executable.deserialize_and_load(
            executable, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return None, f"the runtime refuses it: {str(error).splitlines()[0]}"
    return loaded, ""
