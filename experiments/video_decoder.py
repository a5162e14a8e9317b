"""Emu2's video decoder at full size: Stable Diffusion 2.1's U-Net with layers of time, on the embeddings of frames.

    emu2 train emu2_37b_video_decoder --workdir DIR --dry_run

The paper names the U-Net it starts from and the layers that are added, and no number: all of these are **open**.
Convert U-Net, VAE and encoder first (`--from unet=SD21/unet --from vae=SD21/vae --from Emu2`, docs/video.md); the
cross-attention, made for 1024 channels of text, is drawn anew.
"""

from __future__ import annotations

import dataclasses

from emu2_jax.config import (
    DecoderConfig,
    ExperimentConfig,
    SourceConfig,
    TrainConfig,
    UNetConfig,
    VideoConfig,
)
from experiments import decoder


def video_decoder() -> ExperimentConfig:
    """Velocity prediction on clips of 8 frames at 512 px, in the latents of Stable Diffusion's VAE."""
    image = decoder.decoder()
    return dataclasses.replace(
        image,
        name="emu2_37b_video_decoder",
        data=dataclasses.replace(
            image.data, sources=(SourceConfig(name="webvid", kind="video_text", shards="data/webvid/*.tar"),)
        ),
        train=TrainConfig(task="video_decoder", num_steps=8_000, init_from="runs/sd21"),
        decoder=DecoderConfig(
            unet=UNetConfig(
                block_out_channels=(320, 640, 1280, 1280),
                transformer_layers_per_block=(1, 1, 1, 0),
                mid_transformer_layers=1,
                num_attention_heads=(5, 10, 20, 20),
                micro_conditions=False,
            ),
            latent_scale=0.18215,
            image_size=512,
            prediction="v_prediction",
            video=VideoConfig(num_frames=8, frames_per_second=4.0, batch_clips=256),
        ),
    )
