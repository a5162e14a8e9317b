"""A compiled step is kept, and used by the run whose step it is; by no other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import CheckpointError
from emu2_jax.pods import saved_steps
from emu2_jax.pods.compiling import CompiledStep, Shapes, compile_step
from emu2_jax.sequence import batch_shapes, empty_batch
from emu2_jax.train import BatchPlacer, Program, build_program


def shapes(rows: int = 2) -> Shapes:
    return {name: (dims, np.dtype(dtype)) for name, (dims, dtype) in batch_shapes(rows, tiny.ROW_SHAPE).items()}


def program(config: ExperimentConfig = tiny.CONFIG) -> Program:
    return build_program(tiny.task(optimizer=config.optimizer), config, jax.devices()[:1])


@pytest.fixture(scope="module")
def compiled() -> CompiledStep:
    return compile_step(program(), shapes())


@pytest.fixture(scope="module")
def directory(compiled: CompiledStep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compiled") / "steps"
    saved_steps.save(compiled, program(), shapes(), directory)
    return directory


def loaded(own: Program, directory: Path, rows: int = 2) -> tuple[bool, str]:
    """Whether the saved step is used, and what is said."""
    said: list[str] = []
    step = saved_steps.load(own, [shapes(rows)], directory, said.append)
    (line,) = said
    return step is not own.step, line


def test_the_same_run_uses_it_and_computes_the_same_bits(compiled: CompiledStep, directory: Path) -> None:
    own = program()
    said: list[str] = []
    step = saved_steps.load(own, [shapes()], directory, said.append)
    assert said == [f"--compiled {directory}: the step for batches of 2 rows is loaded, not compiled"]
    batch = BatchPlacer(own.mesh)(empty_batch(2, tiny.ROW_SHAPE, tiny.PAD))
    state, log = step(own.init(), batch)
    expected, expected_log = compiled.executable(own.init(), batch)
    jax.tree.map(np.testing.assert_array_equal, (state, log), (expected, expected_log))
    assert own.step._cache_size() == 0  # type: ignore[attr-defined]  # nothing was compiled


def test_batches_of_another_shape_are_compiled(directory: Path) -> None:
    used, line = loaded(program(), directory, rows=4)
    assert not used
    assert line.endswith("not used for batches of 4 rows, which compile anew: it holds none for them")


def test_another_program_does_not_use_it(directory: Path) -> None:
    optimizer = dataclasses.replace(tiny.CONFIG.optimizer, beta1=0.8)
    used, line = loaded(program(dataclasses.replace(tiny.CONFIG, optimizer=optimizer)), directory)
    assert not used
    assert "its program is" in line


@pytest.mark.parametrize("field", ["compiler", "options", "jax", "devices", "mesh"])
def test_another_compiler_or_machine_does_not_use_it(directory: Path, tmp_path: Path, field: str) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (note,) = tmp_path.glob("*.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), field: "another"}))
    used, line = loaded(program(), tmp_path)
    assert not used
    assert f"its {field} is 'another', this run's " in line


def test_a_damaged_file_is_not_loaded(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (file,) = tmp_path.glob(f"*{saved_steps.SUFFIX}")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    used, line = loaded(program(), tmp_path)
    assert not used
    assert line.endswith("is damaged: its checksum differs")


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory; `emu2 plan"):
        saved_steps.load(program(), [shapes()], tmp_path / "none", print)
