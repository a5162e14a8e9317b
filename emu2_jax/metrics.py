"""What a run writes while it trains: metrics.jsonl, TensorBoard, one progress bar; and how FLOPs are counted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import jax
from jax.extend.core import jaxprs_in_params
from tensorboardX import SummaryWriter
from tqdm import tqdm

JSONL = "metrics.jsonl"


class Writer(Protocol):
    """Where the numbers of a run go."""

    def advance(self, loss: float, rates: Mapping[str, float]) -> None:
        """One more step is done."""
        ...

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one step."""
        ...

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Change numbers of the step that was logged last; of another step, nothing."""
        ...


class Silence:
    """The writer of hosts that leave the writing to another."""

    def advance(self, loss: float, rates: Mapping[str, float]) -> None:
        """Nothing."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""


@contextmanager
def open_writer(workdir: Path, *, first_host: bool, start_step: int, num_steps: int, title: str) -> Iterator[Writer]:
    """One host of a run writes what all of them did."""
    if not first_host:
        yield Silence()
        return
    with MetricWriter(workdir, start_step=start_step, num_steps=num_steps, title=title) as writer:
        yield writer


class MetricWriter:
    """Appends one JSON object per logged step to metrics.jsonl and the same scalars to TensorBoard.

    A resumed run first drops the lines after the step it goes on from, so that the file reads like one run's.
    """

    def __init__(self, workdir: Path, *, start_step: int, num_steps: int, title: str) -> None:
        self._path = workdir / JSONL
        _drop_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(
            total=num_steps, initial=start_step, desc=title, unit="step", dynamic_ncols=True, mininterval=1
        )

    def advance(self, loss: float, rates: Mapping[str, float]) -> None:
        """One more step is done: move the bar, whose time left and rates the user watches."""
        self._bar.set_postfix({"loss": f"{loss:.4f}", **{k: f"{v:,.0f}" for k, v in rates.items()}}, refresh=False)
        self._bar.update()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one step; `step` counts finished optimiser steps. TensorBoard gets the numbers."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, step)

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Change numbers of the step that was logged last; of another step, nothing."""
        lines = read_lines(self._path)
        if lines and lines[-1]["step"] == step:
            self._file.close()
            _rewrite(self._path, [*lines[:-1], {**lines[-1], **values}])
            self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._tensorboard.close()
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a metrics.jsonl says; a killed writer may have left half a line, which is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`."""
    if path.exists():
        _rewrite(path, [line for line in read_lines(path) if line["step"] <= step])


def _rewrite(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the products and convolutions in `function(*args)`, loops counted in full.

    A multiply-add counts two. Element-wise work is left out, as is usual for model FLOPs. `args` may be shapes.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_channels = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_channels
        else:
            times = parameters.get("length", 1) if name == "scan" else 1
            total += times * sum(_flops(inner) for inner in jaxprs_in_params(parameters))
    return total
