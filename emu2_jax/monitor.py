"""Looks at every step's numbers: stops a run whose loss is not finite, and logs what all hosts did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from emu2_jax import hosts
from emu2_jax import optimizer as optimizer_lib
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import UserError
from emu2_jax.goodput import Goodput, SlowSteps, merge_slow_steps
from emu2_jax.metrics import Writer
from emu2_jax.task import Task, Term

#: How numbers of hosts become one: counts add up, shares are means over equal numbers of rows, the rest is the worst.
_MEANS = ("padding_share", "empty_slot_share")
_LARGEST = ("epoch", "data_wait_max_s")
_SMALLEST = ("data_queue_depth",)


class Diverged(UserError):
    """A loss term or the gradient is not finite. All hosts see the same numbers."""

    on_all_hosts = True


class Info(Protocol):
    """What is logged of a host's batch."""

    @property
    def info(self) -> Mapping[str, float | str]:
        """By name."""
        ...


class Monitor:
    """Looks at each step's numbers one step later, so that the device always has work; stops a diverged run.

    `counted` is whether this host's rows are its own: where several hosts hold the same rows, one of them counts.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        task: Task,
        writer: Writer,
        goodput: Goodput,
        *,
        counted: bool,
        last_checkpoint: Callable[[], int | None],
    ) -> None:
        self._config = config
        self._task = task
        self._writer = writer
        self._goodput = goodput
        self._counted = counted
        self._last_checkpoint = last_checkpoint
        self._slow = SlowSteps(hosts.index())
        self._pending: tuple[int, dict[str, Any], Mapping[str, tuple[int, ...]], Info] | None = None
        self._previewed: dict[str, float] = {}  # to be logged with the pending step
        self._preview_s = 0.0  # that is no part of a step
        self._waits_s: list[float] = []  # of the steps since the last line, so that no stall falls between two lines
        self._schedule = optimizer_lib.relative_schedule(config.optimizer, config.train.num_steps)
        self._last_time = time.perf_counter()
        self._flops_of_shape: dict[Any, int] = {}

    def push(
        self, step: int, log: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], batch: Info, waited_s: float
    ) -> None:
        """Take over the (still computing) numbers of `step`; look at those of the step before.

        `shapes` are those of the global batch.
        """
        self.flush()
        self._pending = (step, log, shapes, batch)
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
        step, log, shapes, batch = self._pending
        self._pending = None
        values = self._values(jax.device_get(log))
        self._check_finite(step, values)
        self._goodput.lap("step")
        self._slow.note(step, self._goodput.seconds)
        now = time.perf_counter()
        step_s, self._last_time = now - self._last_time - self._preview_s, now
        self._preview_s = 0.0
        # The bar moves at each step, so it takes other hosts to be as quick as this one; the log asks them.
        rates = {f"{name}/s": hosts.count() * rate for name, rate in _rates(batch.info, step_s).items()}
        self._writer.advance(values["loss"], rates)
        if step % self._config.train.log_every_steps == 0 or step == self._config.train.num_steps:
            self._log(step, step_s, values, shapes, batch)

    def _log(
        self,
        step: int,
        step_s: float,
        values: dict[str, float],
        shapes: Mapping[str, tuple[int, ...]],
        batch: Info,
    ) -> None:
        mine = {
            "counted": self._counted,
            "info": dict(batch.info),
            "data_wait_s": sum(self._waits_s) / len(self._waits_s),
            "data_wait_max_s": max(self._waits_s),
            "slow_steps": self._slow.found,
        }
        self._waits_s.clear()
        self._slow.found = []
        told = hosts.gather_to_first("log", mine)
        if told is None:
            return
        info = merge_info([one["info"] for one in told if one["counted"]])
        slowest = max(range(len(told)), key=lambda host: told[host]["data_wait_s"])
        values |= {
            "learning_rate": self._config.optimizer.learning_rate * float(self._schedule(step - 1)),
            "step_s": step_s,
            "data_wait_s": told[slowest]["data_wait_s"],
            "data_wait_max_s": max(one["data_wait_max_s"] for one in told),
            "model_tflops_per_s": self._flops(shapes) / step_s / 1e12,
        }
        rates = {f"{name}_per_s": rate for name, rate in _rates(info, step_s).items()}
        slow = merge_slow_steps([one["slow_steps"] for one in told])
        line: dict[str, Any] = {**values, **self._previewed, **rates, **info, **self._goodput.values()}
        self._previewed.clear()
        if len(told) > 1:
            line["data_wait_host"] = slowest
        self._writer.write(step, {**line, "slow_steps": slow} if slow else line)

    def _flops(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Model FLOPs of the global batch; counted once per batch shape, for counting traces the model."""
        key = tuple(shapes.items())
        if key not in self._flops_of_shape:
            self._flops_of_shape[key] = self._task.model_flops(shapes)
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


def _rates(info: Mapping[str, float | str], step_s: float) -> dict[str, float]:
    return {name: float(info[name]) / step_s for name in ("tokens", "images") if name in info}


def merge_info(infos: Sequence[Mapping[str, float | str]]) -> dict[str, float | str]:
    """What hosts log of their batches, as one. Where there is one host, what it says."""
    merged: dict[str, float | str] = {}
    for name in dict.fromkeys(name for info in infos for name in info):
        values = [info[name] for info in infos if name in info]
        numbers = [value for value in values if not isinstance(value, str)]
        if len(numbers) < len(values):
            merged[name] = "+".join(sorted({part for value in values for part in str(value).split("+")}))
        elif name in _MEANS:
            merged[name] = sum(numbers) / len(numbers)
        elif name in _LARGEST or name.startswith("epoch/"):
            merged[name] = max(numbers)
        elif name in _SMALLEST:
            merged[name] = min(numbers)
        else:
            merged[name] = sum(numbers)
    return merged
