"""The trainer: one jitted, sharded step for every task, and the loop around it.

Order in the loop: next batch -> step -> look at the step before (the device is never waited for in between) ->
checkpoint. State and input position are saved together, so a run that was killed goes on with the same bits.
"""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from emu2_jax import optimizer as optimizer_lib
from emu2_jax import sharding
from emu2_jax.checkpoint import Checkpointer, load_parts, saved_parts
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import CheckpointError, UserError
from emu2_jax.metrics import MetricWriter
from emu2_jax.models.eva_vit import resize_position_embedding
from emu2_jax.task import Batch, Losses, Params, Task, Term

#: {"step", "params", "opt_state", "rng"}, a tree of arrays; with optimizer.ema_decay also "ema", of the trained parts.
State = dict[str, Any]


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


class Diverged(UserError):
    """A loss term or the gradient is not finite."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; the state is saved."""


def make_step(
    task: Task, config: ExperimentConfig, optimizer: optax.GradientTransformation
) -> Callable[[State, Batch], tuple[State, dict[str, Any]]]:
    """The optimiser step as a pure function: (state, batch) -> (new state, what to log as arrays)."""
    micro_batches = config.optimizer.accumulation_steps

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        trained, frozen = optimizer_lib.split_frozen(config.optimizer, state["params"])
        weights = task.term_weights(batch)

        def loss(trained: Params, batch: Batch, key: Array) -> tuple[Array, Losses]:
            out = task.losses({**trained, **frozen}, batch, key)
            total = sum(task.coefficients[name] * _mean(term.sum, weights[name]) for name, term in out.terms.items())
            return jnp.asarray(total), out

        grads, out = _accumulate(jax.grad(loss, has_aux=True), trained, batch, key, micro_batches)
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


def _mean(total: Array, weight: Array) -> Array:
    """total / weight, and 0 with a zero gradient where the weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def _accumulate(
    gradient: Callable[..., tuple[Params, Losses]], trained: Params, batch: Batch, key: Array, micro_batches: int
) -> tuple[Params, Losses]:
    """Sum gradients, losses and metrics over micro-batches. Sums were divided by whole-batch weights beforehand."""
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
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
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
        make_step(task, config, optimizer),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
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
    preview: Callable[[int, Params], Mapping[str, float]] | None = None,
) -> Params:
    """Train to `train.num_steps`, from the newest checkpoint of `workdir` if there is one. Returns the parameters.

    `program` is what `build_program` made of task and config. Raises `Diverged` when a loss is not finite, and
    `Stopped` after SIGTERM or Ctrl-C, with the state saved. `inspect` is shown the parameters before the first step,
    `preview` those that an evaluation would read every `evaluation.preview_every_steps`; what it gives is logged.
    """
    checkpointer = Checkpointer(workdir, config.checkpoint, say)
    try:
        with StopSignal() as stop:
            return _train(
                config, program, task, data, workdir, checkpointer, stop, operative_config, say, inspect, preview
            )
    finally:
        checkpointer.close()


def _train(
    config: ExperimentConfig,
    program: Program,
    task: Task,
    data: Input,
    workdir: Path,
    checkpointer: Checkpointer,
    stop: StopSignal,
    operative_config: str,
    say: Callable[[str], None],
    inspect: Callable[[Params], None],
    preview: Callable[[int, Params], Mapping[str, float]] | None,
) -> Params:
    num_steps = config.train.num_steps
    restored = checkpointer.restore(program.abstract_state)
    if restored is None:
        state = initial_state(program, config, say)
    else:
        state, input_state = restored
        data.restore(input_state)
        say(f"resuming {config.name} after step {int(state['step'])} of {num_steps}")
    start = saved = int(state["step"])
    if start >= num_steps:
        say(f"{config.name} is finished: {start} steps in {workdir}")
        return state["params"]

    inspect(state["params"])
    place = BatchPlacer(program.mesh)
    batches = data.iterate(start)
    with MetricWriter(workdir, start_step=start, num_steps=num_steps, title=config.name) as writer:
        monitor = Monitor(config, task, writer, last_checkpoint=lambda: checkpointer.latest_step)
        for step in range(start + 1, num_steps + 1):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            state, log = program.step(state, place(batch.arrays))
            monitor.push(step, log, batch, waited)
            if preview is not None and step % (config.evaluation.preview_every_steps or num_steps) == 0:
                monitor.preview(functools.partial(preview, step, handed_on(state)))
            if step == num_steps or stop.requested or step % config.checkpoint.every_steps == 0:
                monitor.flush()  # a state whose losses were not looked at is not saved
                checkpointer.save(step, state, data.state(), operative_config)
                saved = step
            if stop.requested and step < num_steps:
                checkpointer.wait()
                raise Stopped(f"stopped by a signal after step {saved}; the same command goes on from there")
    checkpointer.wait()
    return state["params"]


def handed_on(state: State) -> Params:
    """The parameters that evaluation, export and later stages read: the moving average of what has one."""
    return {**state["params"], **state.get("ema", {})}


class BatchPlacer:
    """Host arrays to global device arrays, rows spread over the mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = sharding.batch_sharding(mesh)

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Put this host's rows on its devices."""
        return {name: jax.make_array_from_process_local_data(self._sharding, array) for name, array in arrays.items()}


