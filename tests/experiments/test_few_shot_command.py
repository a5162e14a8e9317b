"""`emu2 evaluate --suite few_shot`, through the real command: what it writes, how it goes on, what it refuses.

All but one test put a scripted model in place of the generator, so that nothing is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command
import numpy as np
import pytest
from PIL import Image

from data_pipelines.shard_writer import ShardWriter
from experiments import cli, few_shot
from experiments.few_shot_answers import AnswerFile

NUM_QUERIES = 10


@pytest.fixture(scope="module")
def run(corpus: Path, gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few_shot") / "run"
    flags = [f"--gin_file={gin_file}", "--gin.train.num_steps=1", "--gin.data.read_threads=0"]
    cli.main(["train", "openmoji_tiny_stage1", "--workdir", f"{path}/stage1", *flags])
    for split, pattern in (("heldout", "heldout/scenes-*.tar"), ("train", "train/pairs-*.tar")):
        out = path / "questions" / split
        cli.main(["data", "convert", "openmoji_questions", f"{corpus}/{pattern}", "--samples", "12", "--out", str(out)])
    return path


def evaluate(run: Path, out: Path, *flags: str) -> list[str]:
    settings = {
        "task": "vqav2",
        "items": "questions",
        "queries": f"{run}/questions/heldout/*.tar",
        "support": f"{run}/questions/train/*.tar",
        "shots": "(0, 2)",
        "num_queries": str(NUM_QUERIES),
        "batch": "4",
        "beams": "1",
    }
    changed = {flag.partition("=")[0] for flag in flags if flag.startswith("--gin.")}
    given = {f"--gin.evaluation.few_shot.{name}": value for name, value in settings.items()}
    own = [f"{name}={value}" for name, value in given.items() if name not in changed]
    row = [] if "--gin.data.row_length" in changed else ["--gin.data.row_length=512"]
    return ["evaluate", str(run), "--suite", "few_shot", "--out", str(out), *row, *own, *flags]


class Scripted:
    """Answers by what is in the prompt, and not otherwise; encodes an image as its mean colour."""

    def __init__(self, config: Any, params: Any, tokenizer: Any, *, max_batch: int, **rest: Any) -> None:
        self.tokenizer = tokenizer
        self.asked: list[int] = []

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([image.reshape(1, -1, 3).mean(1).astype(np.float32) for image in images])

    def generate_batch(self, prompts: Sequence[Sequence[Any]], wanted: Any) -> list[Any]:
        texts = ["1. more" if "how many" in str(prompt[-1]) else f"answer {len(prompt)}" for prompt in prompts]
        return [SimpleNamespace(token_ids=np.array(self.tokenizer.encode_plain(text))) for text in texts]

    def log_probabilities(self, prompts: Sequence[Sequence[Any]], choices: Sequence[str]) -> np.ndarray:
        assert list(choices) == [" yes", " no"]
        return np.array([[-1.0 - len(prompt[-1]) % 3, -2.0] for prompt in prompts])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A model that needs no parameters; calling it changes their fingerprint."""
    monkeypatch.setattr(few_shot, "Generator", Scripted)
    monkeypatch.setattr(few_shot, "load_params", lambda *args, **kwargs: {"visual_encoder": {}})

    def named(name: str) -> None:
        monkeypatch.setattr(few_shot, "fingerprint", lambda params: name)

    named("0123456789abcdef")
    return named


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_trained_model_answers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = ["--gin.evaluation.few_shot.num_queries=3", "--gin.evaluation.few_shot.shots=(2,)"]
    cli.main(evaluate(run, tmp_path / "out", *fewer))
    printed = capsys.readouterr().out
    assert "vqa_accuracy" in printed and "2 shots" in printed and f"{tmp_path}/out/index.html" in printed
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 3


def test_every_prompt_answer_and_score_is_written(run: Path, tmp_path: Path, scripted: Any) -> None:
    cli.main(evaluate(run, tmp_path / "out"))
    answers = lines(tmp_path / "out" / "answers.jsonl")
    assert [(one["shots"], one["number"]) for one in answers] == [(k, i) for k in (0, 2) for i in range(NUM_QUERIES)]
    for one in answers:
        texts = [link if isinstance(link, str) else "[image]" for link in one["prompt"]]
        assert texts.count("[image]") == 1 + one["shots"] == 1 + len(one["examples"])
        middle = "answer in one word or phrase. " if not one["shots"] else ""
        assert texts[0] == "[image]" and texts[-1].startswith(f" based on the picture, {middle}")
        assert texts[-1].endswith("? short answer:")
        assert one["score"] == (one["answer"] in one["truth"]) == one["right"]
        assert all(text.endswith(". ") and "? short answer: " in text for text in texts[1:-2:2])
    counts = [one for one in answers if "how many" in one["prompt"][-1]]
    assert counts and all((one["written"], one["answer"]) == ("1. more", "1") for one in counts)
    assert {one["right"] for one in counts} == {True, False}

    result = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert result["score"] == "vqa_accuracy" and result["shots"]["2"]["n"] == NUM_QUERIES
    scores = [one["score"] for one in answers if one["shots"] == 2]
    assert result["shots"]["2"]["vqa_accuracy"] == pytest.approx(np.mean(scores))
    assert result["settings"]["features"] == "emu2 0123456789abcdef"

    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count('<div class="entry is-') == 2 * NUM_QUERIES and page.count("<img ") == 4 * NUM_QUERIES
    pictures = list((tmp_path / "out" / "pictures").iterdir())
    assert pictures and all(Image.open(one).size == (64, 64) for one in pictures)


