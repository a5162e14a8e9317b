"""The run report: one self-contained HTML page, made from nothing but the files that a run has left behind.

A run directory holds (all but the first may be missing; the page then says so in its place)

    metrics.json                  headline numbers, flat; `bars`, `machine` and `versions` are objects
    stages.json                   what was trained on what, a list of `Stage`
    <workdir>/metrics.jsonl       one JSON object per logged step of that stage
    <workdir>/config.gin          the operative config of that stage
    <workdir>/previews/           held-out pictures redrawn during that stage, STEP-SPLIT.png
    evaluation/captions.json      held-out images and their captions, a list of `CaptionSample`
    evaluation/autoencoded.json   images and what the decoder makes of their embeddings, a list of `AutoencodedSample`
    evaluation/drawn.json         texts and the images drawn for them, a list of `DrawnSample`
    data/ATTRIBUTION.txt          whose data this was

Plots are inline SVG whose colours are CSS variables, so that one page serves a light and a dark screen.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, TypeVar

import jinja2
import matplotlib
import numpy as np
import pydantic
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image, UnidentifiedImageError

from emu2_jax.errors import UserError
from emu2_jax.goodput import PREFIX

SHOWN_SAMPLES = 24  #: samples per split that are drawn into the page; the JSON files hold all
EMBEDDED_SIDE = 256  #: pixels, longest side of an embedded picture
PIXELATED_SIDE = 96  #: pixels; pictures up to this size are shown at twice their size, unsmoothed
CURVE_BINS = 300  #: a longer curve is drawn through the minimum and the maximum of this many bins
SMOOTHING_SHARE = 0.05  #: share of a stage's logged steps in the window of a smoothed curve
SHOWN_SLOW_STEPS = 12  #: the slowest of a stage
SETTLED_SHARE = 0.1  #: share of a stage's logged steps, from its start, left out of the throughput table
LOG_AXIS_RATIO = 20.0  #: positive curves whose maximum is this many times their minimum get a logarithmic axis

LOG = "metrics.jsonl"  #: of a work directory
PREVIEWS = "previews"  #: folder of a work directory
SHOWN_PREVIEWS = 5  #: sheets per split that are drawn into the page, from the first to the last
PREVIEW_SIDE = 640  #: pixels, longest side of an embedded sheet

SPLIT_TITLES = {
    "scenes": "Held-out scenes: known objects, never composed like this in training",
    "unseen": "Unseen objects: in no training image",
}


@dataclasses.dataclass(frozen=True)
class Bar:
    """A number that the run was meant to reach."""

    value: float
    bar: float | str
    passed: bool
    meaning: str

    @property
    def wanted(self) -> str:
        """The bar in words. Its direction follows from the verdict: 3 passed under a bar of 5 means "at most 5"."""
        if isinstance(self.bar, str):
            return self.bar
        if self.value == self.bar or not math.isfinite(self.value):
            return format_number(self.bar)
        side = "at most" if self.passed == (self.value < self.bar) else "at least"
        return f"{side} {format_number(self.bar)}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage of a run."""

    name: str
    workdir: str  #: relative to the run directory
    title: str = ""
    trained: tuple[str, ...] = ()  #: parts with gradients
    frozen: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  #: names of sources
    images: str = ""  #: how their files became pixels
    steps: int | None = None
    wall_s: float | None = None
    parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)  #: part -> count


@dataclasses.dataclass(frozen=True)
class CaptionSample:
    """A held-out image with its true and its generated caption."""

    key: str
    image: str  #: PNG, relative to evaluation/, as in the samples below
    true: str
    generated: str
    split: str
    nll: float | None = None  #: nats per token of the true caption
    nll_shuffled: float | None = None  #: the same, given another sample's image


@dataclasses.dataclass(frozen=True)
class AutoencodedSample:
    """An image, and what the decoder draws from its visual embeddings."""

    key: str
    original: str
    decoded: str
    split: str
    psnr_db: float | None = None


