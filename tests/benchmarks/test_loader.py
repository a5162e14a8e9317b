"""The loader benchmark runs and says what it is meant to say; how long anything takes is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import loader
from data_pipelines.images import decode_image
from data_pipelines.index import scan_shard
from data_pipelines.samples import read_part
from data_pipelines.shards import ShardReader


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    photo = tmp_path / "photos" / "photo.png"
    photo.parent.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((800, 600), Image.Resampling.BICUBIC).save(photo)
    (photo.parent / "notes.txt").write_text("no picture", encoding="utf-8")
    out = tmp_path / "shards"
    loader.main(["--make", str(out), str(photo.parent), "--count", "40"])
    return out


def test_shards_hold_jpegs_with_captions(shards: Path) -> None:
    (shard,) = shards.glob("*.tar")
    index = scan_shard(str(shard), "image_text", tokenizer=None)
    reader = ShardReader(index.paths)
    assert len(index) == 40 and not index.bad
    for sample in range(40):
        data = read_part(reader, index, sample, int(index.starts[sample]) + 1)
        assert data.startswith(b"\xff\xd8\xff") and decode_image(data, 16).std() > 1


def test_every_case_prints_a_line(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    loader.main(["--shards", str(shards), "--sizes", "32", "--rounds", "1", "--seconds", "0.1"])
    lines = {line["case"]: line for line in map(json.loads, capfd.readouterr().out.splitlines())}
    assert set(lines) == {
        *("fidelity-32-fast", "fidelity-32-faithful"),
        *("webdataset-pillow-32", "loader-32-fast", "loader-32-faithful"),
    }
    assert lines["loader-32-fast"]["peer_over_ours_cpu"] > 0
    assert lines["fidelity-32-faithful"]["psnr_db"] > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shards", "nowhere"], "holds no .tar"), (["--make", "x", "nowhere.jpg"], "no picture with a short side")],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        loader.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
