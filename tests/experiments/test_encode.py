"""From pixels and from what was encoded beforehand a model gets the same losses, up to the rounding of bfloat16."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import fail
from tiny import random_parameters

from emu2_jax import overrides
from emu2_jax.checkpoint import CONVERTED_STEP, Checkpointer
from emu2_jax.config import CheckpointConfig, ExperimentConfig
from emu2_jax.diffusion.decoder import init_unet
from emu2_jax.errors import DataError
from emu2_jax.models.emu2 import encode_images
from emu2_jax.train import build_program
from experiments import cli, encode
from experiments.inputs import TrainingInput, example_shapes, make_task, open_input, open_tokenizer
from experiments.runs import CONFIG, load_config, load_params, override, resolve

DECODER = [
    "--gin.decoder.unet.cross_attention_width=32",
    "--gin.decoder.unet.block_out_channels=(16,)",
    "--gin.decoder.unet.transformer_layers_per_block=(1,)",
    "--gin.decoder.unet.num_attention_heads=(1,)",
    "--gin.decoder.batch_images=4",
    "--gin.decoder.random_scale_max=1.25",
]
#: A VAE of two levels, and a U-Net on its latents.
VAE = [
    "--gin.decoder.latent=autoencoder_kl",
    "--gin.decoder.vae.latent_channels=3",
    "--gin.decoder.vae.block_out_channels=(4,4)",
    "--gin.decoder.image_size=16",
    "--gin.decoder.latent_factor=2",
    "--gin.decoder.unet.layers_per_block=1",
    "--gin.decoder.unet.time_id_width=4",
    "--gin.decoder.vae.layers_per_block=1",
    "--gin.decoder.vae.norm_groups=2",
    "--gin.decoder.unet.in_channels=3",
    "--gin.decoder.unet.out_channels=3",
    "--gin.optimizer.frozen=('visual_encoder','vae')",
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


# --- latents of a VAE -------------------------------------------------------------------------------------------------


def resolved(gin_file: Path, *flags: str | Path) -> ExperimentConfig:
    return resolve("openmoji_tiny_decoder", [gin_file], [*DECODER, *VAE, *map(str, flags)])[0]


@pytest.fixture(scope="module")
def vae_params(gin_file: Path) -> dict[str, Any]:
    """Of all parts, with biases: a posterior whose mean and spread differ from place to place."""
    init = make_task(resolved(gin_file), None).init
    return dict(jax.tree.map(jnp.asarray, random_parameters(init)))


def save(params: Mapping[str, Any], path: Path) -> Path:
    path.mkdir()
    (path / CONFIG).touch()
    checkpointer = Checkpointer(path, CheckpointConfig(), print)
    checkpointer.save(CONVERTED_STEP, {"params": dict(params)}, {}, "")
    checkpointer.wait()
    checkpointer.close()
    return path


@pytest.fixture(scope="module")
def vae_workdir(vae_params: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save({part: vae_params[part] for part in ("visual_encoder", "vae")}, tmp_path_factory.mktemp("vae") / "w")


def encode_crops(workdir: Path, gin_file: Path, out: Path, *flags: str) -> None:
    run(
        *("encode", workdir, "--crops", "openmoji_tiny_decoder", "--source", "pairs", "--out", out),
        *("--gin_file", gin_file, "--batch", "40", *DECODER, *VAE, *flags),
    )


@pytest.fixture(scope="module")
def crops(vae_workdir: Path, gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two epochs of 200 images, stopped in the middle of the second of the four shards and gone on with."""
    out = tmp_path_factory.mktemp("crops") / "crops"
    write, written = encode.write_store_shard, []

    def stop(path: Path, header: Any, stems: Any, records: Iterable[Any]) -> None:
        def until_stopped() -> Iterator[Any]:
            for i, record in enumerate(records):
                if written and i == 50:
                    raise KeyboardInterrupt
                yield record

        write(path, header, stems, until_stopped())
        written.append((path, path.stat().st_mtime_ns))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "write_store_shard", stop)
        with pytest.raises(SystemExit):
            encode_crops(vae_workdir, gin_file, out)
    assert [path.relative_to(out).as_posix() for path in out.rglob("*.*")] == ["epoch-0000/pairs-000000.tar"]
    encode_crops(vae_workdir, gin_file, out, "--epochs", "2")
    assert [(path, path.stat().st_mtime_ns) for path, _ in written] == written
    assert len(list(out.rglob("*.tar"))) == 4
    return out


def batches_of(config: ExperimentConfig, steps: Sequence[int]) -> list[Mapping[str, np.ndarray]]:
    data = open_input(config, None)
    return [data._pipeline.batch(step).fields for step in steps]