@dataclasses.dataclass(frozen=True)
class DrawnSample:
    """A text, the image it belongs to, and the image drawn for it."""

    text: str
    true: str
    drawn: str
    split: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Numbers that mean something only beside each other."""

    title: str
    unit: str
    caption: str
    labels: Mapping[str, str]  #: name in metrics.json -> what it is, best to worst expected


COMPARISONS = (
    Comparison(
        "Does it look at the image?",
        "nats per caption token; lower is better",
        "How surprised the model is by the true caption. If it read the image, showing it another sample's image "
        "must hurt.",
        {
            "caption_nll": "its own image",
            "caption_nll_unseen": "its own image, unseen objects",
            "caption_nll_shuffled": "another sample's image",
        },
    ),
    Comparison(
        "Does it foresee the image?",
        "mean squared error of visual embeddings; lower is better",
        "How far the predicted visual embeddings lie from the true ones. Always answering with the mean embedding is "
        "the baseline to beat.",
        {
            "visual_mse": "true embeddings so far",
            "visual_mse_free_running": "its own embeddings so far",
            "visual_mse_mean": "the mean embedding",
        },
    ),
    Comparison(
        "Can the decoder draw what the encoder saw?",
        "dB of peak signal-to-noise ratio; higher is better",
        "How close autoencoded images come to their originals. Always drawing the mean image is the baseline.",
        {
            "decoder_psnr_db": "held-out scenes",
            "decoder_psnr_db_unseen": "unseen objects",
            "decoder_psnr_mean_db": "the mean image",
        },
    ),
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot of one stage: which logged numbers it shows, and what they mean."""

    title: str
    unit: str
    caption: str
    keys: tuple[str, ...]
    axis: Literal["fitted", "linear", "from_zero"] = "fitted"  #: of the values; fitted: see LOG_AXIS_RATIO
    smoothed: bool = True  #: whether a moving average is drawn over the logged values


LEARNING_PANELS = (
    Panel("Total loss", "loss", "What the optimiser lowers: the weighted sum of the terms.", ("loss",)),
    Panel("Text loss", "nats per token", "Cross-entropy of the next text token.", ("loss/text",)),
    Panel(
        "Regression loss",
        "squared error",
        "Between the visual embedding that comes next and the predicted one.",
        ("loss/regression",),
    ),
    Panel("Noise loss", "squared error", "Between the noise in the latents and the predicted noise.", ("loss/noise",)),
    Panel(
        "Regression quality",
        "1 is perfect",
        "Predicted against true visual embeddings: cosine of the angle, and ratio of the norms. A low ratio means "
        "hedging towards the mean.",
        ("regression_cosine", "regression_norm_ratio"),
        axis="linear",
    ),
    Panel(
        "Previews",
        "dB of peak signal-to-noise ratio",
        "Held-out pictures redrawn during training.",
        ("preview_psnr_db/scenes", "preview_psnr_db/unseen"),
        axis="linear",
        smoothed=False,
    ),
    Panel("Gradient norm", "global norm", "Before clipping, over all trained parts.", ("grad_norm",)),
    Panel("Learning rate", "learning rate", "Warm-up and decay.", ("learning_rate",), axis="from_zero", smoothed=False),
)
THROUGHPUT_PANELS = (
    Panel("Tokens", "tokens per second", "Positions that hold something, not padding.", ("tokens_per_s",), "from_zero"),
    Panel("Images", "images per second", "Images that were encoded.", ("images_per_s",), "from_zero"),
    Panel(
        "Compute",
        "model TFLOP/s",
        "The products and convolutions of the model itself; work that is repeated to save memory does not count.",
        ("model_tflops_per_s",),
        "from_zero",
    ),
    Panel("Time of a step", "seconds", "A whole step, and the part spent waiting for data.", ("step_s", "data_wait_s")),
    Panel("Padding", "share", "Positions of the packed rows that hold nothing.", ("padding_share",), "from_zero"),
)
THROUGHPUT_COLUMNS = {
    "tokens_per_s": "tokens/s",
    "images_per_s": "images/s",
    "step_s": "step, s",
    "data_wait_s": "waiting for data, s",
    "padding_share": "padding share",
    "model_tflops_per_s": "model TFLOP/s",
}