def test_rices_takes_the_images_that_are_most_alike(run: Path, tmp_path: Path, scripted: Any) -> None:
    cli.main(evaluate(run, tmp_path / "out"))
    with np.load(tmp_path / "out" / "features" / "support-000000.npz") as file:
        keys, support, encoder = file["keys"].tolist(), file["features"], str(file["encoder"])
    with np.load(tmp_path / "out" / "features" / "queries-000000.npz") as file:
        queries = dict(zip(file["keys"].tolist(), file["features"], strict=True))
    assert encoder == "emu2 0123456789abcdef" and support.shape[1] == 3
    for one in lines(tmp_path / "out" / "answers.jsonl"):
        if one["shots"]:
            query = queries[one["query"].partition("/")[0]]
            cosine = support @ query / np.linalg.norm(support, axis=1) / np.linalg.norm(query)
            nearest = [keys[i] for i in np.argsort(-cosine, kind="stable")[:2]]
            assert [example.partition("/")[0] for example in one["examples"]] == nearest[::-1]  # the nearest last


def test_kept_features_are_not_taken_for_other_images(run: Path, tmp_path: Path, scripted: Any) -> None:
    """Both splits number their samples from 0: keys alone do not tell them apart."""
    support = tmp_path / "out" / "features" / "support-000000.npz"
    cli.main(evaluate(run, tmp_path / "out"))
    first = support.read_bytes()
    for name in ("settings.json", "answers-1-of-1.jsonl"):
        (tmp_path / "out" / name).unlink()
    cli.main(evaluate(run, tmp_path / "out", f"--gin.evaluation.few_shot.support={run}/questions/heldout/*.tar"))
    assert support.read_bytes() != first
    assert all(
        one["query"].partition("/")[0] not in str(one["examples"]) for one in lines(tmp_path / "out" / "answers.jsonl")
    )


def test_the_same_seed_gives_the_same_questions_and_examples(run: Path, tmp_path: Path, scripted: Any) -> None:
    def chosen(name: str, *flags: str) -> list[tuple[str, list[str]]]:
        cli.main(evaluate(run, tmp_path / name, "--gin.evaluation.few_shot.selection=random", *flags))
        return [(one["query"], one["examples"]) for one in lines(tmp_path / name / "answers.jsonl")]

    first = chosen("a")
    assert first == chosen("b") != chosen("c", "--gin.evaluation.few_shot.seed=1")
    assert not (tmp_path / "a" / "features").exists()
    four = dict(chosen("d", "--gin.evaluation.few_shot.shots=(4,)"))
    assert all(examples == four[query][:2] for query, examples in first if examples)  # nested


