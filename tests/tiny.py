"""A tiny Emu2 and packed rows for it. Sizes divide over 8 devices; no two widths that could be mixed up are equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from emu2_jax.config import (
    DataConfig,
    ExperimentConfig,
    LanguageConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    VisionConfig,
)
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.sequence import RowShape, empty_batch

BOS, EOS, PAD, IMAGE_START, IMAGE_END, IMAGE = 1, 2, 34, 35, 36, 37

#: One image in a document: `[IMG]`, its four visual embeddings, `[/IMG]`.
PICTURE = "picture"
Document = Sequence[int | str]

CONFIG = ExperimentConfig(
    name="tiny",
    model=ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=2, width=16, num_layers=2, num_heads=2, mlp_width=40),
        language=LanguageConfig(vocab_size=48, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=56),
        num_visual_tokens=4,
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
    ),
    objective=ObjectiveConfig(vocab_block_positions=8),
    data=DataConfig(row_length=24, image_slots=2, global_batch_rows=2),
)
ROW_SHAPE = RowShape(length=24, image_slots=2, visual_tokens=4, image_size=8)


def task(objective: ObjectiveConfig = CONFIG.objective, optimizer: OptimizerConfig = CONFIG.optimizer) -> PretrainTask:
    """The pretraining task of the tiny model, with the special tokens above."""
    config = dataclasses.replace(CONFIG, objective=objective, optimizer=optimizer)
    return PretrainTask(config, image_start_id=IMAGE_START, image_end_id=IMAGE_END)


def random_parameters(init: Callable[[jax.Array], Any], seed: int = 0) -> Any:
    """Parameters shaped like `init`'s, every bias and norm away from 0 and 1, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.normal(0.0, 0.25, leaf.shape)
        return (noise + 1.0 if path[-1].key == "scale" else noise).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def leaf_paths(tree: Any) -> list[str]:
    """What a tree is made of: the path of every leaf."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def pack(rows: Sequence[Sequence[Document]], shape: RowShape = ROW_SHAPE, seed: int = 0) -> dict[str, Any]:
    """Packed rows, each a list of documents of token ids and `PICTURE`s; pictures are noise, all loss weights are 1.

    Written from the contract in `emu2_jax.sequence`, apart from the packer of `data_pipelines`.
    """
    batch = empty_batch(len(rows), shape, PAD)
    rng = np.random.default_rng(seed)
    for row, documents in enumerate(rows):
        at = slot = 0
        for number, document in enumerate(documents, start=1):
            start = at
            for element in document:
                if element == PICTURE:
                    batch["images"][row, slot] = rng.integers(0, 256, batch["images"].shape[2:])
                    batch["image_mask"][row, slot] = True
                    batch["tokens"][row, at] = IMAGE_START
                    for k in range(shape.visual_tokens):
                        batch["tokens"][row, at + 1 + k] = IMAGE
                        batch["is_visual"][row, at + 1 + k] = True
                        batch["visual_index"][row, at + 1 + k] = slot * shape.visual_tokens + k
                    batch["tokens"][row, at + 1 + shape.visual_tokens] = IMAGE_END
                    at += shape.visual_tokens + 2
                    slot += 1
                else:
                    batch["tokens"][row, at] = element
                    at += 1
            batch["segment_ids"][row, start:at] = number
            batch["positions"][row, start:at] = np.arange(at - start)
            batch["loss_weights"][row, start:at] = 1.0
    return batch
