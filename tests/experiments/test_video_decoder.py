"""The video decoder as a user meets it: trained from an image decoder, stopped, gone on with, evaluated, drawn with."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command import fail
from PIL import Image

from data_pipelines.corpora.openmoji import OpenMojiSettings, build
from data_pipelines.corpora.openmoji_motion import encode_mp4
from emu2_jax.errors import ConfigError, UserError
from emu2_jax.metrics import JSONL
from emu2_jax.train import StopSignal
from experiments import cli
from experiments.animation import check_new_animation, write_animation
from experiments.evaluate_clips import IMAGE, IMAGE_ONE_NOISE, STILL, VIDEO, evaluate_clips
from experiments.runs import load_config, load_params

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = """\
model.vision.width = 16
model.vision.num_layers = 1
model.vision.mlp_width = 24
decoder.unet.block_out_channels = (16,)
decoder.unet.transformer_layers_per_block = (0,)
decoder.unet.num_attention_heads = (2,)
decoder.unet.cross_attention_width = 16
decoder.num_sampling_steps = 2
decoder.batch_images = 2
data.read_threads = 0
train.log_every_steps = 1
"""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pairs and a few videos of the same emoji."""
    directory = tmp_path_factory.mktemp("motion") / "data"
    settings = OpenMojiSettings(
        num_pairs=8, num_interleaved=0, num_videos=8, num_storyboards=0, num_grounded=0, num_text=40,
        num_names=0, num_episodes=0, num_questions=0, num_heldout_scenes=0, num_unseen=0, num_emoji=40, vocab_size=600,
    )  # fmt: skip
    build(directory, settings, processes=1, progress=lambda *_: None)
    return directory


