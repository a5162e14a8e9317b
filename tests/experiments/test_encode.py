"""From pixels and from what was encoded beforehand a model gets the same losses, up to the rounding of bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import fail

from emu2_jax import overrides
from emu2_jax.checkpoint import Checkpointer
from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion.decoder import init_unet
from emu2_jax.errors import DataError
from emu2_jax.models.emu2 import encode_images
from emu2_jax.train import build_program
from experiments import cli
from experiments.inputs import TrainingInput, make_task, open_input, open_tokenizer
from experiments.runs import CONFIG, load_config, load_params, override, resolve

DECODER = [
    "--gin.decoder.unet.cross_attention_width=32",
    "--gin.decoder.unet.block_out_channels=(16,)",
    "--gin.decoder.unet.transformer_layers_per_block=(1,)",
    "--gin.decoder.unet.num_attention_heads=(1,)",
    "--gin.decoder.batch_images=4",
    "--gin.decoder.random_scale_max=1.25",
]


def run(*arguments: str | Path) -> None:
    cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def workdir(gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage as it begins: nothing here depends on what it has learnt."""
    path = tmp_path_factory.mktemp("stage") / "stage1"
    path.mkdir()
    config, provenance = resolve("openmoji_tiny_stage1", [gin_file], [])
    text = overrides.dump(config, provenance)
    (path / CONFIG).write_text(text, encoding="utf-8")
    checkpointer = Checkpointer(path, config.checkpoint, print)
    checkpointer.save(1, build_program(make_task(config, None), config).init(), {"counts": {}}, text)
    checkpointer.wait()
    checkpointer.close()
    return path


