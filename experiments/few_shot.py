"""`emu2 evaluate RUN --suite few_shot`: a benchmark, asked after 0, 4, 8, ... examples.

Writes into RUN/evaluation/few_shot/TASK: answers.jsonl (every prompt, answer and score), results.json and index.html;
on the way there settings.json, answers-I-of-N.jsonl and features/, with which the same command goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from emu2_jax import sharding
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError
from emu2_jax.evaluation import captions, few_shot
from emu2_jax.evaluation.few_shot import Answered, Shown
from emu2_jax.evaluation.few_shot_tasks import YES_NO, Question, Task, resolve
from emu2_jax.fingerprint import fingerprint
from emu2_jax.generation.answer import Wanted
from emu2_jax.generation.generator import Generator
from emu2_jax.generation.sampling import GREEDY, RELEASE_BEAMS
from emu2_jax.tokenizer import Picture, Tokenizer
from experiments.encode import Part
from experiments.few_shot_answers import AnswerFile, Plan, Unit, check_settings, keep_settings, read_units
from experiments.few_shot_benchmark import PATH, Benchmark, Chooser, ImageSide, open_benchmark
from experiments.few_shot_features import Side, named_features, own_features
from experiments.few_shot_page import shown_score, write_few_shot_page
from experiments.inputs import open_tokenizer
from experiments.runs import load_params, write_atomically

FOLDER = Path("evaluation") / "few_shot"
FEATURES = "features"
#: Images whose pixels are kept, for those that come again.
_KEPT_IMAGES = 512


def evaluate_few_shot(
    config: ExperimentConfig, workdir: Path, out: Path | None, part: Part, *, run: Path
) -> tuple[Path, dict[str, Any] | None]:
    """Ask the model of `workdir` what `evaluation.few_shot` names, and write into `out` (RUN/evaluation/few_shot/TASK).

    Does the share of `part`. Returns the directory, and what results.json holds; None while answers of other parts are
    missing.
    """
    settings = config.evaluation.few_shot
    task = resolve(settings)
    if task.score == "captions":
        captions.check_installed()
    folder = run / FOLDER / task.name if out is None else out
    data = open_benchmark(config, task)
    evaluation = _Evaluation.open(config, workdir, task, data)
    identity = evaluation.identity()
    check_settings(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    chooser = evaluation.chooser(folder / FEATURES, part)
    plan = Plan(settings.shots, len(data.queries), settings.batch)
    blocks = plan.blocks_of(part)
    for block in tqdm(blocks, desc="examples and lengths", unit="block", leave=False):
        evaluation.check_room(plan.questions(block), chooser)
    keep_settings(folder, identity)
    with AnswerFile(folder, part, plan) as file:
        done = read_units(folder, plan)
        todo = [unit for unit in plan.units() if unit.block in blocks and unit not in done]
        share = len(plan.shots) * sum(len(plan.questions(block)) for block in blocks)
        left = sum(len(plan.questions(unit.block)) for unit in todo)
        with tqdm(total=share, initial=share - left, desc=task.name, unit="question", leave=False) as bar:
            for unit in todo:
                bar.set_postfix_str(f"{unit.shots} shots")
                file.append(evaluation.answers(unit.shots, plan.questions(unit.block), chooser))
                bar.update(len(plan.questions(unit.block)))
    found = read_units(folder, plan)
    if any(unit not in found for unit in plan.units()):
        return folder, None
    return folder, _put_together(evaluation, folder, plan, found, identity)


@dataclass(frozen=True)
class _Evaluation:
    """A model and the benchmark that it is asked."""

    config: ExperimentConfig
    task: Task
    data: Benchmark
    generator: Generator
    tokenizer: Tokenizer
    wanted: Wanted
    model: str  #: fingerprint of its parameters
    encoder: str  #: who makes its features

    @classmethod
    def open(cls, config: ExperimentConfig, workdir: Path, task: Task, data: Benchmark) -> _Evaluation:
        """Load the model, onto all devices of this process."""
        settings = config.evaluation.few_shot
        mesh = sharding.make_mesh(config.mesh) if jax.device_count() > 1 else None
        dtype = config.model.compute_dtype
        params = load_params(workdir, config, mesh=mesh, language_dtype=dtype)
        beams = dataclasses.replace(RELEASE_BEAMS, num_beams=settings.beams, length_penalty=task.length_penalty)
        tokenizer = open_tokenizer(config)
        generator = Generator(
            config.model,
            params,
            tokenizer,
            context=config.data.row_length,
            dtype=dtype,
            mesh=mesh,
            max_batch=settings.batch,
        )
        return cls(
            config=config,
            task=task,
            data=data,
            generator=generator,
            tokenizer=tokenizer,
            wanted=Wanted(max_tokens=task.max_tokens, decoding=GREEDY if settings.beams == 1 else beams),
            model=fingerprint(params),
            encoder=f"emu2 {fingerprint(params['visual_encoder'])}",
        )

    def identity(self) -> dict[str, Any]:
        """All that answers depend on."""
        settings, task = self.config.evaluation.few_shot, self.task
        support = self.data.support_side
        rices = settings.selection == "rices"
        return {
            "model": self.model,
            **{
                one.name: getattr(task, one.name)
                for one in dataclasses.fields(task)
                if one.name not in ("paper", "data", "name")
            },
            "task": task.name,
            "shots": list(settings.shots),
            "selection": settings.selection,
            "most_similar_last": settings.most_similar_last,
            "features": (settings.features_encoder or self.encoder) if rices else None,
            "seed": settings.seed,
            "separator": settings.separator,
            "beams": settings.beams,
            "batch": settings.batch,
            "context": self.config.data.row_length,
            "compute_dtype": self.config.model.compute_dtype,
            "questions": self.data.query_side.digest,
            "examples": None if support is None else support.digest,
        }

    def chooser(self, folder: Path, part: Part) -> Chooser:
        """Who chooses examples; for RICES with the features of all images, those in `folder` or what is named."""
        settings = self.config.evaluation.few_shot
        support = self.data.support_side
        if support is None or settings.selection != "rices":
            return Chooser(settings, self.data, None)
        made_by = settings.features_encoder or self.encoder
        if settings.features is not None:
            named = Path(settings.features)
            queries = named_features(named, "queries", self.data.query_side.keys, made_by)
            return Chooser(settings, self.data, (queries, named_features(named, "support", support.keys, made_by)))

        def own(name: Side, side: ImageSide) -> np.ndarray:
            encode, images = self.generator.encode, side.digest_with_places
            return own_features(folder, name, side.keys, side.pixels, encode, self.encoder, images, part)

        return Chooser(settings, self.data, (own("queries", self.data.query_side), own("support", support)))

    def check_room(self, questions: range, chooser: Chooser) -> None:
        """Raise `ConfigError` for a prompt with the most shots that is too long, before anything is answered."""
        settings, context = self.config.evaluation.few_shot, self.config.data.row_length
        answer = self.wanted.positions(self.config.model.num_visual_tokens)
        if self.task.score == "yes_no":
            answer = max(self.tokenizer.count_plain(YES_NO)) + 1  # the tokenizer may join one with what is before it
        room = context - answer
        most = max(settings.shots)
        for position, number in enumerate(questions):
            query = self.data.queries[number]
            length = self._length(chooser.ordered(questions, position, most), query)
            if length > room:
                fewer = {shots: chooser.ordered(questions, position, shots) for shots in range(most)}
                fitting = [shots for shots, examples in fewer.items() if self._length(examples, query) <= room]
                raise ConfigError(
                    f"{PATH}.shots: {most} shots before question {query.key!r} take {length} positions, "
                    f"{length - room} more than the {room} that data.row_length = {context} leaves beside the answer; "
                    + (f"with {max(fitting)} it fits" if fitting else "nor does it fit without examples")
                )

    def _length(self, examples: Sequence[Question], query: Question) -> int:
        links = few_shot.prompt_of(self.task, examples, query, self.config.evaluation.few_shot.separator)
        picture = Picture(self.config.model.num_visual_tokens)
        return len(self.tokenizer.encode_prompt([link if isinstance(link, str) else picture for link in links]))

    def answers(self, shots: int, questions: range, chooser: Chooser) -> list[Answered]:
        """A block of questions after so many examples."""
        separator = self.config.evaluation.few_shot.separator
        examples = [chooser.ordered(questions, position, shots) for position in range(len(questions))]
        queries = [self.data.queries[number] for number in questions]
        links = [
            few_shot.prompt_of(self.task, own, query, separator) for own, query in zip(examples, queries, strict=True)
        ]
        prompts = [[link if isinstance(link, str) else self._pixels(link) for link in own] for own in links]
        yes: Sequence[float | None] = [None] * len(queries)
        if self.task.score == "yes_no":
            weighed = self.generator.log_probabilities(prompts, [f" {word}" for word in YES_NO])
            yes = few_shot.probability_of_yes(weighed).tolist()
            written = [YES_NO[0] if probability >= 0.5 else YES_NO[1] for probability in yes]  # type: ignore[operator]
        else:
            written = [self._text(answer.token_ids) for answer in self.generator.generate_batch(prompts, self.wanted)]
        return [
            Answered(
                shots=shots,
                number=number,
                query=query.key,
                examples=[one.key for one in own],
                prompt=[link if isinstance(link, str) else {"image": self._place(link)} for link in own_links],
                truth=query.truth,
                written=text,
                answer=few_shot.answer_in(text, separator),
                yes=probability,
            )
            for number, query, own, own_links, text, probability in zip(
                questions, queries, examples, links, written, yes, strict=True
            )
        ]

    def _text(self, ids: np.ndarray) -> str:
        """Up to `[IMG]`, with which the next example would begin. Of boxes the tokens are the answer."""
        start = np.flatnonzero(ids == self.tokenizer.image_start_id)
        own = ids[: start[0]] if len(start) else ids
        return self.tokenizer.decode(own.tolist(), skip_special_tokens=self.task.score != "box")

    def _place(self, shown: Shown) -> str:
        return self._places[shown.of_support][shown.image]

    @functools.cached_property
    def _places(self) -> Mapping[bool, list[str]]:
        support = self.data.support_side
        return {True: [] if support is None else support.places, False: self.data.query_side.places}

    @functools.cached_property
    def _pixels(self) -> Callable[[Shown], np.ndarray]:
        def read(shown: Shown) -> np.ndarray:
            side = self.data.support_side if shown.of_support else self.data.query_side
            assert side is not None
            return side.pixels(shown.image)

        return functools.lru_cache(_KEPT_IMAGES)(read)

    def pixels_at(self, place: str) -> np.ndarray:
        """An image by its place."""
        return self._pixels(self._shown[place])

    @functools.cached_property
    def _shown(self) -> dict[str, Shown]:
        sides = {True: self.data.support_side, False: self.data.query_side}
        return {
            place: Shown(of_support, image)
            for of_support, side in sides.items()
            if side is not None
            for image, place in enumerate(side.places)
        }


def _put_together(
    evaluation: _Evaluation,
    folder: Path,
    plan: Plan,
    found: Mapping[Unit, list[Answered]],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Score all answers, and write them, the results and the page."""
    config, task = evaluation.config, evaluation.task
    scored: dict[int, list[Answered]] = {}
    results: dict[str, dict[str, float | None]] = {}
    for shots in plan.shots:
        answered = [one for block in range(plan.num_blocks) for one in found[Unit(shots, block)]]
        scored[shots], summary = few_shot.summarise(task, answered)
        results[str(shots)] = {name: None if math.isnan(value) else value for name, value in summary.items()}
    result = {
        "task": task.name,
        "score": next(iter(results[str(plan.shots[0])])),
        "shots": results,
        "paper": {str(shots): share for shots, share in task.paper.items()},
        "settings": dict(identity),
    }
    lines = (json.dumps(vars(one)) for shots in plan.shots for one in scored[shots])
    write_atomically(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines))
    write_few_shot_page(folder, config, task, result, scored, evaluation.pixels_at)
    write_atomically(folder / "results.json", json.dumps(result, indent=1) + "\n")
    return result


def table(result: Mapping[str, Any]) -> str:
    """The scores for a terminal, a column for each number of shots."""
    by_shots = result["shots"]
    lines = [f"{result['task']:<24}" + "".join(f"{f'{shots} shots':>12}" for shots in by_shots)]
    for score in next(iter(by_shots.values())):
        cells = (shown_score(score, values[score]) for values in by_shots.values())
        lines.append(f"{score:<24}" + "".join(f"{cell:>12}" for cell in cells))
    if result["paper"]:
        paper = (f"{result['paper'][shots]:.1f} %" if shots in result["paper"] else "-" for shots in by_shots)
        lines.append(f"{'paper (37B)':<24}" + "".join(f"{cell:>12}" for cell in paper))
    return "\n".join(lines)
