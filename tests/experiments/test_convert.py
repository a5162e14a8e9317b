"""`emu2 data convert` and `emu2 data validate`: what they print, and how they refuse."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import command
import pytest
from PIL import Image

from data_pipelines.corpora import SOURCES
from experiments import cli


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_convert_and_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = {"text_list": ["a cat", "a dog"], "image_info": [{"image_name": "a.jpg", "matched_text_index": 1}]}
    (tmp_path / "docs.jsonl").write_text(json.dumps(document) + "\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture())
    images, out = str(tmp_path / "images"), tmp_path / "mmc4"
    cli.main(["data", "convert", "mmc4", str(tmp_path / "docs.jsonl"), "--images", images, "--out", str(out)])
    assert capsys.readouterr().out == f"{out}: 1 images, 1 samples\n"
    cli.main(["data", "validate", "mmc4", f"{out}/*.tar"])
    assert capsys.readouterr().out == "1 shards, 1 samples that can be used, 1 images, 2 texts\n"
    again = ["data", "convert", "mmc4", tmp_path / "docs.jsonl", "--images", images, "--out", out]
    assert command.fail(again, capsys) == f"emu2: {out}: exists already; wanted the name of a new directory"


def test_text_from_the_command_line(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a dog and a cat " * 100}) + "\n")
    options = ["--tokenizer", str(corpus / "tokenizer.model"), "--max_tokens", "64", "--samples_per_shard", "3"]
    cli.main(["data", "convert", "text", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "text"), *options])
    assert "1 split_documents" in capsys.readouterr().out
    assert len(list((tmp_path / "text").glob("*.tar"))) > 1


def test_shards_of_another_layout_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_shard(tmp_path / "a.tar", [("a.flac", b"x")])
    line = command.fail(["data", "validate", "video2dataset", shard], capsys)
    assert line == (
        f"emu2: {shard}: holds no part of a video_text sample; found .flac (1); see docs/data.md for the layout"
    )
    assert "no file matches" in command.fail(["data", "validate", "grit", tmp_path / "*.tgz"], capsys)


def test_tfds_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--split", "train", "--text", "label", "--out", tmp_path / "out"]
    line = command.fail(["data", "convert", "tfds", "no_such_dataset", *options], capsys)
    assert line.startswith("emu2: no_such_dataset: is no TFDS dataset")


@pytest.mark.parametrize("arguments", [["data", "convert", "laion"], ["data", "validate", "laion", "x"], ["data"]])
def test_unknown_sources_are_answered_with_those_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == cli.EXIT_BAD_INPUT
    assert "laion" not in arguments or "mmc4" in capsys.readouterr().err


def test_every_source_has_a_page_and_a_module() -> None:
    root = Path(cli.__file__).parent.parent
    page = (root / "docs" / "sources.md").read_text(encoding="utf-8")
    for source, kind in SOURCES.items():
        module = root / "data_pipelines" / "corpora" / f"{source}.py"
        assert f'KIND: Kind = "{kind}"' in module.read_text(encoding="utf-8")
        assert f"`{source}`" in page and f"`{kind}`" in page
