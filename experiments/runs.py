"""Runs and their work directories: resolve a config, guard the directory, train, and load what was trained."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import jax

from emu2_jax import hosts, overrides, sharding
from emu2_jax.checkpoint import CONVERTED_STEP, FOLDER, load_parts, saved_parts, saved_step
from emu2_jax.config import ExperimentConfig, validate
from emu2_jax.errors import CheckpointError, ConfigError, HostsError
from emu2_jax.goodput import Goodput
from emu2_jax.metrics import JSONL
from emu2_jax.pods import saved_steps
from emu2_jax.task import Params
from emu2_jax.tokenizer import Tokenizer
from emu2_jax.train import build_program, train
from experiments import recipes
from experiments.inputs import TrainingInput, batch_rows, make_task, open_input, open_tokenizer, source_shapes
from experiments.previews import open_previews

CONFIG = "config.gin"
LOCK = "train.lock"
LOCK_PATIENCE_S = 10.0
SHARED_PATIENCE_S = 30.0  #: directories of a network may lag behind


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


#: Settings on which nothing depends that a run computes.
MAY_CHANGE = ("train.profile_steps",)


def run_training(
    config: ExperimentConfig,
    provenance: overrides.Provenance,
    workdir: Path,
    *,
    allowed_changes: Collection[str] = (),
    compiled: Path | None = None,
) -> None:
    """Train in `workdir`, or go on there. Everything that can be wrong is looked at before anything compiles.

    On several hosts, each calls it; they compare what they are about to do, and host 0 guards the directory. `compiled`
    is a directory of `emu2 plan --save`, whose steps are used where they are this run's own.
    """
    goodput = Goodput()
    _check_installations(config)
    say: Callable[[str], None] = print if hosts.index() == 0 else lambda line: None
    saved = workdir / CONFIG
    if saved.exists():
        overrides.compare_with_saved(config, saved, {*allowed_changes, *MAY_CHANGE})
    elif (workdir / FOLDER).exists() or (workdir / JSONL).exists():
        raise CheckpointError(f"{workdir}: holds a run but no {CONFIG}; give another --workdir")
    _check_devices()
    mesh = sharding.make_mesh(config.mesh)
    for path, rows in batch_rows(config).items():
        sharding.check_batch(rows, config.optimizer, mesh, path)
    tokenizer = open_tokenizer(config) if config.train.task == "pretrain" else None
    data = _open_in_turn(config, tokenizer, allowed_changes, sharding.row_shares(mesh, jax.process_index()))
    if config.train.init_from is not None and not (workdir / FOLDER).exists():
        _say_if_unfinished(Path(config.train.init_from), say)
    task = make_task(config, tokenizer)
    program = build_program(task, config)
    if compiled is not None:
        batches = list(source_shapes(config).values())
        program = program._replace(step=saved_steps.load(program, batches, compiled, say))
    for source, counts in data.summary.items():
        say(f"{source}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")
    preview = open_previews(config, workdir)
    text = overrides.dump(config, provenance)

    def keep_config() -> None:
        if hosts.index() == 0:
            write_atomically(saved, text)

    def inspect(params: Params) -> None:
        data.check_encoder(params)
        keep_config()  # allowed changes, now that the checkpoint has been taken up with them

    with _alone_in(workdir):
        if not saved.exists():
            keep_config()
        train(
            *(config, task, program, data, workdir),
            operative_config=text,
            say=say,
            inspect=inspect,
            goodput=goodput,
            preview=preview,
        )


def _check_installations(config: ExperimentConfig) -> None:
    """All hosts run the same config with the same program; before a device is touched."""
    settings = {path: repr(leaf.value) for path, leaf in overrides.leaves(config).items()}
    packages = {name: importlib.metadata.version(name) for name in ("emu2_jax", "jax", "jaxlib", "orbax-checkpoint")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    if len(set(hosts.gather("settings", digest))) > 1:  # which ones, only now: a config is long, hosts are many
        hosts.check_alike("each setting", settings)
    hosts.check_alike("packages", {"Python": platform.python_version(), **packages})


def _check_devices() -> None:
    """All hosts bring along the same devices. This is the first touch of them."""
    local = jax.local_devices()
    hosts.check_alike("devices", {"number of devices": len(local), "kind of device": local[0].device_kind})


def _open_in_turn(
    config: ExperimentConfig, tokenizer: Tokenizer | None, allowed: Collection[str], shares: sharding.RowShares
) -> TrainingInput:
    """Host 0 first: it builds the indexes that are missing, and the others find them."""
    if hosts.index() > 0:
        hosts.wait("indexes")
    data = open_input(config, tokenizer, allowed, shares)
    if hosts.index() == 0:
        hosts.wait("indexes")
    hosts.check_alike("data", {"the data (shards, samples, their order)": data.identity})
    return data


def _say_if_unfinished(stage: Path, say: Callable[[str], None]) -> None:
    """Print a line when an earlier stage has steps left to train; `CheckpointError` when it has no checkpoint."""
    step = saved_step(stage)
    if step == CONVERTED_STEP or not (stage / CONFIG).exists():
        return
    wanted = load_config(stage).train.num_steps
    if step < wanted:
        say(f"train.init_from: {stage} stopped at step {step} of {wanted}; it is taken as it is")


@contextlib.contextmanager
def _alone_in(workdir: Path) -> Iterator[None]:
    """Make `workdir` and keep other trainers out of it; two writers would destroy each other's checkpoints.

    Of several hosts, the first does so for all; the others look whether they see the same directory.
    """
    if hosts.index() > 0:
        _check_shared(workdir)
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / LOCK).open("w", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{workdir}: cannot be made a work directory: {error.strerror}") from error
    with lock:
        _lock(lock, workdir)
        _check_shared(workdir)
        yield


def _lock(lock: IO[str], workdir: Path) -> None:
    """The system drops the lock when the process ends, however; one that was just killed may still be about to."""
    deadline = time.monotonic() + (LOCK_PATIENCE_S if hosts.count() > 1 else 0)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() >= deadline:
                text = f"{workdir}: another process is training here; wait for it or stop it"
                raise CheckpointError(text) from error
            time.sleep(0.2)
        else:
            return


def _check_shared(workdir: Path) -> None:
    """All hosts see the same directory: each of them writes its part of a checkpoint there."""
    if hosts.count() == 1:
        return
    path, mark = workdir / LOCK, hosts.gather("mark", secrets.token_hex(8))[0]
    if hosts.index() == 0:
        path.write_text(mark, encoding="utf-8")
    hosts.wait("marked")
    seen, deadline = False, time.monotonic() + SHARED_PATIENCE_S
    while not seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            seen = path.read_text(encoding="utf-8") == mark
        if not seen:
            time.sleep(0.2)
    blind = [str(host) for host, sees in enumerate(hosts.gather("seen", seen)) if not sees]
    if blind:
        raise HostsError(
            f"{workdir}: is another directory on host {', '.join(blind)} than on host 0; put it on storage that all "
            "hosts share"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
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


#: The parts that generation computes in one dtype.
LANGUAGE_PARTS = ("project_up", "language_model", "project_down")


def load_params(
    workdir: Path, config: ExperimentConfig, *, mesh: jax.sharding.Mesh | None = None, language_dtype: str = "float32"
) -> Params:
    """The newest parameters of `workdir`, on the first device or laid out on a mesh.

    float32, but for the language model and the connector, which have `language_dtype`.
    """
    shapes = jax.eval_shape(make_task(config, None).init, jax.random.key(0))
    shapes = {part: tree for part, tree in shapes.items() if part in saved_parts(workdir)}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: here, shapes) if mesh is None else sharding.parameter_shardings(shapes, mesh)

    def wanted(part: str) -> Any:
        def leaf(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            dtype = language_dtype if part in LANGUAGE_PARTS else shape.dtype
            return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)

        return jax.tree.map(leaf, shapes[part], where[part])

    return load_parts(workdir, {part: wanted(part) for part in shapes}, fit=lambda path, saved, shape: None)
