"""What a run would be, without running it: settings that differ, shapes, exact parameter counts, what trains."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from emu2_jax import optimizer as optimizer_lib
from emu2_jax import overrides
from emu2_jax.config import ExperimentConfig
from experiments.inputs import example_shapes, make_task


def parameter_counts(config: ExperimentConfig) -> dict[str, int]:
    """Exact number of parameters of each part, by shape evaluation alone."""
    shapes = jax.eval_shape(make_task(config, None).init, jax.random.key(0))
    return {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}


def image_reading(config: ExperimentConfig) -> str:
    """How files become pixels, in one line."""
    decoding = {
        "faithful": "faithful (JPEGs decoded in full)",
        "fast": "fast (JPEGs decoded at a half, quarter or eighth, never below the target)",
    }[config.data.image_decoding]
    exif = "applied" if config.data.apply_exif_orientation else "not applied"
    return f"images: {decoding}, antialiased bicubic; EXIF orientation {exif}"


def describe(config: ExperimentConfig, provenance: overrides.Provenance) -> str:
    """The text of `emu2 train RECIPE --dry_run`."""
    task = make_task(config, None)
    batch = example_shapes(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    lines = [f"recipe {config.name}, task {config.train.task}, {config.train.num_steps:,} steps", ""]
    lines += [overrides.format_diff(config, provenance), ""]
    lines += _parts_table(config, shapes)
    lines += ["", image_reading(config), "", "largest batch (global)"]
    lines += [f"  {name:<14} {dims!s:<26} {dtype}" for name, (dims, dtype) in batch.items()]
    _check_batch(task, shapes, batch)
    flops = task.model_flops({name: dims for name, (dims, _) in batch.items()})
    lines += ["", f"model FLOPs per step: {flops:.3e}"]
    return "\n".join(lines)


def _check_batch(task: Any, shapes: Any, batch: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Trace the losses once: a config whose shapes do not fit fails here, not on the pod."""
    arrays = {name: jax.ShapeDtypeStruct(dims, dtype) for name, (dims, dtype) in batch.items()}
    jax.eval_shape(task.losses, shapes, arrays, jax.random.key(0))


def _parts_table(config: ExperimentConfig, shapes: Any) -> list[str]:
    trained, _ = optimizer_lib.split_frozen(config.optimizer, shapes)
    rows = []
    total = total_trained = 0
    for part, tree in shapes.items():
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        rate = f"{optimizer_lib.peak_learning_rate(config.optimizer, part):g}" if part in trained else "-"
        rows.append(f"  {part:<16} {count:>16,}  {'trains' if part in trained else 'frozen':<7} {rate:>9}")
        total += count
        total_trained += count if part in trained else 0
    return [
        f"  {'part':<16} {'parameters':>16}  {'':<7} {'peak rate':>9}",
        *rows,
        f"  {'total':<16} {total:>16,}  of which {total_trained:,} train",
    ]