def test_a_run_that_was_interrupted_ends_with_the_same_files(
    run: Path, tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(evaluate(run, tmp_path / "whole"))
    append, count = AnswerFile.append, [0]

    def stop_at_third(self: AnswerFile, answered: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        append(self, answered)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "append", stop_at_third)
        with pytest.raises(SystemExit):
            cli.main(evaluate(run, tmp_path / "stopped"))
    part = tmp_path / "stopped" / "answers-1-of-1.jsonl"
    assert len(lines(part)) == 8 and not (tmp_path / "stopped" / "answers.jsonl").exists()
    with part.open("a", encoding="utf-8") as file:  # a block that was cut in the middle of a line
        file.write(json.dumps({**lines(part)[0], "number": 8}) + '\n{"shots": 0, "num')

    count[0] = 3
    monkeypatch.setattr(AnswerFile, "append", lambda self, answered: (count.append(1), append(self, answered))[1])
    cli.main(evaluate(run, tmp_path / "stopped"))
    assert len(count) == 1 + 4  # six blocks, of which two were there
    for name in ("answers.jsonl", "results.json", "index.html", "answers-1-of-1.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_parts_of_two_hosts_come_to_the_whole(
    run: Path, tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(evaluate(run, tmp_path / "whole"))
    cli.main(evaluate(run, tmp_path / "parts", "--part", "2/2"))
    assert "the answers of part 2/2 are there; those of other parts are missing" in capsys.readouterr().out
    assert {one["number"] // 4 for one in lines(tmp_path / "parts" / "answers-2-of-2.jsonl")} == {1}
    cli.main(evaluate(run, tmp_path / "parts", "--part", "1/2"))
    for name in ("answers.jsonl", "results.json", "index.html"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_scores(run: Path, tmp_path: Path, scripted: Any) -> None:
    checks = ["task=yes_no", "items=checks"]
    cli.main(evaluate(run, tmp_path / "checks", *(f"--gin.evaluation.few_shot.{one}" for one in checks)))
    result = json.loads((tmp_path / "checks" / "results.json").read_text(encoding="utf-8"))
    assert set(result["shots"]["2"]) == {"roc_auc", "accuracy", "n"}
    for one in lines(tmp_path / "checks" / "answers.jsonl"):
        assert 0 < one["yes"] < 1 and one["answer"] == ("yes" if one["yes"] >= 0.5 else "no")

    boxes = ["task=boxes", "items=objects", "question=expression"]
    cli.main(evaluate(run, tmp_path / "boxes", *(f"--gin.evaluation.few_shot.{one}" for one in boxes)))
    result = json.loads((tmp_path / "boxes" / "results.json").read_text(encoding="utf-8"))
    assert result["shots"]["0"]["accuracy_at_0.5"] == 0 and result["shots"]["0"]["with_a_box"] == 0


def test_features_that_the_user_names(
    run: Path, tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(evaluate(run, tmp_path / "own"))
    named = f"--gin.evaluation.few_shot.features={tmp_path}/own/features"
    cli.main(evaluate(run, tmp_path / "named", named))
    assert lines(tmp_path / "named" / "answers.jsonl") == lines(tmp_path / "own" / "answers.jsonl")

    scripted("another encoder")
    said = command.fail(evaluate(run, tmp_path / "other", named), capsys)
    assert "queries-000000.npz: was made by the encoder 'emu2 0123456789abcdef'; wanted 'emu2 another encoder'" in said
    meant = "--gin.evaluation.few_shot.features_encoder='emu2 0123456789abcdef'"
    cli.main(evaluate(run, tmp_path / "meant", named, meant))
    assert [one["examples"] for one in lines(tmp_path / "meant" / "answers.jsonl")] == [
        one["examples"] for one in lines(tmp_path / "own" / "answers.jsonl")
    ]

    more = "--gin.evaluation.few_shot.num_queries=None"
    scripted("0123456789abcdef")
    assert "queries*.npz have none of sample '0" in command.fail(evaluate(run, tmp_path / "more", named, more), capsys)


def last_line(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that is refused after a progress bar, which it wipes away."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == cli.EXIT_BAD_INPUT
    bar, _, said = capsys.readouterr().err.rstrip("\n").rpartition("\r")
    assert "\n" not in bar
    return said


def test_refusals(run: Path, tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*settings: str) -> str:
        return command.fail(
            evaluate(run, tmp_path / "refused", *(f"--gin.evaluation.few_shot.{one}" for one in settings)), capsys
        )

    assert "evaluation.few_shot.task: no task 'okvq'; nearest: okvqa" in refused("task=okvq")
    assert "evaluation.few_shot.queries: names no data" in refused("queries=''")
    assert "evaluation.few_shot.support: names no data, which 2 shots are taken from" in refused("support=''")
    assert "shots: 13, but " in refused("shots=(13,)") and "has 12 images with an answer" in refused("shots=(13,)")
    itself = f"support={run}/questions/heldout/*.tar"
    assert "a question never gets its own as an example" in refused("shots=(12,)", itself)
    assert "has no field 'no'" in refused("question=no")
    assert "names the field {mood}, which it has not; it has captions, questions, objects" in refused(
        "prompt={image} {mood} {question}"
    )
    said = last_line(evaluate(run, tmp_path / "refused", "--gin.data.row_length=96"), capsys)
    assert said.startswith("emu2: evaluation.few_shot.shots: 2 shots before question ")
    assert "more than the 86 that data.row_length = 96 leaves beside the answer; with 1 it fits" in said
    assert "--part: got '0/2'" in command.fail([*evaluate(run, tmp_path / "refused"), "--part", "0/2"], capsys)
    assert "--shards: is for a decoder" in command.fail([*evaluate(run, tmp_path), "--shards", "x"], capsys)
    assert "--part: is for --suite few_shot" in command.fail(["evaluate", run, "--part", "1/2"], capsys)


def test_answers_of_another_setting_are_not_mixed(
    run: Path, tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(evaluate(run, tmp_path / "out"))
    said = command.fail(evaluate(run, tmp_path / "out", "--gin.evaluation.few_shot.max_tokens=3"), capsys)
    assert said.endswith("(saved -> now): max_tokens: 10 -> 3; give another --out, or remove it")
    scripted("other weights")
    assert "model: '0123456789abcdef' -> 'other weights'" in command.fail(evaluate(run, tmp_path / "out"), capsys)


def test_a_picture_that_does_not_decode_is_named(
    run: Path, tmp_path: Path, scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "bad.tar") as shard:
        facts = {"questions": [{"question": "what?", "answers": ["x"] * 10}]}
        shard.write("bad-7", {"png": b"GIF89a and no more", "json": json.dumps(facts).encode()})
    queries = f"--gin.evaluation.few_shot.queries={tmp_path}/bad.tar"
    said = last_line(evaluate(run, tmp_path / "out", queries), capsys)
    assert f"{tmp_path}/bad.tar, sample 'bad-7', byte 0" in said
