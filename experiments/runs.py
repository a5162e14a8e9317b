"""Runs and their work directories: resolve a config, guard the directory, train, and load what was trained."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import jax

from emu2_jax import overrides, sharding
from emu2_jax.checkpoint import CONVERTED_STEP, FOLDER, load_parts, saved_parts, saved_step
from emu2_jax.config import ExperimentConfig, validate
from emu2_jax.errors import CheckpointError, ConfigError
from emu2_jax.metrics import JSONL
from emu2_jax.task import Params
from emu2_jax.train import build_program, train
from experiments import recipes
from experiments.inputs import batch_rows, make_task, open_input, open_tokenizer
from experiments.previews import open_previews

CONFIG = "config.gin"
LOCK = "train.lock"


def resolve(
    recipe: str, gin_files: Iterable[Path], gin_flags: Iterable[str]
) -> tuple[ExperimentConfig, overrides.Provenance]:
    """The recipe with its overrides applied and checked. Raises `ConfigError`."""
    config, provenance = overrides.apply(recipes.get(recipe), overrides.read_sources(gin_files, gin_flags))
    if config.name != recipe:
        raise ConfigError(f"name: is the recipe's, {recipe}, and cannot be overridden; a run is named by its --workdir")
    return validate(config), provenance


def override(config: ExperimentConfig, gin_files: Iterable[Path], gin_flags: Iterable[str]) -> ExperimentConfig:
    """A config with overrides applied and checked. Raises `ConfigError`."""
    return validate(overrides.apply(config, overrides.read_sources(gin_files, gin_flags))[0])


def run_training(
    config: ExperimentConfig,
    provenance: overrides.Provenance,
    workdir: Path,
    *,
    allowed_changes: Collection[str] = (),
) -> None:
    """Train in `workdir`, or go on there. Everything that can be wrong is looked at before anything compiles."""
    saved = workdir / CONFIG
    if saved.exists():
        overrides.compare_with_saved(config, saved, allowed_changes)
    elif (workdir / FOLDER).exists() or (workdir / JSONL).exists():
        raise CheckpointError(f"{workdir}: holds a run but no {CONFIG}; give another --workdir")
    mesh = sharding.make_mesh(config.mesh)
    for path, rows in batch_rows(config).items():
        sharding.check_batch(rows, config.optimizer.accumulation_steps, mesh, path)
    tokenizer = open_tokenizer(config) if config.train.task == "pretrain" else None
    data = open_input(config, tokenizer, allowed_changes)
    if config.train.init_from is not None and not (workdir / FOLDER).exists():
        _say_if_unfinished(Path(config.train.init_from))
    task = make_task(config, tokenizer)
    program = build_program(task, config)
    for source, counts in data.summary.items():
        print(f"{source}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")
    preview = open_previews(config, workdir)
    text = overrides.dump(config, provenance)
    with _alone_in(workdir):
        _write_atomically(saved, text)
        train(
            config,
            task,
            program,
            data,
            workdir,
            operative_config=text,
            say=print,
            inspect=data.check_encoder,
            preview=preview,
        )


def _say_if_unfinished(stage: Path) -> None:
    """Print a line when an earlier stage has steps left to train; `CheckpointError` when it has no checkpoint."""
    step = saved_step(stage)
    if step == CONVERTED_STEP or not (stage / CONFIG).exists():
        return
    wanted = load_config(stage).train.num_steps
    if step < wanted:
        print(f"train.init_from: {stage} stopped at step {step} of {wanted}; it is taken as it is")


@contextlib.contextmanager
def _alone_in(workdir: Path) -> Iterator[None]:
    """Make `workdir` and keep other trainers out of it; two writers would destroy each other's checkpoints."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / LOCK).open("w", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{workdir}: cannot be made a work directory: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process ends, however
        except OSError as error:
            raise CheckpointError(f"{workdir}: another process is training here; wait for it or stop it") from error
        yield


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def load_config(workdir: Path) -> ExperimentConfig:
    """The operative config that `workdir` was trained with."""
    path = workdir / CONFIG
    if not path.exists():
        raise CheckpointError(f"{workdir}: is no work directory of `emu2 train` (it has no {CONFIG})")
    name = str(overrides.load(path).get("name"))
    return overrides.apply(recipes.get(name), overrides.parse_file(path))[0]


def load_params(workdir: Path, config: ExperimentConfig) -> Params:
    """The newest parameters of `workdir`, float32, on the first device."""
    shapes = jax.eval_shape(make_task(config, None).init, jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = saved_parts(workdir)
    wanted = {
        part: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), tree)
        for part, tree in shapes.items()
        if part in saved
    }
    return load_parts(workdir, wanted, fit=lambda path, saved, shape: None)
