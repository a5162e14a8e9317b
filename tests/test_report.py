"""The run report: what the page says of a worked run, what it says is missing, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emu2_jax import report
from emu2_jax.errors import UserError

VOID_ELEMENTS = {"meta", "img", "br"}


class PageChecker(HTMLParser):
    """Collects what a page would load and checks that its elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loaded += [str(values[name]) for name in ("src", "href") if name in values]
        self.ids += [str(values["id"])] if "id" in values else []
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def write_picture(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (200, 30, 30)).save(path)


def log_line(step: int, **values: float | str) -> str:
    return json.dumps({"step": step, **values}) + "\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with every file that a report reads."""
    run = tmp_path / "tiny"
    bars = {
        "caption_ratio": {"value": 0.4, "bar": 0.7, "passed": True, "meaning": "It reads <images>."},
        "decoder_psnr_db": {"value": 15.0, "bar": 18.0, "passed": False, "meaning": "It draws."},
    }
    machine = {"cpu": "Abacus 9", "cores": 2}
    numbers = {"caption_nll": 0.5, "caption_nll_shuffled": 2.0, "wall_s": 842.0, "decoder_psnr_db": 15.0}
    write(run / "metrics.json", {**numbers, "bars": bars, "machine": machine, "versions": {"jax": "0.10.2"}})
    stage = {
        "name": "stage1",
        "title": "captioning",
        "workdir": "first",
        "trained": ["language_model"],
        "frozen": ["visual_encoder"],
        "data": ["pairs"],
        "steps": 40,
        "wall_s": 3725.0,
        "parameters": {"language_model": 1_200_000, "visual_encoder": 800_000},
    }
    write(run / "stages.json", [stage])
    lines = [
        json.dumps(
            {"step": step, "loss": 1.0, "loss/text": 9.0 / step, "tokens_per_s": 100.0 + step, "source": "pairs"}
        )
        for step in range(1, 41)
    ]
    write(run / "first" / "metrics.jsonl", "\n".join(lines))
    config = "train.num_steps = 40  # --gin.train.num_steps (recipe: 1000)\ntrain.seed = 0  # recipe\n"
    write(run / "first" / "config.gin", config)
    for name in ("a.png", "b.png"):
        write_picture(run / "evaluation" / "pictures" / name)
    caption = {"key": "7", "image": "pictures/a.png", "true": "a green apple", "generated": "a red apple"}
    unseen = {**caption, "generated": "<script>", "split": "unseen"}
    write(run / "evaluation" / "captions.json", [unseen, {**caption, "nll": 0.5, "split": "scenes"}])
    pair = {"key": "7", "original": "pictures/a.png", "decoded": "pictures/b.png", "psnr_db": 21.54, "split": "scenes"}
    write(run / "evaluation" / "autoencoded.json", [pair])
    drawn = {"text": "three cars", "true": "pictures/a.png", "drawn": "pictures/b.png", "split": "scenes"}
    write(run / "evaluation" / "drawn.json", [drawn])
    write(run / "data" / "ATTRIBUTION.txt", "Drawings by someone, CC BY-SA 4.0\n")
    return run


def page_of(run_dir: Path) -> str:
    return report.write_report(run_dir).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """The page's text without tags, spaces folded."""
    body = page[page.index("<body>") :]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_page_shows_what_the_run_left(run_dir: Path) -> None:
    words = words_of(page_of(run_dir))
    for expected in (
        "1 of 2 bars passed",
        "14 min 2 s from start to end",
        "2 M parameters in all parts",
        "✓ passed caption_ratio 0.4 at most 0.7 It reads &lt;images&gt;.",
        "✗ not passed decoder_psnr_db 15 at least 18",
        "its own image 0.5 another sample&#39;s image 2",
        "stage1 captioning language_model visual_encoder pairs 40 1 h 2 min",
        "true a green apple generated a red apple loss 0.50",
        "decoded, 21.5 dB",
        "three cars",
        "cpu Abacus 9 cores 2",
        "jax 0.10.2",
        "Drawings by someone, CC BY-SA 4.0",
    ):
        assert expected in words
    assert "No " not in words.replace("No bars", "")


def test_the_page_is_self_contained_and_well_formed(run_dir: Path) -> None:
    page = page_of(run_dir)
    checker = PageChecker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in checker.loaded)
    anchors = {link[1:] for link in checker.loaded if link.startswith("#")}
    assert anchors <= set(checker.ids)
    assert "@import" not in page
    assert "url(http" not in page


