"""A tiny Emu2 on the embedded corpus: every stage of the big one, in minutes on a laptop.

    emu2 data openmoji --preset tiny --out runs/demo/data
    emu2 train openmoji_tiny_stage1 --workdir runs/demo/stage1
    emu2 train openmoji_tiny_stage2 --workdir runs/demo/stage2
    emu2 train openmoji_tiny_decoder --workdir runs/demo/decoder

The recipes are those of `pretrain.py` and `decoder.py` with other numbers. What differs from the paper, and why: all
parts start at random (there is no pretrained part of this size), so learning rates are those of training from scratch;
the decoder's latents are space-to-depth instead of a VAE's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from data_pipelines.corpora.openmoji import OpenMojiSettings
from emu2_jax.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    LanguageConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
    UNetConfig,
    VisionConfig,
)

#: Sizes of the embedded corpus. `tiny` is what these recipes train on, `small` what
#: openmoji_small.py does, `minimal` is enough to see that it all runs.
CORPORA: Mapping[str, OpenMojiSettings] = {
    "full": OpenMojiSettings(),
    "tiny": OpenMojiSettings(
        num_pairs=16_000,
        num_interleaved=2_000,
        num_videos=0,  # what these recipes do not train on is not built for them
        num_storyboards=0,
        num_grounded=0,
        num_names=0,
        num_episodes=0,
        num_questions=0,
        num_heldout_scenes=256,
        num_unseen=128,
        num_emoji=120,
        max_objects=2,
        max_count=3,
        vocab_size=1024,
    ),
    "motion": OpenMojiSettings(  # videos of the emoji of `tiny`: of those that it does not train on, none is shown
        num_pairs=0,
        num_interleaved=0,
        num_videos=4_000,
        num_storyboards=0,
        num_grounded=0,
        num_heldout_scenes=0,
        num_unseen=0,
        num_emoji=120,
        num_names=0,
        num_episodes=0,
        num_questions=0,
        vocab_size=1024,
    ),
    "small": OpenMojiSettings(
        num_pairs=8_000,
        num_named=60_000,
        num_interleaved=0,
        num_videos=0,
        num_storyboards=0,
        num_grounded=0,
        num_text=0,
        num_two_names=6_000,
        num_names=6_000,
        num_episodes=4_000,
        num_heldout_scenes=256,
        num_unseen=128,
        num_questions=6 * 256,
        max_objects=2,
        max_count=3,
        vocab_size=1024,
    ),
    "minimal": OpenMojiSettings(
        num_pairs=200,
        num_interleaved=40,
        num_text=40,
        num_videos=0,  # what these recipes do not train on is not built for them
        num_storyboards=0,
        num_grounded=0,
        num_names=0,
        num_episodes=0,
        num_questions=0,
        num_heldout_scenes=16,
        num_unseen=8,
        num_emoji=40,
        samples_per_shard=100,
        vocab_size=1024,
    ),
}

DATA = "runs/demo/data"
IMAGE_SIZE = 64
VOCAB_SIZE = 1024 + 272  # SentencePiece pieces and Emu2's special tokens

MODEL = ModelConfig(
    vision=VisionConfig(image_size=IMAGE_SIZE, patch_size=16, width=192, num_layers=4, num_heads=4, mlp_width=512),
    language=LanguageConfig(vocab_size=VOCAB_SIZE, width=256, num_layers=4, num_heads=4, num_kv_heads=4, mlp_width=688),
    num_visual_tokens=16,
    compute_dtype="float32",
    frozen_dtype="float32",
    remat="none",
)

PAIRS = SourceConfig(name="pairs", kind="image_text", shards=f"{DATA}/train/pairs-*.tar")
INTERLEAVED = SourceConfig(name="interleaved", kind="interleaved", shards=f"{DATA}/train/interleaved-*.tar")
TEXT = SourceConfig(name="text", kind="text", shards=f"{DATA}/train/text-*.tar")
EVALUATION = EvaluationConfig(
    scenes=f"{DATA}/heldout/scenes-*.tar", unseen=f"{DATA}/heldout/unseen-*.tar", num_samples=128
)


def stage1() -> ExperimentConfig:
    """Captioning: image first, text loss only, all parts train."""
    return ExperimentConfig(
        name="openmoji_tiny_stage1",
        model=MODEL,
        objective=ObjectiveConfig(regression_loss_weight=0.0),
        data=DataConfig(
            sources=(PAIRS,),
            tokenizer=f"{DATA}/tokenizer.model",
            row_length=256,
            image_slots=7,
            global_batch_rows=4,
            image_first_probability=1.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, frozen=("project_down",), warmup_ratio=0.05, weight_decay=0.01, clip_norm=1.0
        ),
        train=TrainConfig(num_steps=400),
        checkpoint=CheckpointConfig(every_steps=200),
        evaluation=EVALUATION,
    )


def stage2() -> ExperimentConfig:
    """Text and regression on all sources; the encoder is frozen; images before or after their text."""
    base = stage1()
    return dataclasses.replace(
        base,
        name="openmoji_tiny_stage2",
        objective=ObjectiveConfig(),
        data=dataclasses.replace(
            base.data,
            sources=(
                dataclasses.replace(PAIRS, weight=0.7),
                dataclasses.replace(INTERLEAVED, weight=0.2),
                dataclasses.replace(TEXT, weight=0.1),
            ),
            image_first_probability=0.5,
        ),
        optimizer=dataclasses.replace(base.optimizer, frozen=("visual_encoder",), learning_rate=7e-4),
        train=TrainConfig(num_steps=400, init_from="runs/demo/stage1"),
    )


def decoder() -> ExperimentConfig:
    """The U-Net on embeddings of the encoder that stage 1 trained."""
    base = stage1()
    return dataclasses.replace(
        base,
        name="openmoji_tiny_decoder",
        data=dataclasses.replace(base.data, sources=(PAIRS,)),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            frozen=("visual_encoder",),
            schedule="cosine",
            warmup_ratio=0.05,
            beta2=0.99,
            epsilon=1e-8,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        train=TrainConfig(task="decoder", num_steps=1_500, init_from="runs/demo/stage1"),
        # What differs from the paper's decoder, because this one learns in minutes and with few channels: it predicts
        # the clean latent, and its cross-attention starts out local. Like SDXL's it reads the condition at the lower
        # scale only, here the scale of the visual embeddings themselves. docs/decoder.md has the measurements.
        decoder=DecoderConfig(
            unet=UNetConfig(
                in_channels=192,
                out_channels=192,
                block_out_channels=(160, 256),
                layers_per_block=1,
                transformer_layers_per_block=(0, 1),
                num_attention_heads=(1, 4),
                cross_attention_width=MODEL.vision.width,
                time_id_width=32,
                norm_groups=16,
                condition_radius=0.25,
            ),
            latent="space_to_depth",
            latent_factor=8,
            latent_scale=1.8,  # brings the pixels of the corpus to unit variance
            prediction="sample",
            zero_terminal_snr=True,
            timestep_spacing="trailing",
            image_size=IMAGE_SIZE,
            num_sampling_steps=10,
            guidance_scale=1.5,
            batch_images=16,
            random_scale_max=1.0,
        ),
    )


def sweep() -> Iterator[tuple[str, dict[str, str]]]:
    """Ablations of stage 2 worth running: the settings that the paper leaves open."""
    for weight in ("0.1", "1.0", "10.0"):
        yield f"regression_weight_{weight}", {"objective.regression_loss_weight": weight}
    yield "image_start_unsupervised", {"objective.supervise_image_start": "False"}
    yield "input_noise", {"objective.visual_input_noise": "0.3"}
    yield "cosine_term", {"objective.regression_cosine_weight": "1.0"}
