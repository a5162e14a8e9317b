"""A decoder trained by the real command: resumed with its moving average, previewed, evaluated and reported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command import fail
from PIL import Image

from emu2_jax import hosts
from emu2_jax import train as train_lib
from emu2_jax.checkpoint import FOLDER, Checkpointer, latest_state, load_parts
from emu2_jax.errors import ConfigError
from emu2_jax.metrics import JSONL
from emu2_jax.train import build_program
from emu2_jax.weights.parameters import read, whole
from emu2_jax.weights.stream import open_parameters
from experiments import cli
from experiments.inputs import make_task
from experiments.previews import open_previews
from experiments.runs import load_config, load_params

pytestmark = pytest.mark.usefixtures("compiled_once")

NUM_STEPS = 6
SETTINGS = [
    "--gin.decoder.unet.cross_attention_width=32",
    "--gin.decoder.unet.block_out_channels=(16,)",
    "--gin.decoder.unet.transformer_layers_per_block=(0,)",
    "--gin.decoder.unet.mid_transformer_layers=1",
    "--gin.decoder.unet.num_attention_heads=(1,)",
    "--gin.decoder.unet.time_id_width=4",
    "--gin.decoder.batch_images=4",
    "--gin.decoder.num_sampling_steps=2",
    f"--gin.train.num_steps={NUM_STEPS}",
    "--gin.train.init_from=None",
    "--gin.checkpoint.every_steps=3",
    "--gin.checkpoint.asynchronous=False",
    "--gin.optimizer.ema_decay=0.5",
    "--gin.optimizer.warmup=log",
    "--gin.evaluation.preview_every_steps=2",
]


def run(*arguments: str | Path) -> None:
    cli.main([str(argument) for argument in arguments])


def start(workdir: Path, gin_file: Path, *more: str) -> None:
    run("train", "openmoji_tiny_decoder", "--workdir", workdir, f"--gin_file={gin_file}", *SETTINGS, *more)


@pytest.fixture(scope="module")
def finished(gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "decoder"
    start(workdir, gin_file)
    return workdir


@pytest.fixture(scope="module")
def finished_state(finished: Path) -> Any:
    return state(finished)


def state(workdir: Path) -> Any:
    config = load_config(workdir)
    program = build_program(make_task(config, None), config)
    checkpointer = Checkpointer(workdir, config.checkpoint, print)
    restored = checkpointer.restore(program.abstract_state)
    checkpointer.close()
    assert restored is not None
    return restored[0]


def lines(workdir: Path) -> list[dict[str, Any]]:
    names = ("step", "loss", "grad_norm", "preview_psnr_db/scenes", "preview_psnr_db/unseen")
    logged = [json.loads(line) for line in (workdir / JSONL).read_text(encoding="utf-8").splitlines()]
    return [{name: entry[name] for name in names if name in entry} for entry in logged]


def test_a_run_that_broke_off_ends_with_the_same_bits_moving_average_included(
    finished: Path, finished_state: Any, gin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, place, placed = tmp_path / "decoder", train_lib.BatchPlacer.__call__, []

    def break_off(self: Any, arrays: Any) -> Any:
        placed.append(1)
        if len(placed) == 5:
            raise KeyboardInterrupt
        return place(self, arrays)

    monkeypatch.setattr(train_lib.BatchPlacer, "__call__", break_off)
    with pytest.raises(SystemExit):
        start(workdir, gin_file)
    assert int(state(workdir)["step"]) == 3
    start(workdir, gin_file)
    jax.tree.map(np.testing.assert_array_equal, state(workdir), finished_state)
    assert lines(workdir) == lines(finished)


def test_the_moving_average_is_what_a_run_hands_on(finished: Path, finished_state: Any) -> None:
    kept, average = finished_state["params"]["unet"], finished_state["ema"]["unet"]
    assert set(finished_state["ema"]) == {"unet"}
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(average), strict=True))
    loaded = load_params(finished, load_config(finished))
    jax.tree.map(np.testing.assert_array_equal, loaded["unet"], average)
    jax.tree.map(np.testing.assert_array_equal, loaded["visual_encoder"], finished_state["params"]["visual_encoder"])
    exported = open_parameters(finished)["unet/conv_in/kernel"]
    np.testing.assert_array_equal(read(exported, whole(exported.shape)), average["conv_in"]["kernel"])
    assert latest_state(finished)[2] == {"unet": "ema", "visual_encoder": "params"}
    wanted = {"unet": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), average)}
    jax.tree.map(
        np.testing.assert_array_equal, load_parts(finished, wanted, lambda path, saved, shape: None)["unet"], average
    )


def test_a_moving_average_cannot_begin_in_the_middle(
    finished: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(finished, tmp_path / "decoder")
    changed = ["--gin.optimizer.ema_decay=None", "--allow_config_change", "optimizer.ema_decay"]
    settings = [setting for setting in SETTINGS if "ema_decay" not in setting]
    arguments = ["train", "openmoji_tiny_decoder", "--workdir", workdir, f"--gin_file={gin_file}", *settings, *changed]
    message = fail(arguments, capsys)
    assert "has a moving average of the parameters, and optimizer.ema_decay is not set" in message
    assert sorted(path.name for path in (workdir / FOLDER).iterdir() if path.name.startswith("0")) == [
        "00000003",
        "00000006",
    ]


def test_previews_are_drawn_logged_and_reported(finished: Path) -> None:
    assert [entry["step"] for entry in lines(finished) if "preview_psnr_db/scenes" in entry] == [2, 4, 6]
    names = sorted(path.name for path in (finished / "previews").iterdir())
    assert names == [f"{step:08d}-{split}.png" for step in (2, 4, 6) for split in ("scenes", "unseen")]
    assert Image.open(finished / "previews" / names[0]).size == (2 * (2 * 64 + 6), 64 + 4)  # two pairs of 64 px
    run("report", finished)
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="previews after step') == 6 and 'alt="previews after step 6"' in page


def test_previews_are_refused_on_several_hosts(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(finished)
    monkeypatch.setattr(hosts, "count", lambda: 2)
    with pytest.raises(ConfigError, match=r"evaluation\.preview_every_steps: previews are drawn on one host only"):
        open_previews(config, tmp_path)
    unset = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, preview_every_steps=None))
    assert open_previews(unset, tmp_path) is None


def test_a_decoder_is_evaluated_by_itself(
    finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("evaluate", finished)
    numbers = json.loads((finished / "evaluation" / "autoencoding.json").read_text(encoding="utf-8"))
    names = ("psnr_db", "ssim", "embedding_cosine", "psnr_mean_db", "ssim_mean", "embedding_cosine_other", "num_images")
    assert set(numbers) == {f"{name}{suffix}" for name in names for suffix in ("", "_unseen")}
    assert numbers["num_images"] == 4 and 0 < numbers["psnr_db"] < numbers["psnr_mean_db"] < 40  # it has learnt nothing
    assert Image.open(finished / "evaluation" / "unseen.png").size == (2 * (2 * 64 + 6), 64 + 4)
    before = (finished / "evaluation" / "autoencoding.json").stat().st_mtime_ns
    capsys.readouterr()
    run("evaluate", finished, "--gin.decoder.num_sampling_steps=1", "--gin.decoder.guidance_scale=1.0")
    other = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(other["psnr_db"]) != pytest.approx(numbers["psnr_db"], abs=1e-3)
    assert (
        finished / "evaluation" / "autoencoding.json"
    ).stat().st_mtime_ns == before  # only its own settings' are kept
    run("evaluate", finished, "--shards", f"{corpus}/heldout/unseen-*.tar", "--out", tmp_path / "out")
    alone = json.loads((tmp_path / "out" / "autoencoding.json").read_text(encoding="utf-8"))
    assert alone["psnr_db"] == pytest.approx(numbers["psnr_db_unseen"])


def test_bad_input_of_an_evaluation(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "evaluation.scenes: names no shards" in fail(
        ["evaluate", finished, "--gin.evaluation.scenes=''", "--gin.evaluation.unseen=''"], capsys
    )
    assert "are for a decoder's work directory" in fail(["evaluate", tmp_path, "--shards", "x.tar"], capsys)
    assert "--shards" in fail(["evaluate", finished, "--shards", f"{tmp_path}/none-*.tar"], capsys)
    weights = f"--gin.evaluation.clip_weights={tmp_path}/clip"
    assert f"{tmp_path}/clip" in fail(["evaluate", finished, weights], capsys)


def test_pictures_of_any_size_are_redrawn(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("wide.png", "tall.jpg", "tiny.webp")]
    for path, size in zip(paths, ((90, 200, 3), (300, 40, 3), (3, 2, 3)), strict=True):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path)
    run("reconstruct", finished.parent, *paths, "--out", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (3 * 64, 2 * 64)
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:60])
    message = fail(["reconstruct", finished.parent, paths[0], broken, "--out", tmp_path / "more.png"], capsys)
    assert f"{broken}: is not an image that can be decoded" in message
    assert not (tmp_path / "more.png").exists()
