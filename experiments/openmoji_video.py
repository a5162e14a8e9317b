"""The tiny video decoder: drawings that move from corner to corner, drawn from the embeddings of their frames.

    emu2 data openmoji --preset motion --out runs/demo/motion
    emu2 train openmoji_tiny_video_decoder --workdir runs/demo/video
    emu2 evaluate runs/demo/video

Starts from the tiny image decoder in `runs/demo/decoder`, whose encoder it keeps.
"""

from __future__ import annotations

import dataclasses

from emu2_jax.config import EvaluationConfig, ExperimentConfig, SourceConfig, TrainConfig, VideoConfig
from experiments import openmoji_tiny

MOTION = "runs/demo/motion"
VIDEOS = SourceConfig(name="videos", kind="video_text", shards=f"{MOTION}/train/videos-*.tar")


def video_decoder() -> ExperimentConfig:
    """The tiny decoder's U-Net with layers of time, all of it trained on clips of moving emoji."""
    image = openmoji_tiny.decoder()
    return dataclasses.replace(
        image,
        name="openmoji_tiny_video_decoder",
        data=dataclasses.replace(image.data, sources=(VIDEOS,)),
        optimizer=dataclasses.replace(image.optimizer, learning_rate=5e-4, temporal_learning_rate=1e-3),
        train=TrainConfig(task="video_decoder", num_steps=300, init_from="runs/demo/decoder"),
        evaluation=EvaluationConfig(num_samples=32, num_pictures=8),
        decoder=dataclasses.replace(image.decoder, video=VideoConfig(num_frames=8, attention="joint", batch_clips=4)),
    )
