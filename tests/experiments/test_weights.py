"""`emu2 convert`, `emu2 inspect`, `emu2 export` as a user types them, and a run that starts from converted weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from command import fail

from emu2_jax.weights import Form, official_shapes, table
from emu2_jax.weights.files import open_weights
from experiments import cli
from experiments.describe import parameter_counts
from experiments.runs import load_config, load_params, resolve

RECIPE = "openmoji_tiny_stage2"


@pytest.fixture(scope="module")
def files(gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random bfloat16 weights in the Hugging Face form."""
    folder = tmp_path_factory.mktemp("files")
    config, _ = resolve(RECIPE, [gin_file], [])
    rng = np.random.default_rng(0)
    tensors = {
        name: (0.1 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16)
        for name, shape in official_shapes("emu2_hf", config.model).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def workdir(files: Path, gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a work directory."""
    target = tmp_path_factory.mktemp("runs") / "converted"
    run("convert", "--from", files, "--to", target, "--recipe", RECIPE, "--gin_file", gin_file)
    return target


def run(*arguments: str | Path) -> None:
    cli.main([str(argument) for argument in arguments])


def test_there_and_back_to_the_bit(files: Path, workdir: Path, tmp_path: Path) -> None:
    run("export", workdir, "--form", "emu2_hf", "--to", tmp_path / "again", "--shard_gb", "0.00002")
    first, again = open_weights(str(files)), open_weights(str(tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(first[name].array().tobytes() == again[name].array().tobytes() for name in first)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["vision_config"]["width"] == 32
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2


def test_a_run_starts_from_it_but_does_not_go_on_in_it(
    workdir: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train.num_steps=1", f"train.init_from={workdir}", "optimizer.learning_rate=0"]
    flags += [f"data.sources.{name}.weight=0" for name in ("interleaved", "text")]  # the small corpus has none
    arguments = ["train", RECIPE, "--gin_file", gin_file, *(f"--gin.{flag}" for flag in flags)]
    run(*arguments, "--workdir", tmp_path / "run")
    assert f"from {workdir}; nothing new" in capsys.readouterr().out
    mine = load_params(tmp_path / "run", load_config(tmp_path / "run"))
    converted = load_params(workdir, load_config(workdir))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(converted), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = (part for name in ("train", "optimizer", "data") for part in ("--allow_config_change", name))
    line = fail([*arguments, "--workdir", workdir, *changed], capsys)
    assert "holds converted weights, without an optimiser's state" in line and "train.init_from" in line
    assert (workdir / "checkpoints" / "00000000").is_dir()


def test_generation_takes_it(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("generate", workdir, "--prompt", "a red", "--max_tokens", "3")
    assert capsys.readouterr().out


def test_parts_that_no_file_holds_are_drawn_as_a_run_draws_them(
    files: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = resolve(RECIPE, [gin_file], [])
    everything = {name: tensor.array() for name, tensor in open_weights(str(files)).items()}

    def below(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): x for name, x in everything.items() if name.startswith(prefix)}

    llama = below("model.decoder.lm.")
    safetensors.numpy.save_file(llama, tmp_path / "llama.safetensors")
    safetensors.numpy.save_file(below("model.visual."), tmp_path / "eva.safetensors")
    run(
        *("convert", "--from", f"llama_hf={tmp_path / 'llama.safetensors'}", "--from", tmp_path / "eva.safetensors"),
        *("--to", tmp_path / "mixed", "--recipe", RECIPE, "--gin_file", gin_file, "--dtype", "float32"),
    )
    assert "project_down, project_up: in none of the files, drawn at random" in capsys.readouterr().out
    from experiments.inputs import make_task

    drawn = jax.jit(make_task(config, None).init)(jax.random.fold_in(jax.random.key(config.train.seed), 0))
    loaded = load_params(tmp_path / "mixed", config)
    np.testing.assert_array_equal(loaded["project_up"]["kernel"], drawn["project_up"]["kernel"])
    wanted = llama["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(loaded["language_model"]["final_norm"]["scale"], wanted)


def test_inspection(files: Path, workdir: Path, gin_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("inspect", files)
    bare = capsys.readouterr().out
    assert "tensors of form emu2_hf" in bare and "(unknown)" not in bare
    run("inspect", files, "--recipe", RECIPE, "--gin_file", gin_file, "--mesh", "fsdp=2,tensor=2")
    resolved = capsys.readouterr().out
    assert "tensors of openmoji_tiny_stage2 are there; 0 more are known and skipped" in resolved
    assert "on one device of data 1  x  fsdp 2  x  tensor 2 (4 devices), GB" in resolved
    run("inspect", workdir, "--tensors")
    saved = capsys.readouterr().out
    assert "visual_encoder/blocks/layers/attention/qkv" in saved and "frozen" in saved and "trains" in saved
    total = sum(np.prod(shape) for shape in official_shapes("emu2_hf", load_config(workdir).model).values())
    for text in (bare, resolved, saved):
        (line,) = (line for line in text.splitlines() if line.startswith("  total ") and "bfloat16" in line)
        assert f"{total:,}" in line


def test_an_index_of_the_full_model_resolves_every_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names alone, made from the official config, with what the release's own index holds besides."""
    config, _ = resolve("emu2_37b_stage2", [], [])
    names = list(official_shapes("emu2_hf", config.model))
    names += [f"model.decoder.lm.model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(60)]
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {name: f"model-{i % 15}.safetensors" for i, name in enumerate(names)}}))
    capsys.readouterr()
    run("inspect", path, "--recipe", "emu2_37b_stage2")
    out = capsys.readouterr().out
    assert f"{len(names)} names of form emu2_hf; the files that it names are not here" in out
    assert f"all {len(names) - 60} tensors of emu2_37b_stage2 are there; 60 more are known and skipped" in out
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], "x.safetensors")}))
    line = fail(["inspect", path, "--recipe", "emu2_37b_stage2"], capsys)
    assert line.endswith("1 missing: model.visual.cls_token")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("truncated", "model.safetensors: is truncated: "),
        ("layers", "it has 1 layers model.decoder.lm.model.layers.N, the config 2; 9 missing: "),
        ("dtype", "has dtype I8; wanted one of F64, F32, F16, BF16"),
        ("tokenizer", "has 4 with the special tokens"),
        ("there", "exists already and is not empty"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    change: str,
    said: str,
    files: Path,
    gin_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    path = broken / "model.safetensors"
    path.write_bytes((files / "model.safetensors").read_bytes())
    target = tmp_path / "target"
    arguments = ["convert", "--from", broken, "--to", target, "--recipe", RECIPE, "--gin_file", gin_file]
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif change == "layers":
        arguments.append("--gin.model.language.num_layers=2")
    elif change == "dtype":
        tensors = {name: tensor.array() for name, tensor in open_weights(str(path)).items()}
        name = "model.visual.blocks.0.attn.qkv.weight"
        safetensors.numpy.save_file({**tensors, name: np.zeros(tensors[name].shape, np.int8)}, path)
        said = f"model.safetensors: {name} {said}"
    elif change == "tokenizer":
        config, _ = resolve(RECIPE, [gin_file], [])
        arguments.append(f"--gin.model.language.vocab_size={config.model.language.vocab_size + 1}")
        said = f"model.language.vocab_size: is {config.model.language.vocab_size + 1}, but "
    else:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    line = fail(arguments, capsys)
    assert said in line
    left = {path.name for path in tmp_path.iterdir()} - {"broken"}
    assert left == ({"target"} if change == "there" else set())


@pytest.mark.parametrize(
    ("recipe", "forms"),
    [
        ("emu2_37b_stage1a", ("emu2",)),
        ("emu2_37b_stage1b", ("emu2_hf",)),
        ("emu2_37b_stage2", ("emu2", "emu2_hf")),
        ("emu2_37b_stage2", ("llama_hf", "eva_timm", "eva_open_clip", "eva_clip")),
    ],
)
def test_full_size_parts_have_as_many_parameters_as_the_official_shapes(recipe: str, forms: tuple[Form, ...]) -> None:
    config, _ = resolve(recipe, [], [])
    counts = parameter_counts(config)
    for form in forms:
        rows = table(form, config.model, config.decoder)
        for part in rows.parts:
            shapes = official_shapes(form, config.model, config.decoder)
            own = [shapes[name] for row in rows.only([part]).rows for name in row.names]
            assert sum(math.prod(shape) for shape in own) == counts[part], part
