"""The trainer: one jitted, sharded step for every task, and the loop around it.

Order in the loop: next batch -> step -> look at the step before (the device is never waited for in between) ->
checkpoint. State and input position are saved together, so a run that was killed goes on with the same bits.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

from emu2_jax import compiler_options, hosts, sharding, shards
from emu2_jax import optimizer as optimizer_lib
from emu2_jax.checkpoint import Checkpointer, load_parts, saved_parts
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import CheckpointError
from emu2_jax.goodput import Goodput, Profiler
from emu2_jax.metrics import JSONL, Writer, open_writer, read_lines
from emu2_jax.models.eva_vit import resize_position_embedding
from emu2_jax.monitor import Monitor
from emu2_jax.task import Batch, Losses, Params, Task

#: {"step", "params", "opt_state", "rng"}, a tree of arrays; with optimizer.ema_decay also "ema", of the trained parts.
State = dict[str, Any]


#: Shown the parameters that an evaluation would read after a step; gives numbers to log.
Preview = Callable[[int, Params], Mapping[str, float]]


class HostBatch(NamedTuple):
    """One step's input on this host."""

    arrays: Mapping[str, np.ndarray]  # this host's rows of the global batch
    info: Mapping[str, float | str]  # logged: positions, images, padding_share, source, ...


