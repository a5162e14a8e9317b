from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import fail

from emu2_jax import overrides
from emu2_jax.config import ExperimentConfig, ObjectiveConfig
from emu2_jax.tokenizer import Tokenizer
from experiments import cli, data_show, recipes


@pytest.fixture
def spoilt(tmp_path: Path, corpus: Path) -> Path:
    """The corpus's first shard of pairs: five pictures damaged, a caption lost."""
    target = tmp_path / "spoilt.tar"
    with tarfile.open(corpus / "train" / "pairs-000000.tar") as source, tarfile.open(target, "w") as shard:
        for member in source:
            number = int(member.name.split(".")[0].split("-")[1])
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".png") and number < 5:
                data = data[:60]
            if number == 7 and member.name.endswith(".txt"):
                continue
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return target


def run(*arguments: str | Path) -> None:
    cli.main([str(argument) for argument in arguments])


def test_check_counts_rows_and_steps(gin_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("data", "check", "openmoji_tiny_stage1", "--gin_file", gin_file, "--read", "20")
    shown = capsys.readouterr().out
    assert "images: faithful" in shown and "no sample is bad" in shown
    names, values = (re.split(r"  +", line) for line in shown.splitlines()[3:5])
    row = dict(zip(names, values, strict=True))
    assert (row["source"], row["samples"], row["left out"], row["of steps"]) == ("pairs", "200", "0", "100.0 %")
    rows = int(row["rows/epoch"])
    assert float(row["samples/row"]) == pytest.approx(200 / rows, abs=0.05)
    assert int(row["steps/epoch"]) == round(rows / 2)  # two rows a step
    assert 20 <= int(row["read"]) < 30


def test_check_names_what_is_bad_and_where(
    spoilt: Path, gin_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Everything is printed, although a run would stop; then the exit code says that it would."""
    shards = f"--gin.data.sources.pairs.shards={spoilt}"
    with pytest.raises(SystemExit) as stop:
        run("data", "check", "openmoji_tiny_stage1", "--gin_file", gin_file, shards, "--read", "1000")
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert re.search(r"pairs: damaged_image 5 \(5\.1 %\), of 99 samples read", shown.out), shown.out
    assert re.search(r"pairs: missing_text 1 \(1 %\), left out when the index was built", shown.out)
    places = re.findall(rf"    {spoilt}, sample '[^']+', byte (\d+): ", shown.out)
    assert len(places) == 4  # three examples and the one
    assert "more bad samples than data.max_bad_share allows: pairs" in shown.err
    run("data", "check", "openmoji_tiny_stage1", "--gin_file", gin_file, shards, "--gin.data.max_bad_share=0.1")


def test_check_goes_on_past_a_source_that_cannot_be_opened(
    gin_file: Path, corpus: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"not a tar" * 100)
    error = fail(
        [
            *("data", "check", "openmoji_tiny_stage2", "--gin_file", gin_file, "--read", "0"),
            f"--gin.data.sources.interleaved.shards={broken}",
            f"--gin.data.sources.text.shards={corpus}/train/text-*.tar",
        ],
        capsys,
    )
    assert "cannot be opened: interleaved" in error


@pytest.mark.parametrize("recipe", ["openmoji_tiny_stage1", "openmoji_tiny_decoder"])
def test_show_writes_a_page_that_needs_nothing_else(recipe: str, gin_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    unet = ["--gin.decoder.unet.cross_attention_width=32"]
    for _ in range(2):  # its own page may be replaced
        run("data", "show", recipe, "--gin_file", gin_file, "--out", page, "--rows", "3", *unet)
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'<img src="([^"]+)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text)


def test_show_overwrites_nothing_else(gin_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "mine.html"
    page.write_text("precious", encoding="utf-8")
    line = fail(["data", "show", "openmoji_tiny_stage1", "--gin_file", gin_file, "--out", page], capsys)
    assert "not a page that this command wrote" in line and page.read_text(encoding="utf-8") == "precious"
    nowhere = tmp_path / "no" / "page.html"
    assert "no directory" in fail(
        ["data", "show", "openmoji_tiny_stage1", "--gin_file", gin_file, "--out", nowhere], capsys
    )


@pytest.fixture
def config(gin_file: Path) -> Callable[[str], ExperimentConfig]:
    return lambda recipe: overrides.apply(recipes.get(recipe), overrides.parse_file(gin_file))[0]


def test_rows_are_drawn_as_they_are(config: Callable[[str], ExperimentConfig]) -> None:
    """Positions add up, images stand in their slots, and the weights are those of the objective."""
    resolved = config("openmoji_tiny_stage1")
    for row in data_show.rows(resolved, range(3)):
        assert row.used + row.holes + row.padding == row.length == resolved.data.row_length
        for document in row.documents:
            assert sum(element.positions for element in document.elements) == document.positions
            first, image_start, image = document.elements[:3]  # the recipe puts images first
            assert (first.text, first.loss) == ("<s>", "")  # nothing predicts the first element
            assert image_start.text == "[IMG]" and image_start.loss == "text"
            assert image.positions == resolved.model.num_visual_tokens and image.loss == ""  # captioning
            assert image.slot is not None and row.slots[image.slot] is not None
            assert document.elements[-1].text == "</s>" and document.elements[-1].weight == 1
        shown = [
            element.slot for document in row.documents for element in document.elements if element.slot is not None
        ]
        assert shown == [slot for slot, picture in enumerate(row.slots) if picture is not None]


def test_what_carries_loss_is_up_to_the_objective(corpus: Path) -> None:
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    start, end, image = tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.image_id
    batch = {
        "tokens": np.array(
            [[tokenizer.bos_id, start, image, image, end, tokenizer.eos_id, tokenizer.pad_id]], np.int32
        ),
        "segment_ids": np.array([[1, 1, 1, 1, 1, 1, 0]], np.int32),
        "is_visual": np.array([[0, 0, 1, 1, 0, 0, 0]], np.bool_),
        "visual_index": np.array([[0, 0, 2, 3, 0, 0, 0]], np.int32),
        "loss_weights": np.array([[1, 1, 1, 1, 1, 1, 0]], np.float32),
        "image_mask": np.array([[False, True]]),
    }
    for objective, expected in (
        (ObjectiveConfig(), ["", "text", "visual", "text", "text"]),
        (ObjectiveConfig(supervise_image_start=False), ["", "", "visual", "text", "text"]),
        (ObjectiveConfig(regression_loss_weight=0.0), ["", "text", "", "text", "text"]),
    ):
        (document,) = data_show.documents(batch, objective, tokenizer, visual_tokens=2)
        assert [element.loss for element in document.elements] == expected
        assert [element.slot for element in document.elements] == [None, None, 1, None, None]


def test_large_images_are_shrunk_for_the_page() -> None:
    uri = data_show.thumbnail(np.zeros((448, 448, 3), np.uint8))
    assert uri.startswith("data:image/jpeg") and len(uri) < 4000
    small = data_show.thumbnail(np.full((8, 8, 3), 7, np.uint8))
    assert small.startswith("data:image/png")