@pytest.fixture(scope="module")
def store(workdir: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "pairs"
    run("encode", workdir, "--shards", f"{corpus}/train/pairs-*.tar", "--out", out, "--batch", "48")
    return out


@pytest.fixture(scope="module")
def params(workdir: Path) -> Mapping[str, Any]:
    return load_params(workdir, load_config(workdir))


def stage2(workdir: Path, *flags: str) -> ExperimentConfig:
    """The second stage on the pairs alone, with the first stage's settings."""
    own = ["--gin.optimizer.frozen=('visual_encoder',)", "--gin.objective.regression_loss_weight=1.0"]
    return override(load_config(workdir), [], [*own, *flags])


def first_batch(config: ExperimentConfig) -> tuple[TrainingInput, Mapping[str, np.ndarray]]:
    data = open_input(config, open_tokenizer(config))
    batches = data.iterate(0)
    arrays = next(batches).arrays
    batches.close()  # type: ignore[attr-defined]
    return data, arrays


def losses(config: ExperimentConfig, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    task = make_task(config, open_tokenizer(config) if config.train.task == "pretrain" else None)
    terms = jax.jit(task.losses)(params, dict(arrays), jax.random.key(5)).terms
    return {name: float(term.sum / term.weight) for name, term in terms.items()}


def test_pretraining_from_embeddings(workdir: Path, store: Path, params: Mapping[str, Any]) -> None:
    pixels, stored = stage2(workdir), stage2(workdir, f"--gin.data.sources.pairs.embeddings={store}")
    _, from_pixels = first_batch(pixels)
    data, from_store = first_batch(stored)
    data.check_encoder(params)
    assert "images" not in from_store
    encoded = encode_images(pixels.model, params["visual_encoder"], jnp.asarray(from_pixels["images"][0]))
    # A unit in the last place of bfloat16: a batch of another size rounds differently.
    rounded = np.asarray(encoded) * from_pixels["image_mask"][0][:, None, None]
    np.testing.assert_allclose(from_store["embeddings"][0].astype(np.float32), rounded, rtol=2**-7, atol=1e-4)
    expected, found = (losses(*c) for c in ((pixels, params, from_pixels), (stored, params, from_store)))
    assert set(expected) == {"text", "regression"}
    assert found == pytest.approx(expected, rel=1e-3)
    shapes = {name: array.shape for name, array in from_store.items()}
    assert make_task(stored, None).model_flops(shapes) < make_task(pixels, None).model_flops(
        {name: array.shape for name, array in from_pixels.items()}
    )


def test_decoder_from_embeddings_and_latents(
    workdir: Path, gin_file: Path, tmp_path: Path, params: Mapping[str, Any]
) -> None:
    recipe, out = "openmoji_tiny_decoder", tmp_path / "crops"
    run("encode", workdir, "--crops", recipe, "--source", "pairs", "--out", out, "--gin_file", gin_file, *DECODER)
    pixels, _ = resolve(recipe, [gin_file], DECODER)
    stored, _ = resolve(recipe, [gin_file], [*DECODER, f"--gin.data.sources.pairs.embeddings={out}"])
    both = {**params, "unet": init_unet(pixels.decoder, jax.random.key(1))}
    both = {name: both[name] for name in ("visual_encoder", "unet")}
    _, from_pixels = first_batch(pixels)
    _, from_store = first_batch(stored)
    assert "images" not in from_store
    assert np.array_equal(from_pixels["time_ids"], from_store["time_ids"])
    assert losses(stored, both, from_store) == pytest.approx(losses(pixels, both, from_pixels), rel=3e-3)


def test_an_encoder_that_differs_in_one_bit_is_refused(workdir: Path, store: Path, params: Mapping[str, Any]) -> None:
    data, _ = first_batch(stage2(workdir, f"--gin.data.sources.pairs.embeddings={store}"))
    data.check_encoder(params)
    encoder = jax.tree.map(np.array, params["visual_encoder"])
    kernel = encoder["patch_kernel"].view(np.uint32)
    kernel[3, 5] ^= 1
    with pytest.raises(DataError, match=r"^data\.sources\.pairs\.embeddings: .* was made by another visual encoder"):
        data.check_encoder({"visual_encoder": encoder})
    kernel[3, 5] ^= 1
    data.check_encoder({"visual_encoder": encoder})


def test_training_refuses_a_store_of_another_encoder(
    store: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --gin.train.init_from the run's encoder is a random one."""
    flags = [
        *("--gin.optimizer.frozen=('visual_encoder','project_down')", f"--gin.data.sources.pairs.embeddings={store}"),
        *("--gin.train.num_steps=1", "--gin.train.seed=9"),
    ]
    start = ["train", "openmoji_tiny_stage1", "--workdir", tmp_path / "run", "--gin_file", gin_file]
    assert "another visual encoder" in fail([*start, *flags], capsys)


def test_other_settings_are_refused(
    workdir: Path, store: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage2(workdir, f"--gin.data.sources.pairs.embeddings={store}", "--gin.model.num_visual_tokens=4")
    with pytest.raises(DataError, match="was made with visual_tokens = 16, this run has 4"):
        open_input(config, open_tokenizer(config))
    again = ["encode", workdir, "--shards", f"{corpus}/train/pairs-*.tar", "--out", store]
    line = fail([*again, "--gin.data.image_decoding=fast"], capsys)
    assert "is there already, with another settings" in line


def test_encoding_goes_on_where_it_stopped(workdir: Path, corpus: Path, store: Path, tmp_path: Path) -> None:
    """Shards that are there stay as they are; parts divide the rest; the result is the same bytes."""
    out = tmp_path / "store"
    out.mkdir()
    names = sorted(path.name for path in store.glob("*.tar"))
    assert len(names) == 2
    (out / f"{names[0]}.77.partial").write_bytes(b"cut off")
    again = ["encode", workdir, "--shards", f"{corpus}/train/pairs-*.tar", "--out", out, "--batch", "48"]
    run(*again, "--part", "2/2")
    assert not (out / names[0]).exists()
    before = (out / names[1]).stat().st_mtime_ns
    run(*again)
    assert (out / names[1]).stat().st_mtime_ns == before
    assert all((out / name).read_bytes() == (store / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shards", "nowhere/*.tar"], "no file matches"),
        ([], "--shards: needed"),
        (["--crops", "openmoji_tiny_decoder"], "takes --source"),
        (["--crops", "openmoji_tiny_stage1", "--source", "pairs"], "trains no visual decoder"),
        (["--shards", "x.tar", "--part", "3/2"], "--part: got '3/2'"),
    ],
)
def test_bad_arguments(
    workdir: Path, gin_file: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--gin_file", gin_file] if "--crops" in flags else []
    assert message in fail(["encode", workdir, "--out", tmp_path / "out", *flags, *file], capsys)