class Input(Protocol):
    """Where batches come from. The batch of a step is a pure function of the step number."""

    def iterate(self, start_step: int) -> Iterator[HostBatch]:
        """Batches of steps start_step, start_step + 1, ..."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Counters that a resumed run goes on with (JSON), as of the last batch handed over."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over saved counters."""
        ...


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived, on some host; the state is saved."""

    on_all_hosts = True


def make_step(
    task: Task, config: ExperimentConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> Callable[[State, Batch], tuple[State, dict[str, Any]]]:
    """The optimiser step as a pure function: (state, batch) -> (new state, what to log as arrays).

    With a mesh, a task of independent rows works on each device's own rows (`emu2_jax.shards`).
    """
    row_shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def gradients(
        micro_batches: int, trained: Params, frozen: Params, batch: Batch, key: Array, weights: Mapping[str, Array]
    ) -> tuple[Params, Losses]:
        def loss(trained: Params, batch: Batch, key: Array) -> tuple[Array, Losses]:
            out = task.losses(shards.whole({**trained, **frozen}), batch, key)
            total = sum(task.coefficients[name] * _mean(term.sum, weights[name]) for name, term in out.terms.items())
            return jnp.asarray(total), out

        return _accumulate(jax.grad(loss, has_aux=True), trained, batch, key, micro_batches)

    def by_rows(micro_batches: int) -> shards.Gradients:
        in_parts = functools.partial(gradients, micro_batches)
        if mesh is None:
            return in_parts
        if not task.rows_are_independent:
            return _on_mesh(in_parts, mesh)
        compute_dtype = config.model.compute_dtype
        region = shards.Region(compute_dtype, config.optimizer.gradient_dtype or compute_dtype)
        return shards.by_rows(in_parts, mesh, region)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        trained, frozen = optimizer_lib.split_frozen(config.optimizer, state["params"])
        weights = task.term_weights(batch)

        rows = next(iter(batch.values())).shape[0] // row_shards  # of a device
        micro_batches = sharding.micro_batches(config.optimizer, rows)
        grads, out = by_rows(micro_batches)(trained, frozen, batch, key, weights)
        grads = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), grads, trained)
        updates, opt_state = optimizer.update(grads, state["opt_state"], trained)
        params = {**optax.apply_updates(trained, updates), **frozen}
        log = {"terms": dict(out.terms), "metrics": dict(out.metrics), "grad_norm": optax.tree.norm(grads)}
        new_state = {"step": state["step"] + 1, "params": params, "opt_state": opt_state, "rng": state["rng"]}
        if config.optimizer.ema_decay is not None:
            new = {part: params[part] for part in trained}
            new_state["ema"] = optimizer_lib.moving_average(
                config.optimizer.ema_decay, state["ema"], new, state["step"]
            )
        return new_state, log

    return step


def _on_mesh(gradients: shards.Gradients, mesh: Mesh) -> shards.Gradients:
    """`gradients`, told the mesh that the compiler spreads them over: attention chooses its kernel by it."""

    def on_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(*arguments)

    return on_mesh


def _mean(total: Array, weight: Array) -> Array:
    """total / weight, and 0 with a zero gradient where the weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def _accumulate(
    gradient: Callable[..., tuple[Params, Losses]], trained: Params, batch: Batch, key: Array, micro_batches: int
) -> tuple[Params, Losses]:
    """Sum gradients, losses and metrics over micro-batches, in float32 at least.

    Sums were divided by whole-batch weights beforehand.
    """
    if micro_batches == 1:
        return gradient(trained, batch, key)

    def split(x: Array) -> Array:
        # Row r goes to micro-batch r % n: each device keeps its own rows, so nothing is sent.
        return jnp.moveaxis(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 1, 0)

    def add(sums: Any, xs: tuple[Batch, Array]) -> tuple[Any, None]:
        micro_batch, index = xs
        new = gradient(trained, micro_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, sums, new), None

    micro = jax.tree.map(split, dict(batch))
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(gradient, trained, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
    return jax.lax.scan(add, zeros, (micro, jnp.arange(micro_batches)))[0]


class Program(NamedTuple):
    """Everything that is decided before the first array exists."""

    mesh: Mesh
    abstract_state: State  # shapes, dtypes and shardings of the train state
    init: Callable[[], State]
    step: Callable[[State, Batch], tuple[State, dict[str, Any]]]


def build_program(task: Task, config: ExperimentConfig, devices: list[jax.Device] | None = None) -> Program:
    """Mesh, shardings and compiled functions of a run; allocates nothing."""
    mesh = sharding.make_mesh(config.mesh, devices)
    optimizer = optimizer_lib.build(config.optimizer, config.train.num_steps)

    def init() -> State:
        key = jax.random.key(config.train.seed)
        params = dict(task.init(jax.random.fold_in(key, 0)))
        trained, frozen = optimizer_lib.split_frozen(config.optimizer, params)
        frozen = optimizer_lib.cast_frozen(config.model.frozen_dtype, frozen)
        state = {
            "step": jnp.zeros((), jnp.int32),
            "params": {**trained, **frozen},
            "opt_state": optimizer.init(trained),
            "rng": jax.random.key_data(jax.random.fold_in(key, 1)),
        }
        return state if config.optimizer.ema_decay is None else {**state, "ema": jax.tree.map(jnp.copy, trained)}

    shapes = jax.eval_shape(init)
    trained = optimizer_lib.split_frozen(config.optimizer, shapes["params"])[0]
    shardings = {
        "step": sharding.replicated(mesh),
        "params": sharding.parameter_shardings(shapes["params"], mesh),
        "opt_state": sharding.optimizer_shardings(optimizer, shapes["opt_state"], trained, mesh),
        "rng": sharding.replicated(mesh),
    }
    if "ema" in shapes:
        shardings["ema"] = {part: shardings["params"][part] for part in trained}
    abstract = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
    step = jax.jit(
        make_step(task, config, optimizer, mesh),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options.for_device(mesh.devices.flat[0]),
    )
    return Program(mesh, abstract, jax.jit(init, out_shardings=shardings), step)


def initial_state(program: Program, config: ExperimentConfig, say: Callable[[str], None]) -> State:
    """A fresh state; with `train.init_from`, the parts that the earlier stage trained are taken over."""
    state = program.init()
    if config.train.init_from is None:
        return state
    workdir = Path(config.train.init_from)
    parts = saved_parts(workdir) & set(state["params"])
    if not parts:
        raise CheckpointError(f"train.init_from: {workdir} holds none of the parts {sorted(state['params'])}")
    wanted = {part: program.abstract_state["params"][part] for part in parts}
    state["params"] = {**state["params"], **load_parts(workdir, wanted, fit_parameter)}
    if "ema" in state:  # a copy: both are donated to the first step
        state["ema"] = {part: jax.tree.map(jnp.copy, state["params"][part]) for part in state["ema"]}
    fresh = sorted(set(state["params"]) - parts)
    say(f"took {', '.join(sorted(parts))} from {workdir}; " + (f"new: {', '.join(fresh)}" if fresh else "nothing new"))
    return state


def fit_parameter(path: str, saved: Array, shape: tuple[int, ...]) -> Array | None:
    """The one parameter whose shape may change between stages: the encoder reads larger images in stage 1b."""
    if path == "visual_encoder/position_embedding" and saved.shape[1] == shape[1]:
        return resize_position_embedding(saved, shape[0])
    return None


def train(
    config: ExperimentConfig,
    task: Task,
    program: Program,
    data: Input,
    workdir: Path,
    *,
    operative_config: str,
    say: Callable[[str], None],
    inspect: Callable[[Params], None] = lambda params: None,
    goodput: Goodput | None = None,
    preview: Preview | None = None,
) -> Params:
    """Train to `train.num_steps`, from the newest checkpoint of `workdir` if there is one. Returns the parameters.

    `program` is what `build_program` made of task and config. Raises `Diverged` when a loss is not finite, and
    `Stopped` after SIGTERM or Ctrl-C, with the state saved; on several hosts, all of them do. `inspect` is shown the
    parameters before the first step, `preview` those that an evaluation would read every
    `evaluation.preview_every_steps`, and what it gives is logged; `goodput` has measured since the run began.
    """
    checkpointer = Checkpointer(workdir, config.checkpoint, say)
    measured = goodput or Goodput()
    loop = Loop(config, task, program, data, workdir, checkpointer, measured, operative_config, say, preview)
    try:
        with StopSignal() as stop:
            params = loop.run(stop, inspect)
    except Exception as error:
        if hosts.is_alike(error):
            checkpointer.close()
        raise  # the others may not come to close it, too
    checkpointer.close()
    return params


@dataclass(frozen=True)
class Loop:
    """What a run consists of while it trains."""

    config: ExperimentConfig
    task: Task
    program: Program
    data: Input
    workdir: Path
    checkpointer: Checkpointer
    goodput: Goodput
    operative_config: str
    say: Callable[[str], None]
    preview: Preview | None

    def run(self, stop: StopSignal, inspect: Callable[[Params], None]) -> Params:
        """From the newest checkpoint to the last step."""
        config, num_steps = self.config, self.config.train.num_steps
        state = self._start()
        start = int(state["step"])
        if start >= num_steps:
            self.say(f"{config.name} is finished: {start} steps in {self.workdir}")
            return state["params"]
        inspect(state["params"])
        with open_writer(
            self.workdir, first_host=hosts.index() == 0, start_step=start, num_steps=num_steps, title=config.name
        ) as writer:
            state = self._steps(state, start, writer, stop)
        return state["params"]

    def _start(self) -> State:
        restored = self.checkpointer.restore(self.program.abstract_state)
        if restored is None:
            return initial_state(self.program, self.config, self.say)
        state, input_state = restored
        self.data.restore(input_state)
        step = int(state["step"])
        self.goodput.go_on(input_state.get("seconds", {}), read_lines(self.workdir / JSONL), step)
        self.say(f"resuming {self.config.name} after step {step} of {self.config.train.num_steps}")
        return state

    def _steps(self, state: State, start: int, writer: Writer, stop: StopSignal) -> State:
        config, num_steps, goodput = self.config, self.config.train.num_steps, self.goodput
        place = BatchPlacer(self.program.mesh)
        monitor = Monitor(
            *(config, self.task, writer, goodput),
            counted=place.shares.counted,
            last_checkpoint=lambda: self.checkpointer.latest_step,
        )
        profiler = Profiler(config.train.profile_steps, self.workdir, self.say)
        batches = self.data.iterate(start)
        compiled: dict[Any, Callable[[State, Batch], tuple[State, dict[str, Any]]]] = {}  # by batch shapes
        goodput.lap("start")
        for step in range(start + 1, num_steps + 1):
            if profiler.before(step):
                goodput.lap("profile")
            batch = next(batches)
            waited = goodput.lap("data_wait")
            placed = place(batch.arrays)
            shapes = {name: array.shape for name, array in placed.items()}
            goodput.lap("step")
            key = tuple(shapes.items())
            is_new = key not in compiled
            if is_new:
                compiled[key] = self._compile(state, placed)
            state, log = compiled[key](state, placed)
            goodput.lap("compile" if is_new else "step")
            monitor.push(step, log, shapes, batch, waited)
            goodput.lap("step")
            if profiler.ends_with(step):
                monitor.flush()
                profiler.write()
                goodput.lap("profile")
            if self.preview is not None and step % (config.evaluation.preview_every_steps or num_steps) == 0:
                monitor.preview(functools.partial(self.preview, step, handed_on(state)))
                goodput.lap("preview")
            stopping = stop.reached(step)
            if step == num_steps or stopping or step % config.checkpoint.every_steps == 0:
                monitor.flush()  # a state whose losses were not looked at is not saved
                self._save(step, state)
            if stopping or step == num_steps:
                profiler.write()
                self.checkpointer.wait()
                goodput.lap("checkpoint")
                writer.amend(step, goodput.values())
            if stopping and step < num_steps:
                raise Stopped(f"stopped by a signal after step {step}; the same command goes on from there")
        return state

    def _compile(self, state: State, batch: Batch) -> Callable[[State, Batch], tuple[State, dict[str, Any]]]:
        """The step for batches of these shapes.

        Hosts go on together: one that comes to the first collective while another still compiles gives up waiting.
        """
        if hosts.count() == 1 or not hasattr(self.program.step, "lower"):  # a step that was kept needs no compiling
            return self.program.step
        compiled = self.program.step.lower(state, batch).compile()
        hosts.wait("compiled")
        return compiled

    def _save(self, step: int, state: State) -> None:
        self.goodput.lap("step")
        input_state = {**self.data.state(), "seconds": self.goodput.state()}
        self.checkpointer.save(step, state, input_state, self.operative_config)
        self.goodput.lap("checkpoint")


def handed_on(state: State) -> Params:
    """The parameters that evaluation, export and later stages read: the moving average of what has one."""
    return {**state["params"], **state.get("ema", {})}


class BatchPlacer:
    """Host arrays to global device arrays, rows spread over the mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = sharding.batch_sharding(mesh)
        #: Which rows of every global batch this host has to bring along.
        self.shares = sharding.row_shares(mesh, jax.process_index())

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Put this host's rows on its devices."""
        return {name: self._place(array) for name, array in arrays.items()}

    def _place(self, array: np.ndarray) -> Array:
        count, mine = self.shares.count, self.shares.mine
        rows = len(array) // len(mine)  # of a share
        begins = {share * rows: place * rows for place, share in enumerate(mine)}  # global -> in `array`

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(rows * count)
            share = max(begin for begin in begins if begin <= first)
            offset = begins[share] - share
            return array[(slice(first + offset, last + offset), *index[1:])]

        return jax.make_array_from_callback((rows * count, *array.shape[1:]), self._sharding, part)


class StopSignal:
    """Notes SIGTERM, or Ctrl-C, instead of dying, so that the loop can save first. A second Ctrl-C kills.

    On several hosts jax notes SIGTERM and lets all of them know; they agree on a step that none has passed.
    """

    def __init__(self) -> None:
        self._requested = False
        self._several = hosts.count() > 1

    def reached(self, step: int) -> bool:
        """Whether to save after this step and stop. To be asked at every step, on every host."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._requested

    def __enter__(self) -> StopSignal:
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
