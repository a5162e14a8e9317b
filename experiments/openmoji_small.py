"""A small Emu2 that learns in context: it answers from the examples in its prompt what no weight of it can know.

    emu2 data openmoji --preset small --out runs/small/data
    emu2 train openmoji_small_stage1 --workdir runs/small/stage1
    emu2 train openmoji_small_stage2 --workdir runs/small/stage2
    emu2 evaluate runs/small --suite in_context

Stage 1 reads: captions and episodes, text loss only, all parts train. Stage 2 draws as well: regression on the
embeddings of the frozen encoder. docs/in-context.md has what comes out, and what limits it.
"""

from __future__ import annotations

import dataclasses

from emu2_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    LanguageConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
    VisionConfig,
)
from experiments.openmoji_tiny import VOCAB_SIZE

DATA = "runs/small/data"

#: One embedding an image: a document of 16 pictures with their names takes 100 positions, so that a batch holds many.
#: The encoder norms before its blocks, as one that starts at random learns faster that way.
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=64,
        patch_size=16,
        width=128,
        num_layers=4,
        num_heads=4,
        mlp_width=384,
        block_norm="pre",
        final_norm=True,
    ),
    language=LanguageConfig(vocab_size=VOCAB_SIZE, width=192, num_layers=4, num_heads=4, num_kv_heads=4, mlp_width=512),
    num_visual_tokens=1,
    compute_dtype="float32",
    frozen_dtype="float32",
    remat="none",
)


def stage1() -> ExperimentConfig:
    """Captions and episodes, pictures first, text loss only, all parts train."""
    return ExperimentConfig(
        name="openmoji_small_stage1",
        model=MODEL,
        objective=ObjectiveConfig(regression_loss_weight=0.0, vocab_block_positions=None),
        data=DataConfig(
            sources=(
                SourceConfig(name="pairs", kind="image_text", shards=f"{DATA}/train/pairs-*.tar", weight=0.1),
                SourceConfig(name="episodes", kind="interleaved", shards=f"{DATA}/train/episodes-*.tar", weight=0.9),
            ),
            tokenizer=f"{DATA}/tokenizer.model",
            row_length=256,
            image_slots=32,
            global_batch_rows=8,
            image_first_probability=1.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            frozen=("project_down",),
            warmup_ratio=0.02,
            beta2=0.98,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=TrainConfig(num_steps=8_000),
        checkpoint=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(
            scenes=f"{DATA}/heldout/scenes-*.tar",
            unseen=f"{DATA}/heldout/unseen-*.tar",
            in_context=f"{DATA}/heldout/questions-*.tar",
        ),
    )


def stage2() -> ExperimentConfig:
    """Text and regression, the encoder frozen."""
    base = stage1()
    return dataclasses.replace(
        base,
        name="openmoji_small_stage2",
        objective=dataclasses.replace(base.objective, regression_loss_weight=1.0),
        optimizer=dataclasses.replace(base.optimizer, frozen=("visual_encoder",), learning_rate=5e-4),
        train=TrainConfig(num_steps=1_500, init_from="runs/small/stage1"),
    )
