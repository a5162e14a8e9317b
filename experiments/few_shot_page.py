"""The page of a few-shot evaluation: scores, and questions to read with the pictures of their examples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu2_jax.config import ExperimentConfig
from emu2_jax.evaluation.few_shot import Answered
from emu2_jax.evaluation.few_shot_tasks import Task
from emu2_jax.report import page_environment, write_page

TEMPLATE = "few_shot.html.jinja"
PICTURES = "pictures"
_SIDE = 112  # pixels of a picture on the page

#: Scores that are shares, shown in per cent.
_SHARES = frozenset(
    [
        *("vqa_accuracy", "standard_error", "exact_match", "exact_match_processed", "roc_auc", "accuracy"),
        *("accuracy_at_0.5", "mean_overlap", "with_a_box", "bleu_4", "rouge_l"),
    ]
)


def shown_score(name: str, value: float | None) -> str:
    """A score for people: shares in per cent, CIDEr as papers print it."""
    if value is None:
        return "-"
    if name == "n":
        return f"{value:.0f}"
    return f"{100 * value:.1f}" + (" %" if name in _SHARES else "")


def write_few_shot_page(
    folder: Path,
    config: ExperimentConfig,
    task: Task,
    result: Mapping[str, Any],
    scored: Mapping[int, Sequence[Answered]],
    pixels: Callable[[str], np.ndarray],
) -> None:
    """Writes FOLDER/index.html and the pictures it shows; `pixels` gives an image by its place."""
    first = config.evaluation.few_shot.page_queries
    (folder / PICTURES).mkdir(exist_ok=True)

    def picture(place: str) -> str:
        name = f"{PICTURES}/{hashlib.blake2b(place.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}.jpg"
        if not (folder / name).exists():
            image = Image.fromarray(pixels(place))
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            partial = folder / f"{name}.partial"
            image.save(partial, "JPEG", quality=85)
            os.replace(partial, folder / name)
        return name

    entries = {
        shots: [
            {
                "answered": one,
                "prompt": [
                    {"text": link} if isinstance(link, str) else {"picture": picture(link["image"]), **link}
                    for link in one.prompt
                ],
                "truth": _truth(one.truth),
            }
            for one in answered[:first]
        ]
        for shots, answered in scored.items()
    }
    template = page_environment(Path(__file__).parent).get_template(TEMPLATE)
    page = template.render(
        name=config.name, task=task, result=result, entries=entries, first=first, shown_score=shown_score
    )
    write_page(folder / "index.html", page)


def _truth(truth: Any) -> str:
    """Of several equal answers how many there are."""
    if not isinstance(truth, list) or not all(isinstance(one, str) for one in truth):
        return str(truth)
    counts = {one: truth.count(one) for one in truth}
    return "; ".join(one if count == 1 else f"{one} (x{count})" for one, count in counts.items())
