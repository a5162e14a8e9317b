"""Bad input gets one clear line and exit code 2, and nothing is overwritten."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import command
import pytest
from PIL import Image

from emu2_jax.checkpoint import FOLDER
from emu2_jax.config import SourceConfig
from emu2_jax.metrics import JSONL
from experiments import cli
from experiments.recipes import RECIPES
from experiments.runs import CONFIG, LOCK

STAGE1 = "openmoji_tiny_stage1"


@pytest.fixture(scope="module")
def trained(gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with checkpoints after steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    cli.main(
        [
            *("train", STAGE1, "--workdir", str(workdir), f"--gin_file={gin_file}"),
            *("--gin.train.num_steps=4", "--gin.checkpoint.every_steps=2"),
        ]
    )
    return workdir


def train(workdir: Path, gin_file: Path, *flags: str) -> list[str | Path]:
    return ["train", STAGE1, "--workdir", workdir, f"--gin_file={gin_file}", *flags]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--gin.optimizer.learning_rte=1", "optimizer.learning_rate"),
        ("--gin.optimzer.learning_rate=1", "optimizer.learning_rate"),
        ("--gin.train.num_steps=10.5", "train.num_steps"),
        ("--gin.optimizer.schedule=cosin", "cosine"),
        ("--gin.optimizer=adam", "optimizer"),
        ("--gin.model.num_visual_tokens=15", "model.num_visual_tokens"),
        ("--steps=3", "--steps"),
        ("--gin.mesh.tensor=3", "mesh"),
        ("--gin.optimizer.frozen=()", "optimizer.frozen"),
        ("--gin.model.language.vocab_size=999", "model.language.vocab_size"),
        ("--gin.optimizer.accumulation_steps=3", "data.global_batch_rows"),
    ],
)
def test_bad_settings(
    flag: str, expected: str, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in command.fail(train(tmp_path / "run", gin_file, *flag.split()), capsys)
    assert not (tmp_path / "run").exists(), "a refused start leaves nothing that the corrected command would trip over"


def test_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nearest: openmoji_tiny_stage1" in command.fail(["train", "openmoji_tiny_stag1", "--dry_run"], capsys)


def test_work_directory_of_another_config(trained: Path, gin_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (trained / CONFIG, trained / JSONL)}
    flags = ("--gin.train.num_steps=4", "--gin.checkpoint.every_steps=2", "--gin.optimizer.learning_rate=0.5")
    line = command.fail(train(trained, gin_file, *flags), capsys)
    assert "optimizer.learning_rate" in line and "0.001" in line and "0.5" in line
    assert "--allow_config_change" in line
    assert {path: path.read_bytes() for path in before} == before


def test_allowed_change_continues(trained: Path, gin_file: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    flags = ("--gin.train.num_steps=6", "--gin.checkpoint.every_steps=2", "--allow_config_change=train.num_steps")
    cli.main([str(argument) for argument in train(workdir, gin_file, *flags)])
    steps = [json.loads(line)["step"] for line in (workdir / JSONL).read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def damaged_pairs(corpus: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in (corpus / "train").glob("pairs-*.tar"):
        shutil.copy(path, directory)
    return directory


def with_shards(pattern: str | Path) -> str:
    return f"--gin.data.sources.pairs.shards={pattern}"


def test_missing_shards(tmp_path: Path, gin_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = command.fail(train(tmp_path / "run", gin_file, with_shards(tmp_path / "none-*.tar")), capsys)
    assert "data.sources.pairs.shards" in line and "none-*.tar" in line


def test_cut_shard(corpus: Path, tmp_path: Path, gin_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = damaged_pairs(corpus, tmp_path / "shards")
    shard = shards / "pairs-000001.tar"
    shard.write_bytes(shard.read_bytes()[:100_123])
    line = command.fail(train(tmp_path / "run", gin_file, with_shards(shards / "pairs-*.tar")), capsys)
    assert "pairs-000001.tar" in line and "pairs-0000" in line and "byte" in line
    assert not (tmp_path / "run" / FOLDER).exists()


def test_foreign_shard(corpus: Path, tmp_path: Path, gin_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = damaged_pairs(corpus, tmp_path / "shards")
    (shards / "pairs-000000.tar").write_bytes(b"this is a text file, not a tar archive\n" * 100)
    line = command.fail(train(tmp_path / "run", gin_file, with_shards(shards / "pairs-*.tar")), capsys)
    assert "pairs-000000.tar" in line


def spoil_images(shard: Path, count: int) -> None:
    """Overwrite the middle of the first `count` PNG files with zeros; the tar stays whole."""
    data = bytearray(shard.read_bytes())
    position = 0
    for _ in range(count):
        position = data.index(b"IDAT", position) + 8
        data[position : position + 200] = bytes(200)
    shard.write_bytes(data)


def test_few_corrupt_images_are_counted_and_skipped(corpus: Path, tmp_path: Path, gin_file: Path) -> None:
    shards = damaged_pairs(corpus, tmp_path / "shards")
    spoil_images(shards / "pairs-000000.tar", 2)
    flags = ("--gin.train.num_steps=40", "--gin.data.max_bad_share=0.1", with_shards(shards / "pairs-*.tar"))
    cli.main([str(argument) for argument in train(tmp_path / "run", gin_file, *flags)])
    last = json.loads((tmp_path / "run" / JSONL).read_text(encoding="utf-8").splitlines()[-1])
    assert last["step"] == 40
    seen = sum(json.loads(line)["images"] for line in (tmp_path / "run" / JSONL).read_text().splitlines())
    assert 200 <= seen + last["bad_samples"] < 400, "the first of two epochs, whole: each bad sample was met"
    assert last["bad_samples"] == last["bad_samples/damaged_image"]
    assert 2 <= last["bad_samples"] <= 4


def test_many_corrupt_images_stop_the_run(
    corpus: Path, tmp_path: Path, gin_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = damaged_pairs(corpus, tmp_path / "shards")
    for shard in shards.glob("*.tar"):
        spoil_images(shard, 60)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        flags = ("--gin.train.num_steps=40", with_shards(shards / "pairs-*.tar"))
        cli.main([str(argument) for argument in train(tmp_path / "run", gin_file, *flags)])
    assert stop.value.code == cli.EXIT_BAD_INPUT
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "damaged_image" in line and "data.max_bad_share" in line and ".tar" in line


def test_unfinished_checkpoint_is_ignored_and_named(
    trained: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    finished = workdir / FOLDER / "00000004"
    finished.rename(finished.with_name("00000004.orbax-checkpoint-tmp"))  # what a killed writer leaves
    cli.main([str(a) for a in train(workdir, gin_file, "--gin.train.num_steps=4", "--gin.checkpoint.every_steps=2")])
    output = capsys.readouterr().out
    assert "00000004.orbax-checkpoint-tmp: this checkpoint was never finished" in output
    assert f"resuming {STAGE1} after step 2 of 4" in output
    assert (workdir / JSONL).read_text(encoding="utf-8").count("\n") == 4


def damage(workdir: Path, *, step: int) -> None:
    """Cut the arrays of a checkpoint short."""
    for path in (workdir / FOLDER / f"{step:08d}" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:100])


def test_damaged_checkpoint_is_set_aside_and_named(
    trained: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    damage(workdir, step=4)
    cli.main([str(a) for a in train(workdir, gin_file, "--gin.train.num_steps=4", "--gin.checkpoint.every_steps=2")])
    output = capsys.readouterr().out
    assert "checkpoint 4 cannot be read" in output
    assert f"resuming {STAGE1} after step 2 of 4" in output
    assert (workdir / FOLDER / "00000004.incomplete").is_dir(), "nothing is deleted"


def test_a_damaged_or_unfinished_earlier_stage_is_named(
    trained: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = shutil.copytree(trained, tmp_path / "stage1")
    damage(stage, step=4)
    config = stage / CONFIG
    config.write_text(config.read_text(encoding="utf-8").replace("num_steps = 4 ", "num_steps = 9 "), encoding="utf-8")
    capsys.readouterr()
    flags = (f"--gin.train.init_from={stage}", "--gin.train.num_steps=1")
    cli.main([str(argument) for argument in train(tmp_path / "next", gin_file, *flags)])
    output = capsys.readouterr().out
    assert f"train.init_from: {stage} stopped at step 4 of 9; it is taken as it is" in output
    assert f"{stage}: checkpoint 4 cannot be read" in output and "looking for an older one" in output
    assert f"took language_model, project_down, project_up, visual_encoder from {stage}" in output
    assert (stage / FOLDER / "00000004").is_dir(), "another run's directory is left as it is"

    damage(stage, step=2)
    refused = command.fail(train(tmp_path / "third", gin_file, *flags), capsys)
    assert f"{stage}: none of the checkpoints [4, 2] can be read" in refused


def test_diverged_run_names_step_term_and_checkpoint(
    trained: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    capsys.readouterr()
    flags = ("--gin.train.num_steps=40", "--gin.checkpoint.every_steps=2", "--gin.optimizer.learning_rate=1e30")
    allowed = ("--allow_config_change=train.num_steps", "--allow_config_change=optimizer.learning_rate")
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in train(workdir, gin_file, *flags, *allowed)])
    assert stop.value.code == cli.EXIT_BAD_INPUT
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "loss/text" in line and "not finite" in line and "last good checkpoint is step" in line


def test_two_trainers_in_one_directory(
    trained: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    with (workdir / LOCK).open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        flags = ("--gin.train.num_steps=4", "--gin.checkpoint.every_steps=2")
        assert "another process is training here" in command.fail(train(workdir, gin_file, *flags), capsys)


def test_a_changed_model_leaves_the_checkpoints_where_they_are(
    trained: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = sorted(path.name for path in (workdir / FOLDER).iterdir())
    config = (workdir / "config.gin").read_text(encoding="utf-8")
    wider = tmp_path / "wider.gin"
    text = gin_file.read_text(encoding="utf-8").replace("language.mlp_width = 48", "language.mlp_width = 64")
    wider.write_text(text, encoding="utf-8")
    flags = ("--gin.train.num_steps=4", "--gin.checkpoint.every_steps=2", "--allow_config_change=model")
    line = command.fail(train(workdir, wider, *flags), capsys)
    assert "of another model" in line and "mlp" in line
    assert sorted(path.name for path in (workdir / FOLDER).iterdir()) == before
    assert (workdir / "config.gin").read_text(encoding="utf-8") == config


def test_the_name_of_a_recipe_stays(gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be overridden" in command.fail(train(tmp_path / "run", gin_file, "--gin.name=mine"), capsys)


def test_stage_without_checkpoint(gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--gin.train.num_steps=2", f"--gin.train.init_from={tmp_path}/nowhere")
    assert "nowhere" in command.fail(train(tmp_path / "run", gin_file, *flags), capsys)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_dry_runs(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", recipe, "--dry_run", "--gin.checkpoint.every_steps=7"])
    output = capsys.readouterr().out
    assert "checkpoint.every_steps" in output and "--gin flag" in output
    assert "parameters" in output and "frozen" in output and "model FLOPs per step" in output


def test_dry_run_counts_the_37b_model(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "emu2_37b_stage2", "--dry_run"])
    output = capsys.readouterr().out
    for count in ("4,350,093,568", "32,532,564,480", "11,927,552", "36,906,513,152"):
        assert count in output


def test_help_and_sweep_and_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["recipes"])
    assert set(RECIPES) == {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    cli.main(["sweep", "openmoji_tiny_stage2", "--workdir", str(tmp_path)])
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 6 and all(line.startswith("emu2 train openmoji_tiny_stage2") for line in commands)
    for line in commands:  # every variant must at least be a valid config
        cli.main([*line.split()[1:], "--dry_run"])


def test_help_is_quick_and_says_how() -> None:
    """`emu2 train --help` must not import jax: it answers at once."""
    code = (
        "import sys; from experiments import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--gin.optimizer.learning_rate=3e-5" in done.stdout


def test_kinds_of_the_command_line_are_those_of_a_source() -> None:
    assert set(cli.KINDS) == set(typing.get_args(typing.get_type_hints(SourceConfig)["kind"]))


def test_data_index(corpus: Path, gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "pairs"
    shutil.copytree(corpus / "train", shards, ignore=lambda _, names: [n for n in names if not n.endswith(".tar")])
    (shards / "pairs-000000.tar").write_bytes((shards / "pairs-000000.tar").read_bytes()[:-20_000])
    pattern = f"{shards}/pairs-*.tar"
    tokenizer = ("--kind", "image_text", "--tokenizer", f"{corpus}/tokenizer.model", "--processes", "1")
    assert "pairs-000000.tar: cut: " in command.fail(["data", "index", pattern, *tokenizer], capsys)
    cli.main(["data", "index", pattern, *tokenizer, "--salvage", "--index_dir", str(tmp_path / "indexes")])
    output = capsys.readouterr().out
    assert output.startswith("shards: ") and " samples in " in output and "\n  cut_" in output
    assert len(list((tmp_path / "indexes").iterdir())) == len(list(shards.glob("pairs-*.tar")))
    flags = [f"--gin_file={gin_file}", f"--gin.data.sources.pairs.shards={corpus}/train/pairs-*.tar", "--processes=1"]
    cli.main(["data", "index", STAGE1, *flags])
    assert capsys.readouterr().out.startswith("pairs: ")
    assert "--tokenizer: needed" in command.fail(["data", "index", pattern, "--kind", "text"], capsys)
    assert "--salvage: is for shards of a --kind" in command.fail(["data", "index", STAGE1, "--salvage"], capsys)


def test_resume_with_other_data_says_which(
    trained: Path, gin_file: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    shards = tmp_path / "shards"
    shutil.copytree(corpus / "train", shards)
    shutil.copy(
        corpus / "heldout" / next(iter(sorted((corpus / "heldout").glob("scenes-*.tar")))).name, shards / "pairs-9.tar"
    )
    flags = (
        *(f"--gin.data.sources.pairs.shards={shards}/pairs-*.tar", "--gin.train.num_steps=6"),
        *("--gin.checkpoint.every_steps=2", "--allow_config_change=train.num_steps"),
    )
    other_path = (*flags, "--allow_config_change=data.sources.pairs.weight")
    assert "data.sources.pairs.shards" in command.fail(train(workdir, gin_file, *other_path), capsys)
    cli.main([str(a) for a in train(workdir, gin_file, *flags, "--allow_config_change=data.sources.pairs.shards")])
    output = capsys.readouterr().out
    assert "data.sources.pairs: its rows are not those of before; it breaks off epoch 0 and begins epoch 1" in output
    lines = [json.loads(line) for line in (workdir / JSONL).read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["epoch/pairs"] == 1 and lines[-1]["samples/pairs"] > lines[0]["samples/pairs"]


def test_shards_that_change_under_the_same_setting(
    trained: Path, gin_file: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--gin.train.num_steps=6", "--gin.checkpoint.every_steps=2", "--allow_config_change=train.num_steps")
    added = corpus / "train" / "pairs-999999.tar"
    shutil.copy(sorted((corpus / "train").glob("pairs-*.tar"))[0], added)
    try:
        line = command.fail(train(trained, gin_file, *flags), capsys)
    finally:
        for path in added.parent.glob(f"{added.name}*"):
            path.unlink()
    assert line.startswith("emu2: data.sources.pairs.shards: is not the data that this run was trained on: ")
    assert "--allow_config_change=data.sources.pairs.shards" in line


def test_what_generation_refuses(
    trained: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model without a decoder that is to draw, a picture that is none, a template's missing field, a long prompt."""
    run = ["generate", str(trained)]
    line = command.fail([*run, "--prompt", "a cat", "--image", str(tmp_path / "cat.png")], capsys)
    assert "has no trained visual decoder" in line and "--decoder" in line and not (tmp_path / "cat.png").exists()
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"no picture")
    line = command.fail([*run, "--prompt", str(picture)], capsys)
    assert line.startswith(f"emu2: {picture}: is not an image that can be decoded")
    assert "cannot be read" in command.fail([*run, "--prompt", str(tmp_path / "none.png")], capsys)
    values = tmp_path / "values.csv"
    values.write_text("thing,count\ncat,2\ndog\n", encoding="utf-8")
    line = command.fail([*run, "--prompt", "{count} {thing}", "--values", str(values)], capsys)
    assert "names the field {count}, which row 2 of" in line and line.endswith("has not; it has thing")
    line = command.fail([*run, "--prompt", "a cat " * 200], capsys)
    assert " more than the 80 that there are for it; positions of its links: 1: " in line and "truncate" in line
    line = command.fail([*run, "--prompt", "a", "--images", "2"], capsys)
    assert "--images: needs --out DIR" in line
    line = command.fail([*run, "--prompt", "box:0.5,0,0.1,1"], capsys)
    assert "left before right" in line
    line = command.fail([*run, "--prompt", "a", "--beams", "2", "--top_k", "3"], capsys)
    assert "--beams" in line
    chain = ["chain", str(trained), "--prompt", "a", "b", "--by", "c", "--out", str(tmp_path / "sheet.png")]
    assert "links 1 to 2" in command.fail([*chain, "--replace", "3"], capsys)


