"""`emu2 evaluate --suite in_context`, through the real command: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import command
import pytest
from PIL import Image

from data_pipelines.corpora.openmoji import OpenMojiSettings, build
from experiments import cli

TINY = (
    *("model.vision.width=16", "model.vision.num_layers=1", "model.vision.num_heads=2", "model.vision.mlp_width=24"),
    *("model.language.width=16", "model.language.num_layers=1", "model.language.num_heads=2"),
    *("model.language.num_kv_heads=2", "model.language.mlp_width=24", "model.language.vocab_size=784"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "data"
    none = dict.fromkeys(("num_interleaved", "num_videos", "num_storyboards", "num_grounded", "num_unseen"), 0)
    settings = OpenMojiSettings(
        num_pairs=40, num_named=40, num_text=20, num_heldout_scenes=0, num_names=0, num_episodes=0, num_questions=12,
        vocab_size=512, **none,
    )  # fmt: skip
    build(path, settings, processes=1, progress=lambda what, done, total: None)
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small_run")
    cli.main(["train", "openmoji_small_stage1a", "--workdir", str(path / "stage2"), *flags(data)])
    return path


def flags(data: Path) -> list[str]:
    settings = (
        *TINY,
        f"data.tokenizer={data}/tokenizer.model",
        f"data.sources.pairs.shards={data}/train/pairs-*.tar",
        f"data.sources.named.shards={data}/train/named-*.tar",
        f"evaluation.in_context={data}/heldout/questions-*.tar",
        *("train.num_steps=2", "data.global_batch_rows=1", "data.read_threads=0"),
    )
    return [f"--gin.{setting}" for setting in settings]


def test_few_shot_accuracies_are_written_with_every_prompt(run: Path) -> None:
    fewer = ["--gin.evaluation.shots=(0, 2)", "--gin.evaluation.episodes_per_task=1"]
    cli.main(["evaluate", str(run), "--suite", "in_context", *fewer])

    folder = run / "evaluation"
    result = json.loads((folder / "in_context.json").read_text(encoding="utf-8"))
    tasks = {"names", "formats", "formats_notation", "counting", "marks", "patterns", "settings"}
    assert set(result["tasks"]) == tasks
    assert set(result["tasks"]["names"]) == {"examples", "shuffled", "no_images"}
    cell = result["tasks"]["names"]["examples"]["2"]
    assert set(cell) == {"accuracy", "low", "high", "n"} and cell["n"] == 1
    answers = [json.loads(line) for line in (folder / "in_context_answers.jsonl").read_text("utf-8").splitlines()]
    two_shots = [one for one in answers if (one["task"], one["shots"], one["condition"]) == ("names", 2, "examples")]
    assert [link == "<image>" for link in two_shots[0]["prompt"]] == [True, False, True, False, True]
    page = (folder / "in_context.html").read_text(encoding="utf-8")
    assert page.count("<img") > 60 and "in_context.png" in page
    assert Image.open(folder / "in_context.png").size[0] > 500


def test_refusals(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = ["evaluate", run, "--suite", "in_context"]
    assert "evaluation.shots: 9, but an episode has 8 examples" in command.fail(
        [*suite, "--gin.evaluation.shots=(9,)"], capsys
    )
    assert "evaluation.in_context: names no shards" in command.fail([*suite, "--gin.evaluation.in_context=''"], capsys)
    pairs = f"--gin.evaluation.in_context={data}/train/pairs-*.tar"
    assert "no episode" in command.fail([*suite, pairs], capsys)
