"""Emu2 at full size: the pretraining stages of the paper (section 2.2, table 6).

    emu2 train emu2_37b_stage1a --workdir DIR --gin.data.tokenizer=/data/llama/tokenizer.model \
        --gin.data.sources.laion.shards='/data/laion/{00000..41455}.tar'

`--dry_run` needs no data: it prints shapes, exact parameter counts, what trains and what is frozen.

The paper's batches count *samples*; a packed row holds several (about 22 image-text pairs at 2048 positions), so
`batch_rows` is the paper's number of samples divided by what a row holds (`samples_per_row`).
"""

from __future__ import annotations

import dataclasses

from emu2_jax.config import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
    VisionConfig,
)

#: Measured on caption data: a row of 2048 positions holds 22 pairs of 64 + 29 positions, or 3.6 videos of 8 frames.
PAIRS_PER_ROW = 22
VIDEOS_PER_ROW = 3
#: Reckoned, not measured: a grounded pair has 25 positions more, for two phrases with a box each and `<grounding>`.
GROUNDED_PER_ROW = 17


#: Rows of a batch are a multiple of this: they divide over 256 chips, and over 64 in micro-batches of four.
ROWS_TOGETHER = 256


def rows_for(samples: int, samples_per_row: int) -> int:
    """Packed rows that hold about `samples`: the nearest multiple of `ROWS_TOGETHER`, at most an eighth away here."""
    return max(1, round(samples / (samples_per_row * ROWS_TOGETHER))) * ROWS_TOGETHER


def stage1a() -> ExperimentConfig:
    """Captioning at 224 px; encoder, connector and language model all train; text loss only."""
    return ExperimentConfig(
        name="emu2_37b_stage1a",
        model=ModelConfig(vision=VisionConfig(image_size=224)),
        objective=ObjectiveConfig(regression_loss_weight=0.0),
        data=DataConfig(
            sources=(
                SourceConfig(
                    name="laion",
                    kind="image_text",
                    shards="data/laion/*.tar",
                    weight=162e6 / 6144,  # 162 M image-text pairs in batches of 6144 samples
                    batch_rows=rows_for(6144, PAIRS_PER_ROW),
                ),
                SourceConfig(
                    name="webvid",
                    kind="video_text",
                    shards="data/webvid/*.tar",
                    weight=7e6 / 768,  # 7 M video-text pairs in batches of 768
                    batch_rows=rows_for(768, VIDEOS_PER_ROW),
                ),
            ),
            tokenizer="data/llama/tokenizer.model",
            mixing="one_source_per_step",
            image_first_probability=1.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-5,
            connector_learning_rate=1e-4,
            language_model_learning_rate=3e-5,
            visual_encoder_learning_rate=5e-5,
            frozen=("project_down",),  # the regression head: without a regression loss there is nothing to train
            micro_batch_rows=4,
            warmup_ratio=0.02,
        ),
        mesh=MeshConfig(),
        train=TrainConfig(num_steps=35_200),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
    )


def stage1b() -> ExperimentConfig:
    """Stage 1a continued at 448 px for 4,000 steps. Its warm-up is open: the same ratio."""
    base = stage1a()
    return dataclasses.replace(
        base,
        name="emu2_37b_stage1b",
        model=ModelConfig(),
        train=dataclasses.replace(base.train, num_steps=4_000, init_from="runs/emu2_37b_stage1a"),
    )


def stage2() -> ExperimentConfig:
    """Text and regression on all sources; the visual encoder is frozen."""
    return ExperimentConfig(
        name="emu2_37b_stage2",
        model=ModelConfig(),
        objective=ObjectiveConfig(),
        data=DataConfig(
            sources=(
                SourceConfig(
                    name="image_text",
                    kind="image_text",
                    shards="data/image_text/*.tar",
                    weight=6_250,  # 12,500 steps: 160 M pairs / 12800; **open**: half of them grounded
                    batch_rows=rows_for(12_800, PAIRS_PER_ROW),
                ),
                SourceConfig(
                    name="grounded",
                    kind="grounded",
                    shards="data/grounded/*.tar",
                    weight=6_250,
                    batch_rows=rows_for(12_800, GROUNDED_PER_ROW),
                ),
                SourceConfig(
                    name="video_text",
                    kind="video_text",
                    shards="data/video_text/*.tar",
                    weight=2_750,  # open: half of the remaining 5.5 k steps
                    batch_rows=rows_for(6_400, VIDEOS_PER_ROW),
                ),
                SourceConfig(
                    name="mmc4",
                    kind="interleaved",
                    shards="data/mmc4/*.tar",
                    weight=1_375,  # open: half of the other half
                    batch_rows=rows_for(3_200, 2),
                    image_slots=16,
                    images_per_document=8,
                    max_document_positions=1_024,
                ),
                SourceConfig(
                    name="storyboard",
                    kind="interleaved",
                    shards="data/storyboard/*.tar",
                    weight=1_375,
                    batch_rows=rows_for(3_200, 1),  # a storyboard has many frames: up to a whole row
                ),
                SourceConfig(
                    name="text",
                    kind="text",
                    shards="data/text/*.tar",
                    weight=2_300,  # steps: 3.8 G tokens / (800 x 2048)
                    batch_rows=rows_for(800, 1),
                    image_slots=0,
                ),
            ),
            tokenizer="data/llama/tokenizer.model",
            mixing="one_source_per_step",
            image_first_probability=0.5,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5, frozen=("visual_encoder",), warmup_ratio=0.1, micro_batch_rows=4),
        mesh=MeshConfig(),
        train=TrainConfig(num_steps=20_350, init_from="runs/emu2_37b_stage1b"),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
    )
