"""`emu2 evaluate RUN --suite in_context`: few-shot accuracy on held-out episodes, beside the controls.

Writes RUN/evaluation/in_context.json (accuracies with intervals), in_context_answers.jsonl (every prompt, answer and
score), in_context.png (the curves) and in_context.html (the table, the curves, and episodes to read).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from data_pipelines.corpora.openmoji_in_context import NUM_NAMES, NUM_WRONG
from data_pipelines.episodes import Episode, read_episodes
from data_pipelines.images import ImageRules
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError
from emu2_jax.evaluation import in_context
from emu2_jax.evaluation.in_context import CONDITIONS, Answered, Link
from emu2_jax.generation.answer import Wanted
from emu2_jax.generation.generator import Generator
from emu2_jax.models.emu2 import encode_images
from emu2_jax.report import page_environment, write_page
from emu2_jax.task import Params
from emu2_jax.tokenizer import Tokenizer
from experiments.data_show import thumbnail
from experiments.inputs import open_tokenizer
from experiments.runs import load_params

FOLDER = "evaluation"
NAME = "in_context"
TEMPLATE = "in_context.html.jinja"
#: Episodes of each task that the page shows, at the most shots.
SHOWN = 3
#: What blind guessing gets: any of the names in the prompt; any of four pictures.
CHANCE: Mapping[str, float] = {
    "names": 1 / NUM_NAMES,
    "counting": 1 / 4,
    "marks": 1 / 2,
    "patterns": 1 / (1 + NUM_WRONG),
    "settings": 1 / (1 + NUM_WRONG),
}
_WORDS: Mapping[str, str] = {
    "examples": "with examples",
    "shuffled": "answers exchanged among the examples",
    "no_images": "pictures taken out",
}
_NEAREST = "the name of the nearest picture, by the encoder alone"


class TrainedModel:
    """A trained Emu2 as what `in_context.measure` asks."""

    def __init__(self, config: ExperimentConfig, params: Params, tokenizer: Tokenizer, longest_answer: int) -> None:
        self._tokenizer = tokenizer
        self._generator = Generator(config.model, params, tokenizer, context=config.data.row_length)
        self._wanted = Wanted(max_tokens=longest_answer)
        self._encode = jax.jit(functools.partial(encode_images, config.model))
        self._params = params

    def answers(self, prompts: Sequence[Sequence[Link]]) -> list[str]:
        """Greedy text up to `[IMG]`, with which the next example of a document would begin, or `</s>`."""
        found = []
        for answer in self._generator.generate_batch(prompts, self._wanted):
            ids = answer.token_ids.tolist()
            end = ids.index(self._tokenizer.image_start_id) if self._tokenizer.image_start_id in ids else len(ids)
            found.append(self._tokenizer.decode(ids[:end], skip_special_tokens=True))
        return found

    def drawn(self, prompts: Sequence[Sequence[Link]]) -> np.ndarray:
        """Regressed after `[IMG]`."""
        return self._generator.image_embeddings(prompts)

    def embeddings(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Of the frozen encoder, pooled."""
        return np.asarray(self._encode(self._params["visual_encoder"], jnp.asarray(np.stack(images))))