class Monitor:
    """Looks at each step's numbers one step later, so that the device always has work; stops a diverged run."""

    def __init__(
        self, config: ExperimentConfig, task: Task, writer: MetricWriter, last_checkpoint: Callable[[], int | None]
    ) -> None:
        self._config = config
        self._task = task
        self._writer = writer
        self._last_checkpoint = last_checkpoint
        self._pending: tuple[int, dict[str, Any], HostBatch] | None = None
        self._previewed: dict[str, float] = {}  # to be logged with the pending step
        self._preview_s = 0.0  # that is no part of a step
        self._waits_s: list[float] = []  # of the steps since the last line, so that no stall falls between two lines
        self._schedule = optimizer_lib.relative_schedule(config.optimizer, config.train.num_steps)
        self._last_time = time.perf_counter()
        self._flops_of_shape: dict[Any, int] = {}

    def push(self, step: int, log: dict[str, Any], batch: HostBatch, waited_s: float) -> None:
        """Take over the (still computing) numbers of `step`; look at those of the step before."""
        self.flush()
        self._pending = (step, log, batch)
        self._waits_s.append(waited_s)

    def preview(self, draw: Callable[[], Mapping[str, float]]) -> None:
        """Draw previews after the pending step; their numbers go into its line, or the next that is logged."""
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
        began = time.perf_counter()
        self._previewed |= draw()
        self._preview_s += time.perf_counter() - began

    def flush(self) -> None:
        """Wait for the pending step, check it and log it."""
        if self._pending is None:
            return
        step, log, batch = self._pending
        self._pending = None
        values = self._values(jax.device_get(log))
        self._check_finite(step, values)
        now = time.perf_counter()
        step_s, self._last_time = now - self._last_time - self._preview_s, now
        self._preview_s = 0.0
        rates = {
            f"{name}_per_s": float(batch.info[name]) / step_s for name in ("tokens", "images") if name in batch.info
        }
        self._writer.advance(values["loss"], {name.replace("_per_", "/"): rate for name, rate in rates.items()})
        if step % self._config.train.log_every_steps == 0 or step == self._config.train.num_steps:
            values |= {
                "learning_rate": self._config.optimizer.learning_rate * float(self._schedule(step - 1)),
                "step_s": step_s,
                "data_wait_s": sum(self._waits_s) / len(self._waits_s),
                "data_wait_max_s": max(self._waits_s),
                "model_tflops_per_s": self._flops(batch) / step_s / 1e12,
            }
            self._writer.write(step, {**values, **self._previewed, **rates, **batch.info})
            self._previewed.clear()
            self._waits_s.clear()

    def _flops(self, batch: HostBatch) -> int:
        """Model FLOPs of the global batch; counted once per batch shape, for counting traces the model."""
        shapes = {name: array.shape for name, array in batch.arrays.items()}
        key = tuple(shapes.items())
        if key not in self._flops_of_shape:
            self._flops_of_shape[key] = self._task.model_flops(shapes) * jax.process_count()
        return self._flops_of_shape[key]

    def _values(self, log: dict[str, Any]) -> dict[str, float]:
        """Means of this step; a metric whose weight is 0 (no image in the batch, say) is left out."""

        def mean(term: Term) -> float:
            return float(term.sum) / float(term.weight)

        terms = {name: mean(term) if term.weight > 0 else 0.0 for name, term in log["terms"].items()}
        loss = sum(self._task.coefficients[name] * value for name, value in terms.items())
        metrics = {name: mean(term) for name, term in log["metrics"].items() if term.weight > 0}
        named_terms = {f"loss/{name}": value for name, value in terms.items() if log["terms"][name].weight > 0}
        return {"loss": loss, **named_terms, "grad_norm": float(log["grad_norm"]), **metrics}

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            last = self._last_checkpoint()
            advice = "there is no checkpoint before it" if last is None else f"the last good checkpoint is step {last}"
            raise Diverged(f"step {step}: {', '.join(bad)} not finite; {advice}")


class StopSignal:
    """Notes SIGTERM, or Ctrl-C, instead of dying, so that the loop can save first. A second Ctrl-C kills."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