def test_prompt_files_and_templates(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"name": "seen", "prompt": [{"image": "{file}"}, "a {thing}"]},
        {"name": "boxed", "prompt": [{"box": [0, 0, 0.5, 0.5]}, {"frames": ["red.png", "red.png"]}, "{{x}}"]},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    values = tmp_path / "values.jsonl"
    values.write_text(json.dumps({"file": "red.png", "thing": "cat"}) + "\n", encoding="utf-8")
    out = tmp_path / "answers"
    arguments = ["generate", trained, "--prompts", prompts, "--values", values, "--out", out, "--max_tokens", 3]
    cli.main([str(argument) for argument in [*arguments, "--beams", 2, "--length_penalty", -1]])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["seen-000", "boxed-000"]
    records = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["name"] for record in records] == ["seen-000", "boxed-000"]
    assert all(len(record["token_ids"]) <= 3 and record["score"] < 0 for record in records)
    assert "exists already" in command.fail(arguments, capsys)
    sheet = tmp_path / "sheet.html"
    chain = ["chain", trained, "--prompt", tmp_path / "red.png", "a cat", "--replace", 1, "--max_tokens", 2]
    cli.main([str(argument) for argument in [*chain, "--by", tmp_path / "red.png", "a dog", "--out", sheet]])
    page = sheet.read_text(encoding="utf-8")
    assert page.count("<figure>") == 2 and "a cat" in page and page.count("data:image/png") == 1