def test_decoder_from_the_moments_of_a_vae(gin_file: Path, crops: Path, vae_params: Mapping[str, Any]) -> None:
    """The draw from the posterior is made in training, with the key of the step: the same as from pixels."""
    pixels, stored = resolved(gin_file), resolved(gin_file, f"--gin.data.sources.pairs.embeddings={crops}")
    task = make_task(pixels, None)

    @jax.jit
    def run(params: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        term = task.losses(params, batch, jax.random.key(5)).terms["noise"]
        return term.sum / term.weight, task.latents(params, batch, jax.random.key(3))

    steps = [0, 7, 50]  # of 50 steps in an epoch
    for step, from_pixels, from_store in zip(steps, batches_of(pixels, steps), batches_of(stored, steps), strict=True):
        assert "images" not in from_store
        assert from_store["latents"].dtype == np.float16
        assert from_store["latents"].shape == (4, 8, 8, 6)
        assert np.array_equal(from_pixels["time_ids"], from_store["time_ids"]), step
        (loss, latents), (expected, drawn) = (run(vae_params, batch) for batch in (from_store, from_pixels))
        assert float(loss) == pytest.approx(float(expected), rel=1e-3)  # most of it is the embeddings' bfloat16
        np.testing.assert_allclose(latents, drawn, rtol=2e-3, atol=2e-3 * float(jnp.std(drawn)))
    assert {name: array.shape for name, array in from_store.items()} == {
        name: shape for name, (shape, _) in example_shapes(stored).items()
    }


def test_past_the_stored_epochs_the_crops_come_again(
    gin_file: Path, crops: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolved(gin_file, f"--gin.data.sources.pairs.embeddings={crops}", "--gin.data.read_threads=0")
    data = open_input(config, None)
    assert data.summary["pairs"]["stored epochs of crops"] == 2
    batches = data.iterate(0)
    epochs = [np.sort(np.concatenate([next(batches).arrays["time_ids"] for _ in range(50)]), axis=0) for _ in range(3)]
    assert np.array_equal(epochs[0], epochs[2])
    assert not np.array_equal(epochs[0], epochs[1])
    next(batches)
    said = [line for line in capsys.readouterr().out.splitlines() if "all samples have been read" in line]
    assert [line.split("; ")[1] for line in said] == [
        "epoch 1 goes through them in a new order, with the stored crops of epoch 1",
        "epoch 2 goes through them in a new order, with the stored crops of epoch 0",
        "epoch 3 goes through them in a new order, with the stored crops of epoch 1",
    ]


def test_another_vae_is_refused(gin_file: Path, crops: Path, vae_params: Mapping[str, Any]) -> None:
    data = open_input(resolved(gin_file, f"--gin.data.sources.pairs.embeddings={crops}"), None)
    data.check_encoder(vae_params)
    vae = jax.tree.map(np.array, vae_params["vae"])
    vae["encoder"]["conv_in"]["bias"].view(np.uint32)[0] ^= 1
    with pytest.raises(DataError, match=r"^data\.sources\.pairs\.embeddings: .*epoch-0000 was made by another VAE"):
        data.check_encoder({**vae_params, "vae": vae})
    config = resolved(gin_file, f"--gin.data.sources.pairs.embeddings={crops}", "--gin.decoder.vae.norm_epsilon=1e-5")
    with pytest.raises(DataError, match="was made with vae_norm_epsilon = 1e-06, this run has 1e-05"):
        open_input(config, None)


def test_a_vae_that_gives_no_numbers_is_named(
    gin_file: Path, vae_params: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = jax.tree.map(np.array, vae_params["vae"])
    vae["encoder"]["conv_in"]["bias"][1] = np.nan
    workdir = save({"visual_encoder": vae_params["visual_encoder"], "vae": vae}, tmp_path / "nan")
    start = ["encode", workdir, "--crops", "openmoji_tiny_decoder", "--source", "pairs", "--out", tmp_path / "out"]
    line = fail([*start, "--gin_file", gin_file, *DECODER, *VAE], capsys)
    assert re.search(r"vae: not finite in float16 .* for image 'pairs-00000000' of .*pairs-000000\.tar", line)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_crops_need_a_vae(workdir: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["encode", workdir, "--crops", "openmoji_tiny_decoder", "--source", "pairs", "--out", tmp_path / "out"]
    assert "holds no VAE" in fail([*start, "--gin_file", gin_file, *DECODER, *VAE], capsys)


def test_whole_pictures_are_not_crops(gin_file: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(gin_file, f"--gin.data.sources.pairs.embeddings={store}")
    with pytest.raises(DataError, match=r"epoch-0000 is not there; the decoder reads crops"):
        open_input(config, None)


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
        (["--shards", "x.tar", "--epochs", "2"], "--epochs: is for --crops"),
        (["--crops", "openmoji_tiny_decoder", "--source", "pairs", "--epochs", "0", *DECODER], "--epochs: got 0"),
    ],
)
def test_bad_arguments(
    workdir: Path, gin_file: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--gin_file", gin_file] if "--crops" in flags else []
    assert message in fail(["encode", workdir, "--out", tmp_path / "out", *flags, *file], capsys)
