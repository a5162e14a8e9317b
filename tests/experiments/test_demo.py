"""The pulse of the main job: the whole demo at minimum size, through the real command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import command
import numpy as np
from PIL import Image

REQUIRED = (
    *("caption_nll", "caption_nll_shuffled", "visual_mse", "visual_mse_mean"),
    *("decoder_psnr_db", "decoder_psnr_mean_db", "wall_s", "peak_rss_mb"),
)


def test_minimal_demo(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    process = command.start("demo", "--run", run, "--minimal")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output

    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert all(math.isfinite(metrics[name]) for name in REQUIRED)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "") and "<img" in page and "<svg" in page

    again = command.start("demo", "--run", run, "--minimal")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    assert "is done" in output and "$ emu2" not in output, "a finished demo trains nothing"

    # What the demo trained can be used: text for an image, an image for a text, an image for itself.
    image = run / "evaluation" / "captions" / "scenes-000.png"
    said = command.start("generate", run, "--prompt", image, "--max_tokens", "4")
    output, _ = said.communicate(timeout=300)
    assert said.returncode == 0, output
    drawing = tmp_path / "drawn.png"
    drawn = command.start("generate", run, "--prompt", "a large dog", "--image", drawing)
    output, _ = drawn.communicate(timeout=300)
    assert drawn.returncode == 0, output
    assert np.asarray(Image.open(drawing)).shape == (64, 64, 3)
    redrawn = command.start("reconstruct", run, image, image, "--out", tmp_path / "redrawn.png")
    output, _ = redrawn.communicate(timeout=300)
    assert redrawn.returncode == 0, output
    assert np.asarray(Image.open(tmp_path / "redrawn.png")).shape == (128, 128, 3)