def test_plots_take_their_colors_from_the_page(run_dir: Path) -> None:
    page = page_of(run_dir)
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(svgs) == 2  # the text loss (alone, so no total) and the tokens per second
    assert all("var(--series-1)" in svg for svg in svgs)
    assert not any(re.search(r"#0[0-4]000[0-4]|#0[12]0[12]0[12]", svg) for svg in svgs)


def test_the_same_files_give_the_same_page(run_dir: Path) -> None:
    assert page_of(run_dir) == page_of(run_dir)
    assert not list(run_dir.glob("*.partial"))


def test_splits_stand_apart_known_ones_first(run_dir: Path) -> None:
    words = words_of(page_of(run_dir))
    assert words.index("Held-out scenes") < words.index("a red apple") < words.index("Unseen objects")
    assert "&lt;script&gt;" in words


def test_words_that_depart_are_marked(run_dir: Path) -> None:
    assert "<mark>red</mark>" in page_of(run_dir)
    assert report.compare_words("a green apple", "a red apple") == [("a", True), ("red", False), ("apple", True)]
    assert report.compare_words("a b", "") == []


def test_changed_config_lines_are_highlighted(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert '<span class="changed">train.num_steps = 40 ' in page
    assert "<span>train.seed = 0 " in page
    assert "1 changed setting<" in page


def test_a_run_with_nothing_but_metrics_says_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "metrics.json", {"caption_nll": 0.5})
    words = words_of(page_of(tmp_path))
    for name in ("stages.json", "evaluation/captions.json", "evaluation/autoencoded.json", "evaluation/drawn.json"):
        assert f"this run has no {name}" in words
    assert "No bars: metrics.json sets none." in words
    assert "No data/ATTRIBUTION.txt" in words
    assert "Beside their baselines" not in words  # a number alone is no comparison


def test_a_stage_without_its_log_and_config_says_so(run_dir: Path) -> None:
    (run_dir / "first" / "metrics.jsonl").unlink()
    (run_dir / "first" / "config.gin").unlink()
    words = words_of(page_of(run_dir))
    assert "No curves: this run has no first/metrics.jsonl" in words
    assert "No config of stage1: this run has no first/config.gin" in words


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "{", r"metrics\.json: not JSON"),
        ("metrics.json", "[]", r"metrics\.json: top level: Input should be a valid dictionary"),
        ("metrics.json", {"bars": {"x": {"value": 1}}}, r"metrics\.json: .*x\..*: Field required"),
        ("stages.json", [{"name": "s"}], r"stages\.json: 0\.workdir: Field required"),
        (
            "evaluation/drawn.json",
            [{"text": "t", "split": "s", "true": "no.png", "drawn": "no.png"}],
            r"no\.png: no such",
        ),
    ],
)
def test_bad_files_are_named(run_dir: Path, file: str, content: Any, message: str) -> None:
    write(run_dir / file, content)
    with pytest.raises(UserError, match=message):
        report.write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_a_run_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.json: no such file"):
        report.write_report(tmp_path)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.png", "text")
    with pytest.raises(UserError, match=r"a\.png: not a picture"):
        report.embed_picture(tmp_path / "a.png")


@pytest.mark.parametrize(("side", "shown", "pixelated"), [(64, 128, True), (96, 192, True), (448, 256, False)])
def test_small_pictures_are_shown_twice_their_size(tmp_path: Path, side: int, shown: int, pixelated: bool) -> None:
    write_picture(tmp_path / "a.png", side)
    picture = report.embed_picture(tmp_path / "a.png")
    assert (picture.width, picture.height, picture.pixelated) == (shown, shown, pixelated)


def test_training_log_keeps_the_last_word_on_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = (
        log_line(1, loss=4.0) + log_line(2, loss=3.0, grad_norm=float("nan")) + log_line(2, loss=2.5) + '{"step": 3,'
    )
    write(path, lines + "\n" + log_line(3, loss=float("inf"), source="pairs"))
    log = report.read_training_log(path)
    assert log is not None
    assert log.series.keys() == {"loss"}
    np.testing.assert_array_equal(log.series["loss"].steps, [1, 2])
    np.testing.assert_array_equal(log.series["loss"].values, [4.0, 2.5])
    assert (log.unreadable_lines, log.not_finite) == (1, 1)
    assert report.read_training_log(tmp_path / "none.jsonl") is None


