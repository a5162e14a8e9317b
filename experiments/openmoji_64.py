"""The visual decoder alone, at 64 px on the embedded corpus, with as many embeddings per image as Emu2 has: 64.

    emu2 data openmoji --preset tiny --out runs/demo/data
    emu2 train openmoji_64_stage1 --workdir runs/openmoji_64/stage1
    emu2 encode runs/openmoji_64/stage1 --crops openmoji_64_decoder --source pairs --out runs/openmoji_64/pairs.crops
    emu2 train openmoji_64_decoder --workdir runs/openmoji_64/decoder \\
        --gin.data.sources.pairs.embeddings=runs/openmoji_64/pairs.crops
    emu2 evaluate runs/openmoji_64/decoder

`openmoji_tiny` has 16 embeddings for the same picture, each of 16 x 16 pixels in 192 numbers, and so a ceiling that no
decoder passes; here an embedding stands for 8 x 8 pixels. docs/decoder.md has the figures.
"""

from __future__ import annotations

import dataclasses

from emu2_jax.config import ExperimentConfig, TrainConfig, VisionConfig
from experiments import openmoji_tiny

MODEL = dataclasses.replace(
    openmoji_tiny.MODEL,
    vision=VisionConfig(
        image_size=openmoji_tiny.IMAGE_SIZE, patch_size=8, width=256, num_layers=8, num_heads=4, mlp_width=1024
    ),
    num_visual_tokens=64,
)


def stage1() -> ExperimentConfig:
    """Captioning, to give the 64 px decoder an encoder that was trained for something else than drawing."""
    base = openmoji_tiny.stage1()
    return dataclasses.replace(
        base,
        name="openmoji_64_stage1",
        model=MODEL,
        data=dataclasses.replace(base.data, row_length=384, image_slots=4),
        train=TrainConfig(num_steps=200),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=200),
    )


def decoder() -> ExperimentConfig:
    """The U-Net on 64 embeddings of a 64 px image, from stored embeddings."""
    base = openmoji_tiny.decoder()
    return dataclasses.replace(
        base,
        name="openmoji_64_decoder",
        model=MODEL,
        train=TrainConfig(task="decoder", num_steps=1_500, init_from="runs/openmoji_64/stage1"),
        evaluation=dataclasses.replace(base.evaluation, preview_every_steps=250),
        decoder=dataclasses.replace(
            base.decoder,
            unet=dataclasses.replace(
                base.decoder.unet,
                block_out_channels=(192,),
                transformer_layers_per_block=(1,),
                num_attention_heads=(4,),
                cross_attention_width=MODEL.vision.width,
            ),
            latent="cosines",
            latent_scale=0.7,
            guidance_scale=1.0,
        ),
    )