@dataclasses.dataclass(frozen=True)
class Series:
    """A number as it was logged over the steps of a stage; finite values only."""

    steps: Float[np.ndarray, " points"]
    values: Float[np.ndarray, " points"]


#: Where time goes (`emu2_jax.goodput`), in the order of the page: what it is, and what it was good for.
ACTIVITIES = {
    "step": ("training steps", "the devices compute"),
    "data_wait": ("waiting for data", "no batch was ready"),
    "checkpoint": ("checkpoints", "the part of a save that training waits for"),
    "compile": ("compiling", "the first call of the step with each batch shape"),
    "start": ("starting", "opening the data, restoring or initialising the state"),
    "preview": ("previews", "held-out pictures drawn meanwhile"),
    "profile": ("profiling", "writing traces"),
    "lost": ("lost", "steps that were done again after a kill, because no checkpoint held them"),
}


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """The metrics.jsonl of a stage."""

    series: Mapping[str, Series]
    seconds: Mapping[str, float]  #: of each activity, over all starts
    slow_steps: tuple[Mapping[str, Any], ...]
    unreadable_lines: int  #: a killed writer can leave a cut line
    not_finite: int  #: values that are NaN or infinite, left out of the series


@dataclasses.dataclass(frozen=True)
class Plot:
    """A panel, drawn."""

    title: str
    caption: str
    svg: Markup


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as the page holds it."""

    source: str  #: data URI
    width: int  #: pixels, as shown
    height: int
    pixelated: bool


def write_report(run_dir: Path) -> Path:
    """Draws the report of a run and writes `report.html` into its directory, in one piece or not at all.

    `run_dir` may be the work directory of one stage, also while it trains. Raises `UserError` when it is neither that
    nor has a metrics.json, or when any of the files cannot be understood.
    """
    template = page_environment().get_template("report.html.jinja")
    return write_page(run_dir / "report.html", template.render(_page(run_dir)))


def write_page(path: Path, page: str) -> Path:
    """Writes a page in one piece or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def run_summary(run_dir: Path) -> str:
    """The headline numbers of a run as plain text for a terminal, and where its report is."""
    metrics = _read_metrics(run_dir)
    bars = _bars(run_dir, metrics)
    lines = [f"{run_dir}: {_verdict(bars)}"]
    rows = [
        (name, format_number(bar.value), bar.wanted, "passed" if bar.passed else "NOT PASSED")
        for name, bar in bars.items()
    ]
    rows += [(name, format_number(value), "", "") for name, value in _numbers(metrics).items() if name not in bars]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for name, value, wanted, verdict in rows:
        lines.append(f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {wanted:<{widths[2]}}  {verdict}".rstrip())
    report = run_dir / "report.html"
    lines.append(f"report: {report}" if report.exists() else "report: not written yet")
    return "\n".join(lines)


def _page(run_dir: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    metrics = _read_metrics(run_dir)
    bars = _bars(run_dir, metrics)
    stages = _read_list(run_dir / "stages.json", Stage)
    if stages is None and (run_dir / LOG).exists():
        stages = [Stage(name=run_dir.resolve().name, workdir=".")]
    logs = {stage.name: read_training_log(run_dir / stage.workdir / LOG) for stage in stages or ()}
    attribution = run_dir / "data" / "ATTRIBUTION.txt"
    return {
        "name": run_dir.resolve().name,
        "verdict": _verdict(bars),
        "facts": _facts(metrics, stages or []),
        "bars": bars,
        "comparisons": _comparisons(metrics),
        "numbers": _numbers(metrics),
        "stages": stages,
        "curves": {name: log and _plots(name, log, _learning_panels(log)) for name, log in logs.items()},
        "other_curves": {name: _plots(name, log, _other_panels(log)) for name, log in logs.items() if log},
        "log_notes": {name: _log_note(log) for name, log in logs.items() if log},
        "activities": ACTIVITIES,
        "time_shares": {name: _shares(log) for name, log in logs.items() if log and log.seconds},
        "slow_steps": {name: _slow_steps(log) for name, log in logs.items() if log and log.slow_steps},
        "num_slow_steps": {name: len(log.slow_steps) for name, log in logs.items() if log},
        "previews": {stage.name: _previews(run_dir / stage.workdir / PREVIEWS) for stage in stages or ()},
        "preview": lambda path: embed_picture(path, PREVIEW_SIDE),
        "throughput": {name: log and _plots(name, log, THROUGHPUT_PANELS) for name, log in logs.items()},
        "throughput_columns": THROUGHPUT_COLUMNS,
        "throughput_rows": {name: _typical(log) for name, log in logs.items() if log},
        "settled_percent": round(100 * SETTLED_SHARE),
        "captions": _by_split(_read_list(run_dir / "evaluation" / "captions.json", CaptionSample)),
        "autoencoded": _by_split(_read_list(run_dir / "evaluation" / "autoencoded.json", AutoencodedSample)),
        "drawn": _by_split(_read_list(run_dir / "evaluation" / "drawn.json", DrawnSample)),
        "shown_samples": SHOWN_SAMPLES,
        "split_titles": SPLIT_TITLES,
        "picture": lambda name: embed_picture(run_dir / "evaluation" / name),
        "configs": {stage.name: _config_lines(run_dir / stage.workdir / "config.gin") for stage in stages or ()},
        "machine": metrics.get("machine"),
        "versions": metrics.get("versions"),
        "attribution": attribution.read_text(encoding="utf-8").strip() if attribution.exists() else None,
    }


def page_environment(*folders: Path) -> jinja2.Environment:
    """Templates of pages with the report's look (`page.css.jinja`), also those in `folders`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "count": format_count, "duration": format_duration}
    environment.globals["compare_words"] = compare_words
    return environment


# --- Reading -----------------------------------------------------------------------------------------------------

_Sample = TypeVar("_Sample")


def _read_metrics(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "metrics.json"
    if not path.exists() and (run_dir / LOG).exists():
        return {}
    if not path.exists():
        raise UserError(
            f"{path}: no such file; a report needs the run's headline numbers (finish the evaluation first)"
        )
    return _validate(dict[str, Any], _read_json(path), path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _read_list(path: Path, kind: type[_Sample]) -> list[_Sample] | None:
    """The entries of a JSON list, or None when there is no such file."""
    return _validate(list[kind], _read_json(path), path) if path.exists() else None  # type: ignore[valid-type]


def _validate(kind: Any, value: Any, path: Path) -> Any:
    try:
        return pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "top level"
        raise UserError(f"{path}: {where}: {first['msg']}") from error


def _bars(run_dir: Path, metrics: Mapping[str, Any]) -> dict[str, Bar]:
    return _validate(dict[str, Bar], metrics.get("bars", {}), run_dir / "metrics.json")


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """The plain numbers of metrics.json, in their order there."""
    return {name: value for name, value in metrics.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_training_log(path: Path) -> TrainingLog | None:
    """The numbers logged over the steps of a stage, or None when there is no such file.

    A step that was logged twice (a run killed after its last checkpoint repeats steps) counts as logged last.
    """
    if not path.exists():
        return None
    by_step: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            by_step[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    points: dict[str, list[tuple[int, float]]] = {}
    not_finite = 0
    seconds: dict[str, float] = {}
    slow: list[Mapping[str, Any]] = []
    for step, record in sorted(by_step.items()):
        slow += record.get("slow_steps", [])
        for key, value in record.items():
            if key == "step" or not _is_number(value):
                continue
            if key.startswith(PREFIX):
                seconds[key.removeprefix(PREFIX)] = float(value)
                continue
            if math.isfinite(value):
                points.setdefault(key, []).append((step, value))
            else:
                not_finite += 1
    series = {key: Series(*np.asarray(pairs, dtype=np.float64).T) for key, pairs in points.items()}
    return TrainingLog(series, seconds, tuple(slow), unreadable, not_finite)


def _shares(log: TrainingLog) -> list[tuple[str, float, float]]:
    """Where a stage's time went: (activity, seconds, share of all)."""
    total = sum(log.seconds.values())
    return [(name, log.seconds[name], log.seconds[name] / total) for name in ACTIVITIES if log.seconds.get(name)]


def _slow_steps(log: TrainingLog) -> list[tuple[str, str, str, str, str]]:
    """The slowest steps, in words: step, host, how long, what is usual, what it coincided with."""
    slowest = sorted(log.slow_steps, key=lambda slow: slow["usual_s"] - slow["step_s"])[:SHOWN_SLOW_STEPS]
    rows = []
    for slow in sorted(slowest, key=lambda slow: slow["step"]):
        host = "all" if slow["host"] is None else str(slow["host"])
        known = slow["cause"] != "step"
        cause = (
            f"{ACTIVITIES[slow['cause']][0]}, {format_duration(slow['cause_s'])}" if known else "nothing that is known"
        )
        usual = format_duration(slow["usual_s"])
        rows.append((f"{slow['step']:,}", host, format_duration(slow["step_s"]), usual, cause))
    return rows


def _config_lines(path: Path) -> list[tuple[str, bool]] | None:
    """The lines of an operative config, each with whether it departs from the recipe; None when there is no file.

    The config's own writer marks such a line: `train.num_steps = 800  # --gin.train.num_steps (recipe: 1000)`.
    """
    if not path.exists():
        return None
    return [(line, "(recipe: " in line.partition("#")[2]) for line in path.read_text(encoding="utf-8").splitlines()]


def _by_split(samples: Sequence[Any] | None) -> dict[str, list[Any]] | None:
    """Samples by split, known splits first, in the order in which they were evaluated."""
    if samples is None:
        return None
    splits: dict[str, list[Any]] = {name: [] for name in SPLIT_TITLES}
    for sample in samples:
        splits.setdefault(sample.split, []).append(sample)
    return {name: members for name, members in splits.items() if members}


# --- Numbers in words --------------------------------------------------------------------------------------------


def _verdict(bars: Mapping[str, Bar]) -> str:
    if not bars:
        return "no bars were set"
    passed = sum(bar.passed for bar in bars.values())
    return f"all {len(bars)} bars passed" if passed == len(bars) else f"{passed} of {len(bars)} bars passed"


def _facts(metrics: Mapping[str, Any], stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """What a reader wants to know of a run before anything else: (number, what it is)."""
    parameters = {part: count for stage in stages for part, count in stage.parameters.items()}
    facts = []
    if _is_number(metrics.get("wall_s")):
        facts.append((format_duration(metrics["wall_s"]), "from start to end"))
    if _is_number(metrics.get("peak_rss_mb")):
        facts.append((f"{format_number(metrics['peak_rss_mb'])} MB", "of memory at the peak"))
    if parameters:
        facts.append((format_count(sum(parameters.values())), "parameters in all parts"))
    if stages:
        facts.append((str(len(stages)), "training stage" + "s" * (len(stages) > 1)))
    return facts


def _comparisons(metrics: Mapping[str, Any]) -> list[tuple[Comparison, list[tuple[str, float, float]]]]:
    """Each comparison with its rows: (label, value, share of the longest row)."""
    shown = []
    for comparison in COMPARISONS:
        values = {label: metrics[name] for name, label in comparison.labels.items() if _is_number(metrics.get(name))}
        longest = max((value for value in values.values() if math.isfinite(value)), default=0.0)
        rows = [(label, value, value / longest if 0 < value <= longest else 0.0) for label, value in values.items()]
        if len(rows) > 1:
            shown.append((comparison, rows))
    return shown


def _typical(log: TrainingLog) -> dict[str, float]:
    """Medians of the throughput numbers over a stage without its start, where compilation falls."""
    settled = {}
    for key in THROUGHPUT_COLUMNS:
        if key in log.series:
            values = log.series[key].values
            settled[key] = float(np.median(values[int(SETTLED_SHARE * len(values)) :]))
    return settled


def _log_note(log: TrainingLog) -> str:
    notes = []
    if log.unreadable_lines:
        notes.append(f"{log.unreadable_lines} unreadable line(s) of metrics.jsonl are left out.")
    if log.not_finite:
        notes.append(f"{log.not_finite} value(s) that are not finite are left out.")
    return " ".join(notes)


def format_number(value: float) -> str:
    """A number with four significant digits: 1,204 or 0.4127 or 3.2e-05; integers in full."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_count(value: int) -> str:
    """A count in short: 37.1 B, 4.2 M, 910."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # 999,999 is 1 M, not 1000 k
            return f"{value / size:.3g} {letter}"
    return str(value)


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: 2 h 5 min, 14 min 2 s, 8.5 s."""
    if round(seconds, 1) < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def compare_words(true: str, generated: str) -> list[tuple[str, bool]]:
    """The words of a generated caption, each with whether it agrees with the true caption, in order.

    "a red apple" against the true "a green apple" gives [("a", True), ("red", False), ("apple", True)].
    """
    words = generated.split()
    agrees = [False] * len(words)
    for match in SequenceMatcher(None, true.split(), words, autojunk=False).get_matching_blocks():
        agrees[match.b : match.b + match.size] = [True] * match.size
    return list(zip(words, agrees, strict=True))


# --- Pictures ----------------------------------------------------------------------------------------------------


def _previews(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Steps and sheets by split: the first, the last, and some between."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("[0-9]*-*.png")):
        step, _, split = path.stem.partition("-")
        found.setdefault(split, []).append((int(step), path))
    shown = {}
    for split, sheets in found.items():
        chosen = np.linspace(0, len(sheets) - 1, min(len(sheets), SHOWN_PREVIEWS)).round().astype(int)
        shown[split] = [sheets[i] for i in chosen]
    return shown


def embed_picture(path: Path, side: int = EMBEDDED_SIDE) -> Picture:
    """A picture as a PNG data URI, shrunk to `side` if it is larger.

    Raises `UserError` when the file is missing or is not a picture.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such picture, but a list in {path.parent.parent} names it") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not a picture that can be read: {error}") from error
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    small = max(picture.size) <= PIXELATED_SIDE
    scale = 2 if small else 1
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(source, scale * picture.width, scale * picture.height, small)


# --- Curves ------------------------------------------------------------------------------------------------------

# Placeholder colours, replaced by CSS variables in the SVG text.
_INK, _GRID = "#010101", "#020202"
_LINES = ("#010001", "#020002", "#030003", "#040004")
_CSS_COLORS = {_INK: "var(--soft)", _GRID: "var(--line)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_LINES, start=1)
}
_PLOT_STYLE: dict[Any, Any] = {  # names of matplotlib settings; only its newer versions have a type for them
    "svg.fonttype": "none",  # text stays text: small files, and the page's own font
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def smooth(values: Float[np.ndarray, " points"], window: int) -> Float[np.ndarray, " points"]:
    """Centred moving average over `window` points; at the ends, over those that there are."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def thin(series: Series, bins: int) -> Series:
    """A long curve through the minimum and the maximum of each of `bins` bins: fewer points, and no spike is lost."""
    if len(series.steps) <= 2 * bins:
        return series
    chosen: set[int] = set()
    for members in np.array_split(np.arange(len(series.steps)), bins):
        chosen |= {members[0] + series.values[members].argmin(), members[0] + series.values[members].argmax()}
    order = sorted(chosen)
    return Series(series.steps[order], series.values[order])


def _learning_panels(log: TrainingLog) -> list[Panel]:
    """The panels of a stage's losses and of what belongs to them."""
    terms = [key for key in log.series if key.startswith("loss/")]
    total, *known = LEARNING_PANELS  # with a single term, the total would be that term's curve again
    known_keys = {key for panel in known for key in panel.keys}
    further = [Panel(term, "", "", (term,)) for term in terms if term not in known_keys]
    return [*([] if len(terms) == 1 else [total]), *known, *further]


def _other_panels(log: TrainingLog) -> list[Panel]:
    """One panel per logged number that belongs to no other."""
    known = {key for panel in (*_learning_panels(log), *THROUGHPUT_PANELS) for key in panel.keys} | {"loss"}
    return [Panel(key, "", "", (key,)) for key in log.series if key not in known]


def _plots(stage: str, log: TrainingLog, panels: Iterable[Panel]) -> list[Plot]:
    """The panels of which the stage has logged anything."""
    plots = []
    for panel in panels:
        lines = {key: log.series[key] for key in panel.keys if key in log.series}
        if lines:
            plots.append(_draw(f"{stage}/{panel.title}", panel, lines))
    return plots


def _draw(name: str, panel: Panel, lines: Mapping[str, Series]) -> Plot:
    """One panel as SVG text: each line raw and faint, and smoothed; `name` is unique within the page."""
    logarithmic = panel.axis == "fitted" and _spans_decades(lines.values())
    window = _smoothing_window(lines.values()) if panel.smoothed else 1
    with matplotlib.rc_context({**_PLOT_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.6, 2.15), layout="constrained")
        axes = figure.add_subplot()
        for color, (key, series) in zip(_LINES, lines.items(), strict=False):
            _draw_line(axes, key, series, window, color)
        _dress(axes, panel.unit, logarithmic)
        if panel.axis == "from_zero":
            axes.set_ylim(bottom=min(0.0, *(float(series.values.min()) for series in lines.values())))
        if len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=len(lines), handlelength=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    notes = [panel.caption]
    if window > 1:
        notes.append(f"Bold: mean of {window} logged steps.")
    if logarithmic:
        notes.append("Logarithmic axis.")
    return Plot(panel.title, " ".join(filter(None, notes)), _inline_svg(buffer.getvalue(), panel.title))


def _draw_line(axes: Axes, key: str, series: Series, window: int, color: str) -> None:
    raw = thin(series, CURVE_BINS)
    marker = "o" if len(raw.steps) == 1 else None
    if window == 1:
        axes.plot(raw.steps, raw.values, color=color, linewidth=1.5, marker=marker, label=key)
        return
    smoothed = thin(Series(series.steps, smooth(series.values, window)), CURVE_BINS)
    axes.plot(raw.steps, raw.values, color=color, linewidth=0.8, alpha=0.4)
    axes.plot(smoothed.steps, smoothed.values, color=color, linewidth=1.6, label=key)


def _smoothing_window(lines: Iterable[Series]) -> int:
    return max(1, round(SMOOTHING_SHARE * max(len(series.steps) for series in lines)))


def _dress(axes: Axes, unit: str, logarithmic: bool) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.margins(x=0.01)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value == round(value) else ""))
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def _spans_decades(lines: Iterable[Series]) -> bool:
    values = np.concatenate([series.values for series in lines])
    return bool(values.min() > 0 and values.max() / values.min() > LOG_AXIS_RATIO)


def _inline_svg(document: str, title: str) -> Markup:
    """The <svg> element of an SVG document, ready to stand in an HTML page.

    It scales with the page, takes its colours from the page, and keeps only the ids that something refers to.
    """
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box, "matplotlib writes a viewBox"
    label = Markup.escape(title)
    svg = re.sub(r"<svg[^>]*>", f'<svg {view_box[0]} role="img" aria-label="{label}">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    for color, variable in _CSS_COLORS.items():
        svg = svg.replace(color, variable)
    return Markup(svg)