def test_smooth_averages_over_the_window_and_over_less_at_the_ends() -> None:
    values = np.array([0.0, 3.0, 6.0, 0.0, 3.0])
    np.testing.assert_allclose(report.smooth(values, 3), [1.5, 3.0, 3.0, 3.0, 1.5])
    np.testing.assert_allclose(report.smooth(values, 1), values)


def test_thin_keeps_spikes() -> None:
    values = np.zeros(1000)
    values[437], values[438] = 50.0, -50.0
    thinned = report.thin(report.Series(np.arange(1000.0), values), bins=10)
    assert len(thinned.steps) <= 20
    assert {437.0, 438.0} <= set(thinned.steps)
    assert (thinned.values.max(), thinned.values.min()) == (50.0, -50.0)
    assert np.all(np.diff(thinned.steps) > 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.41274, "0.4127"), (1204.4, "1,204"), (40, "40"), (3.2e-05, "3.2e-05"), (12000, "12,000"), (-2.5, "-2.5")],
        *[(float("nan"), "not a number"), (float("inf"), "infinite")],
    ],
)
def test_format_number(value: float, text: str) -> None:
    assert report.format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.5, "8.5 s"), (59.97, "1 min 0 s"), (842.3, "14 min 2 s"), (7500.0, "2 h 5 min")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert report.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(910, "910"), (33_000, "33 k"), (36_968_000_000, "37 B"), (999_999, "1 M")]
)
def test_format_count(count: int, text: str) -> None:
    assert report.format_count(count) == text


@pytest.mark.parametrize(
    ("value", "bar", "passed", "wanted"),
    [
        (3.0, 5.0, True, "at most 5"),
        (7.0, 5.0, False, "at most 5"),
        (7.0, 5.0, True, "at least 5"),
        (3.0, 5.0, False, "at least 5"),
        (5.0, 5.0, True, "5"),
        (float("nan"), 5.0, False, "5"),
        (3.0, "under 6 dB", True, "under 6 dB"),
    ],
)
def test_the_direction_of_a_bar_follows_from_the_verdict(
    value: float, bar: float | str, passed: bool, wanted: str
) -> None:
    assert report.Bar(value, bar, passed, "").wanted == wanted


def test_run_summary_lists_bars_numbers_and_the_report(run_dir: Path) -> None:
    summary = report.run_summary(run_dir).splitlines()
    assert summary == [
        f"{run_dir}: 1 of 2 bars passed",
        "  caption_ratio         0.4  at most 0.7  passed",
        "  decoder_psnr_db        15  at least 18  NOT PASSED",
        "  caption_nll           0.5",
        "  caption_nll_shuffled    2",
        "  wall_s                842",
        "report: not written yet",
    ]
    path = report.write_report(run_dir)
    assert report.run_summary(run_dir).splitlines()[-1] == f"report: {path}"


def test_the_page_shows_where_the_time_went_and_slow_steps(run_dir: Path) -> None:
    slow = {"step": 7, "host": 1, "step_s": 3.0, "usual_s": 1.0, "cause": "data_wait", "cause_s": 1.8}
    unknown = {"step": 9, "host": None, "step_s": 2.5, "usual_s": 1.0, "cause": "step"}
    seconds = {"seconds/step": 60.0, "seconds/data_wait": 20.0, "seconds/lost": 10.0}
    lines = [
        {"step": 1, "loss": 1.0, "seconds/step": 30.0, "slow_steps": [slow, unknown]},
        {"step": 2, "loss": 1.0, **seconds, "seconds/checkpoint": 10.0},
    ]
    write(run_dir / "first" / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    words = words_of(page_of(run_dir))
    assert "training steps 60.0 % (1 min 0 s) · waiting for data 20.0 % (20 s) · checkpoints 10.0 % (10 s)" in words
    assert "lost 10.0 % (10 s)" in words
    assert "2 steps took more than twice as long as usual" in words
    assert "7 1 3 s 1 s waiting for data, 1.8 s 9 all 2.5 s 1 s nothing that is known" in words
    log = report.read_training_log(run_dir / "first" / "metrics.jsonl")
    assert log is not None
    assert log.series.keys() == {"loss"}  # times are no curves