@pytest.fixture(scope="module")
def gin_file(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gin") / "tiny.gin"
    path.write_text(TINY, encoding="utf-8")
    return path


def train(recipe: str, workdir: Path, gin_file: Path, *settings: str) -> None:
    flags = [f"--gin.{setting}" for setting in settings]
    cli.main(["train", recipe, "--workdir", str(workdir), f"--gin_file={gin_file}", *flags])


@pytest.fixture(scope="module")
def image_run(corpora: Path, gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("image") / "decoder"
    shards = f"data.sources.pairs.shards={corpora}/train/pairs-*.tar"
    train("openmoji_tiny_decoder", workdir, gin_file, "train.num_steps=2", "train.init_from=None", shards)
    return workdir


def train_video(workdir: Path, image_run: Path, corpora: Path, gin_file: Path, *settings: str) -> None:
    shards = f"data.sources.videos.shards={corpora}/train/videos-*.tar"
    few = ("decoder.video.num_frames=4", "decoder.video.batch_clips=2", "evaluation.num_pictures=1")
    start = f"train.init_from={image_run}"
    train("openmoji_tiny_video_decoder", workdir, gin_file, start, shards, *few, *settings)


@pytest.fixture(scope="module")
def video_run(image_run: Path, corpora: Path, gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a stop, the layers of time alone."""
    workdir = tmp_path_factory.mktemp("video") / "video"
    settings = ("optimizer.frozen=('visual_encoder', 'unet')", "train.num_steps=4", "checkpoint.every_steps=2")
    train_video(workdir, image_run, corpora, gin_file, *settings)
    return workdir


def test_it_starts_as_the_image_decoder_and_only_what_trains_moves(video_run: Path, image_run: Path) -> None:
    video, image = (load_params(run, load_config(run)) for run in (video_run, image_run))
    for part in ("visual_encoder", "unet"):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), video[part], image[part]))
    assert np.abs(video["temporal"]["conv_in"]["kernel"]).max() > 0


def test_a_run_that_was_stopped_gives_the_bits_of_one_that_was_not(
    video_run: Path, image_run: Path, corpora: Path, gin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("optimizer.frozen=('visual_encoder', 'unet')", "train.num_steps=4", "checkpoint.every_steps=2")
    with monkeypatch.context() as patched:
        patched.setattr(StopSignal, "reached", lambda self, step: step == 2)
        with pytest.raises(SystemExit) as stopped:
            train_video(tmp_path / "run", image_run, corpora, gin_file, *settings)
        assert stopped.value.code == cli.EXIT_STOPPED
    train_video(tmp_path / "run", image_run, corpora, gin_file, *settings)

    def lines(run: Path) -> list[list[float]]:
        rows = [json.loads(line) for line in (run / JSONL).read_text(encoding="utf-8").splitlines()]
        return [[row["step"], row["loss"], row["grad_norm"], row["images"]] for row in rows]

    assert lines(tmp_path / "run") == lines(video_run)
    assert lines(video_run)[-1][0] == 4 and lines(video_run)[-1][3] == 2 * 4
    one, other = (load_params(run, load_config(run)) for run in (video_run, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_evaluation_measures_it_beside_the_image_decoder_and_a_clip_at_rest(video_run: Path) -> None:
    numbers = evaluate_clips(video_run, num_clips=3)
    assert set(numbers) == {"scenes", "unseen"}
    assert set(numbers["scenes"]) == {VIDEO, IMAGE, IMAGE_ONE_NOISE, STILL}
    still = numbers["scenes"][STILL]
    assert still["displacement_error_px"] > 3  # what moves moves by that much
    assert still["flicker"] == 0
    folder = video_run / "evaluation"
    assert json.loads((folder / "clips.json").read_text(encoding="utf-8")) == numbers
    with Image.open(folder / "clip-scenes-000.gif") as animation:
        assert (animation.size, animation.n_frames) == ((4 * 64, 64), 4)
    assert "clip-unseen-000.gif" in (folder / "clips.html").read_text(encoding="utf-8")


def moving(num_frames: int) -> bytes:
    frames = np.zeros((num_frames, 64, 64, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[:, 4 * t : 4 * t + 8] = 200
    return encode_mp4(list(frames))


def test_reconstruct_writes_an_animation_of_originals_and_drawings(video_run: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(moving(8))
    out = tmp_path / "out.gif"
    cli.main(["reconstruct", str(video_run), *[str(tmp_path / "clip.mp4")] * 2, "--out", str(out)])
    with Image.open(out) as animation:
        assert (animation.size, animation.n_frames, animation.info["duration"]) == ((128, 128), 4, 250)
        animation.seek(3)
        shown = np.asarray(animation.convert("RGB")).astype(int)
    assert shown[:, 30:36].min() > 150 and shown[:, :20].max() < 60  # the last of four frames, number 7


def test_bad_input_gets_a_line(
    video_run: Path, image_run: Path, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, words, out = tmp_path / "short.mp4", tmp_path / "words.mp4", tmp_path / "out.gif"
    short.write_bytes(moving(3))
    words.write_bytes(b"no video")
    line = fail(["reconstruct", video_run, short, "--out", out], capsys)
    assert "short.mp4" in line and "the video has 3 frames, the clip (decoder.video.num_frames) 4" in line
    assert "is no video of which a clip can be made: damaged_video" in fail(
        ["reconstruct", video_run, words, "--out", out], capsys
    )
    assert "draws images; give a video decoder's work directory" in fail(
        ["reconstruct", image_run, short, "--out", out], capsys
    )
    assert "wanted a name for an animation" in fail(
        ["reconstruct", video_run, short, "--out", tmp_path / "out.jpg"], capsys
    )
    recipe = ["train", "openmoji_tiny_video_decoder", "--dry_run"]
    assert "which the 2 levels of the U-Net cannot halve: must be a multiple of 16; nearest: 64 or 80" in fail(
        [*recipe, "--gin.decoder.image_size=72"], capsys
    )
    assert "decoder.video.num_frames: must be at least 2" in fail([*recipe, "--gin.decoder.video.num_frames=1"], capsys)
    assert "decoder.video.kernel_frames: must be odd" in fail([*recipe, "--gin.decoder.video.kernel_frames=2"], capsys)
    with pytest.raises(ConfigError, match=r"train\.task is decoder, wanted video_decoder"):
        evaluate_clips(image_run)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_animations_hold_every_frame_in_every_format(suffix: str, tmp_path: Path) -> None:
    frames = np.stack([np.full((16, 32, 3), 40 * t, np.uint8) for t in range(5)])
    path = tmp_path / f"film{suffix}"
    check_new_animation(path)
    write_animation(path, frames, 0.25)
    if suffix == ".mp4":
        from data_pipelines.video import read_frames

        found = read_frames(path.read_bytes(), lambda times: np.arange(len(times)), lambda frame: frame.mean())
    else:
        with Image.open(path) as animation:
            found = []
            for t in range(animation.n_frames):
                animation.seek(t)
                found.append(np.asarray(animation.convert("RGB")).mean())
    assert found == pytest.approx([0, 40, 80, 120, 160], abs=3)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UserError, match="exists already"):
        check_new_animation(path)


def test_data_is_checked_and_shown(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = f"--gin.data.sources.videos.shards={corpora}/train/videos-*.tar"
    cli.main(["data", "check", "openmoji_tiny_video_decoder", shards])
    assert "4 clips of 8 frames a step" in capsys.readouterr().out
    page = tmp_path / "page.html"
    cli.main(["data", "show", "openmoji_tiny_video_decoder", shards, "--rows", "2", "--out", str(page)])
    assert "2 clips of the visual decoder" in page.read_text(encoding="utf-8")
