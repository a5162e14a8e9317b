"""Checkpoints of a work directory: Orbax, asynchronous, and always a complete one to go on from.

A checkpoint holds three items: `state` (step, params, opt_state, rng; ema where the run keeps a moving average),
`input` (the data position and its counters) and `config` (the operative config). What another stage, an evaluation or
an export reads of a part that has a moving average is the average; only the run itself goes on from both. Orbax writes
into a temporary name and renames when all is on disk, so a killed writer leaves no directory that looks complete.

On several hosts a checkpoint is one: each host writes its shards into the same directory. What is gone on with is
decided together, for a checkpoint that one host cannot read is of no use to the others.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from emu2_jax import hosts
from emu2_jax.config import CheckpointConfig
from emu2_jax.errors import CheckpointError, first_line
from emu2_jax.sharding import path_of

FOLDER = "checkpoints"

#: Step of a checkpoint that was converted from released weights: nothing was trained here.
CONVERTED_STEP = 0

# Orbax tells every save and every option it derives; what a user has to know is said below, and errors are raised.
logging.getLogger("absl").setLevel(logging.ERROR)

_INCOMPLETE = ".incomplete"


#: Most bytes of a chunk of a layer on disk, and of layers that share one.
CHUNK_BYTES, SMALL_BYTES = 32 << 20, 1 << 20


def layer_chunks(layer_bytes: int) -> ocp.SaveArgs:
    """How parameters stacked on an axis of layers are cut: by layer, so that reading one does not read all others."""
    return ocp.SaveArgs(chunk_byte_size=min(max(layer_bytes, SMALL_BYTES), CHUNK_BYTES), shard_axes=(0,))


def _chunks(state: Any) -> Any:
    def of(path: Any, leaf: Any) -> ocp.SaveArgs:
        stacked = any(getattr(entry, "key", None) == "layers" for entry in path)
        if not stacked or not isinstance(leaf, jax.Array):
            return ocp.SaveArgs()
        return layer_chunks(math.prod(leaf.sharding.shard_shape(leaf.shape)[1:]) * leaf.dtype.itemsize)

    return jax.tree_util.tree_map_with_path(of, state)


class Checkpointer:
    """The checkpoints of one work directory.

    `say` receives one line for everything the user should know: an unfinished or unreadable checkpoint, say.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, say: Callable[[str], None]) -> None:
        self._folder = (workdir / FOLDER).absolute()
        self._say = say
        if hosts.index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
        hosts.wait("checkpoints")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            enable_async_checkpointing=config.asynchronous,
            step_format_fixed_length=8,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "input", "config"))

    def _remove_unfinished(self) -> None:
        """A save that was killed leaves a temporary directory: say so, and clear it away."""
        unfinished = [path for path in self._folder.iterdir() if ocp.utils.is_tmp_checkpoint(path)]
        for path in unfinished:
            self._say(f"{path}: this checkpoint was never finished (the run was stopped while writing); ignored")
            shutil.rmtree(path)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, input_state: Mapping[str, Any], config_text: str) -> None:
        """Write a checkpoint; returns when the arrays are copied, not when they are on disk."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state, save_args=_chunks(state)),
                input=ocp.args.JsonSave(dict(input_state)),
                config=ocp.args.JsonSave({"text": config_text}),
            ),
            force=True,
        )

    def restore(self, abstract_state: Any) -> tuple[Any, Mapping[str, Any]] | None:
        """State (placed as `abstract_state` says) and input state of the newest checkpoint that can be read.

        None when there is no checkpoint. A checkpoint that cannot be read is moved aside, with a line that says so,
        and the one before it is used; when there are checkpoints and none can be read, `CheckpointError`.
        """
        steps = sorted(hosts.gather("steps", list(self._manager.all_steps()))[0], reverse=True)
        for step in steps:
            self._check_same_model(step, abstract_state)
            self._check_trained(step)
            restored, problem = _together(functools.partial(self._read, step, abstract_state))
            if restored is not None:
                return restored
            aside = self._set_aside(step)
            self._say(f"checkpoint {step} cannot be read ({problem}); moved to {aside}")
        if steps:
            raise CheckpointError(f"{self._folder}: none of the checkpoints {steps} can be read; see the lines above")
        return None

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, Mapping[str, Any]]:
        folder = self._folder / f"{step:08d}"
        state = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))
        return state, ocp.JsonCheckpointHandler().restore(folder / "input", args=ocp.args.JsonRestore())

    def _check_same_model(self, step: int, abstract_state: Any) -> None:
        """Raise `CheckpointError` when the checkpoint is whole but of another model: nothing is wrong with it."""
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(self._folder / f"{step:08d}" / "state").tree
            saved = _shapes(tree)
        except _UNREADABLE:
            return  # damaged; reading it will say how
        wanted = _shapes(abstract_state)
        if ("ema" in tree) != ("ema" in abstract_state):
            there = "a" if "ema" in tree else "no"
            raise CheckpointError(
                f"{self._folder}: checkpoint {step} has {there} moving average of the parameters, and "
                f"optimizer.ema_decay is {'not ' if 'ema' in tree else ''}set; a run keeps one from its start or not "
                "at all: take another work directory"
            )
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{self._folder}: checkpoint {step} is of another model: {name} is {saved.get(name, 'not in it')} "
                    f"there, {wanted.get(name, 'not wanted')} here; take another work directory"
                )

    def _check_trained(self, step: int) -> None:
        """Raise `CheckpointError` for converted weights: a run starts from them, it does not go on in their place."""
        try:
            saved = ocp.PyTreeCheckpointHandler().metadata(self._folder / f"{step:08d}" / "state").tree
        except _UNREADABLE:
            return  # damaged; reading it will say how
        if set(saved) == {"params"}:
            raise CheckpointError(
                f"{self._folder.parent}: holds converted weights, without an optimiser's state to go on from; give "
                f"another --workdir, and --gin.train.init_from={self._folder.parent}"
            )

    def _set_aside(self, step: int) -> Path:
        source = self._folder / f"{step:08d}"
        target = source.with_name(source.name + _INCOMPLETE)
        if hosts.index() == 0:
            count = 1
            while target.exists():
                target = source.with_name(f"{source.name}{_INCOMPLETE}{count}")
                count += 1
            source.rename(target)
        hosts.wait("aside")
        self._manager.reload()
        return target

    def wait(self) -> None:
        """Return when the last save is on disk; raises if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish pending work."""
        self._manager.close()


#: What reading a damaged checkpoint ends in: Orbax has no error of its own for it.
_UNREADABLE = (ValueError, OSError, KeyError, TypeError)

T = TypeVar("T")


def _together(read: Callable[[], T]) -> tuple[T | None, str]:
    """What `read` gives, if it does on every host; else None and what was wrong, on all of them.

    Nothing in `read` may wait for other hosts (as Orbax's managers do): one that fails does not come that far.
    """
    result, problem = None, None
    try:
        result = read()
    except Exception as error:
        # An array that lies in several shards: a bare Exception, around what was wrong.
        if not isinstance(error, _UNREADABLE) and type(error) is not Exception:
            raise
        problem = first_line(error.__cause__ or error)
    problems = {host: told for host, told in enumerate(hosts.gather("read", problem)) if told is not None}
    if not problems:
        return result, ""
    host, problem = next(iter(problems.items()))
    return None, problem if hosts.count() == 1 else f"on host {host}: {problem}"


def _read_newest(workdir: Path, read: Callable[[Path, int], T], say: Callable[[str], None] = print) -> T:
    """What `read` gives of the newest checkpoint of another work directory that it can read: (state's folder, step).

    Older ones are tried when it cannot, with a line each; the directory is left as it is.
    """
    folder = (workdir / FOLDER).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{workdir}: holds no checkpoint; train that stage first")
    complete = [int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    steps = sorted(hosts.gather("steps", complete)[0], reverse=True)
    for step in steps:
        result, problem = _together(functools.partial(read, folder / f"{step:08d}" / "state", step))
        if result is not None:
            return result
        if hosts.index() == 0:
            say(f"{workdir}: checkpoint {step} cannot be read ({problem}); looking for an older one")
    if not steps:
        raise CheckpointError(f"{workdir}: holds no complete checkpoint; train that stage first")
    raise CheckpointError(f"{workdir}: none of the checkpoints {steps} can be read; see the lines above")


def _saved_state(state: Path) -> Mapping[str, Any]:
    """Shapes and dtypes of the arrays in the folder of a state."""
    return ocp.PyTreeCheckpointHandler().metadata(state).tree


def _saved_params(state: Path, step: int) -> dict[str, Any]:
    return dict(_saved_state(state)["params"])


def _kept_under(state: Mapping[str, Any], part: str) -> str:
    """Where in a state the parameters of a part are that it hands on: its moving average, or themselves."""
    return "ema" if part in state.get("ema", {}) else "params"


def latest_state(workdir: Path) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Where the state of the newest checkpoint of a work directory lies, the metadata of its parameters, and for each
    part under which key of the state it is to be read."""

    def read(state: Path, step: int) -> tuple[Path, dict[str, Any], dict[str, str]]:
        tree = _saved_state(state)
        params = dict(tree["params"])
        return state, params, {part: _kept_under(tree, part) for part in params}

    return _read_newest(workdir, read)


def saved_parts(workdir: Path) -> set[str]:
    """Names of the parts in the newest checkpoint of a work directory."""
    return set(_read_newest(workdir, _saved_params))


def saved_step(workdir: Path) -> int:
    """Step of the newest checkpoint of a work directory."""
    return _read_newest(workdir, lambda state, step: step)


#: Fits a saved array to another shape: (parameter path, saved array, wanted shape) -> array, or None if it cannot.
Fit = Callable[[str, jax.Array, tuple[int, ...]], jax.Array | None]


def load_parts(workdir: Path, abstract_params: Mapping[str, Any], fit: Fit) -> dict[str, Any]:
    """Parameters of the parts in `abstract_params` from the newest readable checkpoint of another work directory.

    Only those parts are read, and of a part that has a moving average that one; each array gets the dtype and sharding
    of its abstract value. An array of another shape
    is handed to `fit`. Raises `CheckpointError` when no checkpoint can be read, a parameter is missing, or a shape
    differs and `fit` cannot help (naming it).
    """

    def read(state: Path, step: int) -> dict[str, Any]:
        saved = _saved_state(state)
        shapes = _shapes(saved)

        def as_saved(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = path_of(path)
            if name not in shapes:
                raise CheckpointError(f"{workdir}: the checkpoint has no parameter {name}")
            if shapes[name] == leaf.shape:
                return leaf
            # The sharding is that of the wanted shape; the saved one need not divide the same way.
            whole = leaf.sharding
            if isinstance(whole, jax.sharding.NamedSharding):
                whole = jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec())
            return jax.ShapeDtypeStruct(shapes[name], leaf.dtype, sharding=whole)

        target: dict[str, dict[str, Any]] = {}
        for part, tree in jax.tree_util.tree_map_with_path(as_saved, dict(abstract_params)).items():
            target.setdefault(_kept_under(saved, part), {})[part] = tree
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        found = ocp.PyTreeCheckpointHandler().restore(state, args=arguments)
        return {part: found[key][part] for key, parts in target.items() for part in parts}

    def fitted(path: Any, array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if array.shape == leaf.shape:
            return array
        name = path_of(path)
        value = fit(name, array, leaf.shape)
        if value is None:
            raise CheckpointError(f"{workdir}: {name} is {array.shape} in the checkpoint, {leaf.shape} here")
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(fitted, _read_newest(workdir, read), dict(abstract_params))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a state, by path; optimiser states are left to their parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(tree["params"])
    return {path_of(path): tuple(leaf.shape) for path, leaf in leaves}
