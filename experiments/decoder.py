"""Emu2's visual decoder at full size (paper section 2.3, table 7): an SDXL U-Net on frozen visual embeddings.

    emu2 train emu2_37b_decoder --workdir DIR --dry_run
    emu2 train emu2_37b_decoder_512 --workdir DIR --gin_file=experiments/meshes/decoder_v5e_256.gin

The files in `experiments/meshes` lay the U-Net on a pod. Its 320 channels divide over 64 devices at most: the rest of a
pod's devices hold replicas.
"""

from __future__ import annotations

import dataclasses

from emu2_jax.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)


def decoder() -> ExperimentConfig:
    """Noise prediction at 1024 px in the latents of SDXL's VAE; only the U-Net trains; no language model in memory."""
    return ExperimentConfig(
        name="emu2_37b_decoder",
        model=ModelConfig(),
        data=DataConfig(
            sources=(
                SourceConfig(name="laion_coco", kind="image_text", shards="data/laion_coco/*.tar"),
                SourceConfig(name="laion_aesthetics", kind="image_text", shards="data/laion_aesthetics/*.tar"),
            ),
            tokenizer="data/llama/tokenizer.model",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            frozen=("visual_encoder", "vae"),
            schedule="linear",
            warmup="log",
            warmup_steps=2_500,  # table 7; the text says 2,000
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=TrainConfig(task="decoder", num_steps=8_000, init_from="runs/emu2_37b_stage1b"),
        checkpoint=CheckpointConfig(every_steps=500, keep=3),
        decoder=DecoderConfig(min_image_side=512),
    )


def decoder_512() -> ExperimentConfig:
    """The same at 512 px, where a step costs a quarter."""
    base = decoder()
    return dataclasses.replace(
        base, name="emu2_37b_decoder_512", decoder=dataclasses.replace(base.decoder, image_size=512)
    )
