r"""A small Emu2 that learns in context: it answers from the examples in its prompt what no weight of it can know.

    emu2 data openmoji --preset small --out runs/small/data
    emu2 train openmoji_small_stage1a --workdir runs/small/stage1a
    for kind in two_names names episodes; do
      emu2 encode runs/small/stage1a --out runs/small/store \
        --kind interleaved --shards "runs/small/data/train/$kind-*.tar"
    done
    emu2 train openmoji_small_stage1b --workdir runs/small/stage1b
    emu2 train openmoji_small_stage2 --workdir runs/small/stage2
    emu2 evaluate runs/small --suite in_context

Stage 1a looks: pictures and their names, text loss only, all parts train. The others read what its encoder makes of the
pictures from a store, so that a step costs as much as the language model alone: 1b two emoji a document under made-up
names, text loss only; 2 up to eight, and all other tasks, regression too. docs/in-context.md says how far
a shorter trial of them came: not far enough to learn in context.
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

RUN = "runs/small"
DATA = f"{RUN}/data"

#: One embedding an image: a document of 16 pictures with their names takes about 90 positions, so that a batch holds
#: many. The encoder norms before its blocks, as one that starts at random learns faster that way.
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
    language=LanguageConfig(vocab_size=VOCAB_SIZE, width=128, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=256),
    num_visual_tokens=1,
    compute_dtype="float32",
    frozen_dtype="float32",
    remat="none",
)

NAMED = SourceConfig(name="named", kind="image_text", shards=f"{DATA}/train/named-*.tar", weight=0.85)
PAIRS = SourceConfig(name="pairs", kind="image_text", shards=f"{DATA}/train/pairs-*.tar", weight=0.15)


def _stored(kind: str, weight: float) -> SourceConfig:
    """Documents whose pictures are read as embeddings."""
    return SourceConfig(
        name=kind,
        kind="interleaved",
        shards=f"{DATA}/train/{kind}-*.tar",
        weight=weight,
        embeddings=f"{RUN}/store",
    )


def stage1a() -> ExperimentConfig:
    """Pictures and their names or captions, pictures first, text loss only, all parts train."""
    return ExperimentConfig(
        name="openmoji_small_stage1a",
        model=MODEL,
        objective=ObjectiveConfig(regression_loss_weight=0.0, vocab_block_positions=None),
        data=DataConfig(
            sources=(NAMED, PAIRS),
            tokenizer=f"{DATA}/tokenizer.model",
            row_length=128,
            image_slots=16,
            global_batch_rows=4,
            image_first_probability=1.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            frozen=("project_down",),
            warmup_ratio=0.02,
            beta2=0.98,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=TrainConfig(num_steps=30_000),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evaluation=EvaluationConfig(
            scenes=f"{DATA}/heldout/scenes-*.tar",
            unseen=f"{DATA}/heldout/unseen-*.tar",
            in_context=f"{DATA}/heldout/questions-*.tar",
        ),
    )


def stage1b() -> ExperimentConfig:
    """Two made-up names a document: matching pictures is found soonest where there are few to tell apart."""
    base = stage1a()
    return dataclasses.replace(
        base,
        name="openmoji_small_stage1b",
        data=dataclasses.replace(base.data, sources=(_stored("two_names", 1.0),), global_batch_rows=8),
        optimizer=dataclasses.replace(base.optimizer, frozen=("visual_encoder", "project_down"), learning_rate=3e-3),
        train=TrainConfig(num_steps=10_000, init_from=f"{RUN}/stage1a"),
    )


def stage2() -> ExperimentConfig:
    """All tasks: text and regression, the encoder frozen."""
    base = stage1b()
    return dataclasses.replace(
        base,
        name="openmoji_small_stage2",
        objective=dataclasses.replace(base.objective, regression_loss_weight=1.0),
        # Documents of formats take up to 180 positions.
        data=dataclasses.replace(
            base.data,
            sources=(_stored("names", 0.7), _stored("episodes", 0.3)),
            row_length=256,
            image_slots=32,
            global_batch_rows=4,
        ),
        optimizer=dataclasses.replace(base.optimizer, frozen=("visual_encoder",), learning_rate=2e-3),
        train=TrainConfig(num_steps=15_000, init_from=f"{RUN}/stage1b"),
    )
