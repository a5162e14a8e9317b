"""Questions, captions and referring expressions about the scenes of an OpenMoji corpus, for few-shot evaluation.

How it is distributed: the corpus's shards of pairs, `{key}.png` and `{key}.json`, where the latter holds the scene.

What it becomes: the same pictures, and a `.json` with

    {"captions": ["a large dog on the left, on a red background", ...],                  five wordings
     "questions": [{"question": "how many dogs are there?", "answers": ["2", ...]}, ...],  the same ten times
     "objects": [{"expression": "the large dog", "box": [0.1, 0.3, 0.5, 0.9]}, ...],       single drawings; shares
     "checks": [{"question": "is there a dog?", "label": 1}, ...]}                         one with each answer

Ten people would not differ about these scenes, so VQA accuracy is 1 or 0 here.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.annotated import ShardImages
from data_pipelines.corpora.converted import new_corpus
from data_pipelines.corpora.openmoji_scenes import Scene, describe, place_phrase
from data_pipelines.corpora.openmoji_text import plural, with_article
from data_pipelines.images import RELEASE_RULES
from emu2_jax.errors import DataError

NUM_CAPTIONS, NUM_ANSWERS = 5, 10


def convert(
    paths: Sequence[str], out_dir: Path, *, max_samples: int | None = None, samples_per_shard: int = 1000
) -> Counter[str]:
    """Writes the scenes of shards, or the first `max_samples` of them, with questions into the new directory `out_dir`.

    Returns how many were written. Raises `DataError` for shards of anything else.
    """
    images = ShardImages(paths, 0, RELEASE_RULES)
    every = list(images.fields())
    names = sorted({thing["emoji"]["name"] for fields in every for thing in fields.get("objects", ())})
    with new_corpus(out_dir, "openmoji_questions", samples_per_shard, {"shards": list(paths)}) as corpus:
        for number, fields in enumerate(every[:max_samples]):
            try:
                scene = Scene.from_json(fields)
            except (LookupError, TypeError) as error:
                raise DataError(f"{images.places[number]}: its .json holds no scene of an OpenMoji corpus") from error
            facts = questions_about(scene, names, random.Random(images.keys[number]))
            data = images.encoded(number)
            corpus.write({"png": data, "json": json.dumps(facts, ensure_ascii=False).encode()})
    return corpus.counts


def questions_about(scene: Scene, names: Sequence[str], rng: random.Random) -> Mapping[str, Any]:
    """What can be asked about a scene, of a corpus with emoji of these `names`."""
    things = scene.objects
    shown = Counter(thing.emoji.name for thing in things)
    alone = [thing for thing in things if shown[thing.emoji.name] == 1]
    questions = [("what colour is the background?", scene.background.colours[0])] * (
        scene.background.pattern == "plain"
    )
    for thing in alone:
        name = plural(thing.emoji.name)
        questions += [(f"how many {name} are there?", str(thing.count)), (f"how large are the {name}?", thing.size)]
    questions += [(f"what is {place_phrase(thing.position)}?", thing.emoji.name) for thing in things]
    absent = [name for name in names if name not in shown]
    checks = [(f"is there {with_article(rng.choice(sorted(shown)))}?", 1)]
    checks += [(f"is there {with_article(rng.choice(absent))}?", 0)] if absent else []
    return {
        "captions": [describe(scene, rng) for _ in range(NUM_CAPTIONS)],
        "questions": [{"question": question, "answers": [answer] * NUM_ANSWERS} for question, answer in questions],
        "objects": [
            {
                "expression": f"the {thing.size} {thing.emoji.name}",
                "box": [round(edge / scene.image_size, 4) for edge in thing.boxes[0]],
            }
            for thing in alone
            if thing.count == 1
        ],
        "checks": [{"question": question, "label": label} for question, label in checks],
    }