def evaluate_in_context(config: ExperimentConfig, workdir: Path, out: Path) -> dict[str, Any]:
    """Measure the model of `workdir` on `evaluation.in_context`; returns what in_context.json holds.

    Raises `ConfigError` when no episodes are named, or a prompt of them does not fit into a row.
    """
    settings = config.evaluation
    if not settings.in_context:
        raise ConfigError("evaluation.in_context: names no shards of held-out episodes (docs/in-context.md)")
    images = ImageRules(apply_exif_orientation=config.data.apply_exif_orientation)
    size = config.model.vision.image_size
    episodes = read_episodes(settings.in_context, size, settings.episodes_per_task, images=images)
    fewest = min((len(episode.examples) for episode in episodes), default=0)
    if fewest < max(settings.shots):
        raise ConfigError(f"evaluation.shots: {max(settings.shots)}, but an episode has {fewest} examples")
    tokenizer = open_tokenizer(config)
    longest = max(tokenizer.count_plain([episode.query.text for episode in episodes])) + 2
    model = TrainedModel(config, load_params(workdir, config), tokenizer, longest)
    with tqdm(desc=NAME, unit="question") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        answered = list(in_context.measure(episodes, settings.shots, model, progress))
    names = [episode for episode in episodes if episode.task == "names"]
    result = {
        "tasks": in_context.summarise(answered),
        "nearest_picture": {"names": in_context.nearest_pictures(names, settings.shots, model)} if names else {},
        "chance": CHANCE,
        "shots": list(settings.shots),
        "episodes_per_task": settings.episodes_per_task,
        "intervals": "Wilson, 95 %",
    }
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}_answers.jsonl").write_text("".join(f"{_line(one)}\n" for one in answered), encoding="utf-8")
    figure = draw_curves(result)
    figure.savefig(folder / f"{NAME}.png", dpi=150)
    write_page(folder / f"{NAME}.html", _page(config, result, episodes, answered))
    (folder / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _line(one: Answered) -> str:
    """One answer as JSON; pictures of the prompt by their place."""
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return json.dumps({**fields, "prompt": [link if isinstance(link, str) else "<image>" for link in one.prompt]})


def draw_curves(result: Mapping[str, Any]) -> Figure:
    """Accuracy over shots, a panel for each task; bars are 95 % intervals, the dotted line is blind guessing, the
    dashed one what the encoder alone gives."""
    tasks, shots = result["tasks"], result["shots"]
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, (task, by_condition) in zip(grid, tasks.items(), strict=False):
        for condition in CONDITIONS:
            cells = by_condition.get(condition, {})
            places = [place for place, count in enumerate(shots) if str(count) in cells]
            values = [cells[str(shots[place])] for place in places]
            middle = np.array([cell["accuracy"] for cell in values])
            below, above = (np.array([cell[side] for cell in values]) for side in ("low", "high"))
            error = np.abs(np.stack([middle - below, above - middle])) if values else np.zeros((2, 0))
            axes.errorbar(places, middle, error, marker="o", markersize=3, capsize=2, label=_WORDS[condition])
        if task in result["nearest_picture"]:
            nearest = [result["nearest_picture"][task][str(count)]["accuracy"] for count in shots]
            axes.plot(range(len(shots)), nearest, color="grey", linestyle="--", linewidth=1, label=_NEAREST)
        if task in CHANCE:
            axes.axhline(CHANCE[task], color="grey", linestyle=":", linewidth=1)
        axes.set_title(task.replace("_", ": "), fontsize=10)
        axes.set_xticks(range(len(shots)), [str(count) for count in shots])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("examples in the prompt")
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("accuracy")
    labelled = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _page(
    config: ExperimentConfig, result: Mapping[str, Any], episodes: Sequence[Episode], answered: Sequence[Answered]
) -> str:
    most = max(config.evaluation.shots)
    at_most = {(one.key, one.condition): one for one in answered if one.shots == most}
    by_task: dict[str, list[Episode]] = {}
    for episode in episodes:
        if len(by_task.setdefault(episode.task, [])) < SHOWN:
            by_task[episode.task].append(episode)
    template = page_environment(Path(__file__).parent).get_template(TEMPLATE)
    return template.render(
        name=config.name,
        result=result,
        conditions=CONDITIONS,
        words=_WORDS,
        nearest_words=_NEAREST,
        curves=f"{NAME}.png",
        most=most,
        tasks={task: [_shown(episode, at_most) for episode in some] for task, some in by_task.items()},
    )


def _shown(episode: Episode, answers: Mapping[tuple[str, in_context.Condition], Answered]) -> dict[str, Any]:
    """An episode for the page: pictures as data URIs."""
    drawing = not episode.query.text
    asked = episode.query.images[:-1] if drawing else episode.query.images
    return {
        "key": episode.key,
        "examples": [
            {"images": [thumbnail(image) for image in one.images], "text": one.text} for one in episode.examples
        ],
        "query": [thumbnail(image) for image in asked],
        "truth": episode.query.text,
        "picture": thumbnail(episode.query.images[-1]) if drawing else None,
        "wrong": [thumbnail(image) for image in episode.wrong],
        "answers": [
            {"condition": condition, "answer": one.answer, "correct": one.correct}
            for condition in CONDITIONS
            if (one := answers.get((episode.key, condition))) is not None
        ],
    }
