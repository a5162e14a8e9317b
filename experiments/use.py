"""Use a trained run from the command line: continue prompts, vary a link of a chain, redraw images."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.kinds import VIDEO_SUFFIXES
from emu2_jax import sharding
from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion import decoder as decoder_lib
from emu2_jax.errors import CheckpointError, UserError
from emu2_jax.generation.answer import IMAGE, Answer, Wanted
from emu2_jax.generation.chain import Chain
from emu2_jax.generation.generator import Generator
from emu2_jax.generation.prompt import Embedded, Link
from experiments.contact_sheet import Variant, write_sheet
from experiments.evaluate import DECODER_STAGE, MODEL_STAGE
from experiments.inputs import open_tokenizer
from experiments.prompts import IMAGE_SUFFIXES, LinkReader, NamedPrompt
from experiments.reconstruct_clips import reconstruct_clips
from experiments.runs import CONFIG, load_config, load_params, override, write_atomically

SHEET_SUFFIXES = (*sorted(IMAGE_SUFFIXES), ".html")
VIDEO_STAGE = "video"


class Drawing:
    """The visual decoder of a run, and the embeddings of nothing that guidance steers away from."""

    def __init__(self, run: Path, decoder: Path | None) -> None:
        """Raises `CheckpointError` when there is none, before anything is loaded."""
        self._workdir = run / DECODER_STAGE if decoder is None else decoder
        if not (self._workdir / CONFIG).exists():
            raise CheckpointError(
                f"{run}: has no trained visual decoder ({self._workdir}), which drawing needs; train one "
                f"(emu2 train ..._decoder --workdir {self._workdir}), name another with --decoder, or ask for text"
            )
        self._config = load_config(self._workdir)

    @functools.cached_property
    def _params(self) -> dict[str, object]:
        return dict(load_params(self._workdir, self._config))

    def draw(self, embeddings: np.ndarray, null: np.ndarray, seed: int) -> np.ndarray:
        """An image, 8 bits, from N embeddings; the same noise for the same seed."""
        image = decoder_lib.sample(
            self._config, self._params, jnp.asarray(embeddings)[None], jnp.asarray(null)[None], jax.random.key(seed)
        )
        return np.round(np.asarray(image[0]) * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's model, ready to continue prompts."""

    config: ExperimentConfig
    generator: Generator

    @functools.cached_property
    def null(self) -> np.ndarray:
        """The embeddings that the model generates for an empty prompt (release)."""
        return self.generator.generate([], IMAGE).embeddings[0]


def open_run(run: Path, settings: Sequence[str] = (), dtype: str | None = None) -> Opened:
    """The model of a work directory, or of a run's last stage, on the mesh that `settings` (--gin.mesh...) ask for."""
    config = override(run_config(run), [], settings)
    mesh = sharding.make_mesh(config.mesh) if jax.device_count() > 1 and settings else None
    dtype = dtype or config.model.compute_dtype
    params = load_params(_stage(run), config, mesh=mesh, language_dtype=dtype)
    generator = Generator(
        config.model, params, open_tokenizer(config), context=config.data.row_length, dtype=dtype, mesh=mesh
    )
    return Opened(config, generator)


def run_config(run: Path) -> ExperimentConfig:
    """The config of a work directory, or of a run's last stage."""
    return load_config(_stage(run))


def _stage(run: Path) -> Path:
    return run if (run / CONFIG).exists() else run / MODEL_STAGE  # a work directory, or a run that holds several


def link_reader(run: Path, video_frames: int) -> LinkReader:
    """Reads pictures at the size of the run's encoder."""
    return LinkReader(run_config(run).model.vision.image_size, video_frames)


def generate(
    run: Path,
    prompts: Sequence[NamedPrompt],
    wanted: Wanted,
    *,
    image_file: Path | None,
    out: Path | None,
    decoder: Path | None,
    settings: Sequence[str],
    dtype: str | None,
    seed: int,
) -> None:
    """Continue prompts: texts are printed, images written to `image_file` (one prompt, one image) or into `out`.

    `out` also gets answers.jsonl. Everything that can be refused is looked at before anything is loaded.
    """
    if image_file is not None:
        _check_new_picture(image_file)
        if len(prompts) != 1 or wanted.most_images != 1:
            raise UserError("--image: is for one prompt and one image; --out DIR takes the images of several")
    elif wanted.most_images and out is None:
        raise UserError("--images: needs --out DIR, where they are written to")
    if out is not None and out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists already and is not empty; give another name")
    drawing = Drawing(run, decoder) if wanted.most_images else None
    opened = open_run(run, settings, dtype)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    # One batch at a time, so that answers appear as they are ready.
    size = opened.generator.max_batch
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        answers = _with_progress(opened, [prompt.links for prompt in batch], wanted)
        for prompt, answer in zip(batch, answers, strict=True):
            texts = _file(prompt.name, answer, drawing, opened, image_file, out, seed)
            print(texts if len(prompts) == 1 else f"{prompt.name}: {texts}", flush=True)
            lines.append(json.dumps(_record(prompt.name, answer)))
    if out is not None:
        write_atomically(out / "answers.jsonl", "\n".join(lines) + "\n")


def _with_progress(opened: Opened, prompts: Sequence[Sequence[Link]], wanted: Wanted) -> list[Answer]:
    for prompt in prompts:
        opened.generator.fit(prompt, wanted)  # what it refuses is said before a bar is drawn
    most = wanted.positions(opened.config.model.num_visual_tokens)
    with tqdm(total=most, desc="generate", unit="element", leave=False) as bar:
        return opened.generator.generate_batch(prompts, wanted, progress=lambda made: bar.update(made - bar.n))


def _file(
    name: str,
    answer: Answer,
    drawing: Drawing | None,
    opened: Opened,
    image_file: Path | None,
    out: Path | None,
    seed: int,
) -> str:
    """Write the images of an answer; what is printed of it, with paths where the images are."""
    printed: list[str] = []
    number = 0
    for link in answer.links:
        if not isinstance(link, Embedded):
            printed.append(link)
            continue
        assert drawing is not None, "an answer holds no more images than were asked for"
        path = image_file
        if path is None:
            assert out is not None
            path = out / f"{name}-{number}.png"
        Image.fromarray(drawing.draw(link.embeddings, opened.null, seed)).save(path)
        printed.append(str(path))
        number += 1
    return " ".join(printed)


def _record(name: str, answer: Answer) -> dict[str, object]:
    """What answers.jsonl has of an answer; images are numbered as their files are."""
    count = 0
    links: list[object] = []
    for link in answer.links:
        if isinstance(link, Embedded):
            links.append({"image": f"{name}-{count}.png"})
            count += 1
        else:
            links.append(link)
    record: dict[str, object] = {"name": name, "links": links, "token_ids": answer.token_ids.tolist()}
    record |= {"ended": answer.ended, "links_left_out": answer.links_left_out}
    return record if answer.score is None else {**record, "score": answer.score}


def vary(
    run: Path,
    links: Sequence[Link],
    shown: Sequence[str],
    number: int,
    by: Sequence[Link],
    by_shown: Sequence[str],
    wanted: Wanted,
    *,
    out: Path,
    decoder: Path | None,
    settings: Sequence[str],
    dtype: str | None,
    seed: int,
) -> None:
    """The chain of `links` with link `number` replaced by each of `by`, side by side in one picture or page."""
    if out.suffix.lower() not in SHEET_SUFFIXES:
        raise UserError(f"{out}: wanted a name that ends in one of {', '.join(SHEET_SUFFIXES)}")
    _check_new_picture(out, SHEET_SUFFIXES)
    if not 1 <= number <= len(links):
        raise UserError(f"--replace: got {number}; the chain has links 1 to {len(links)}")
    drawing = Drawing(run, decoder) if wanted.most_images else None
    opened = open_run(run, settings, dtype)
    chain = Chain(opened.generator, links)
    with tqdm(total=1, desc=f"{len(by)} variants", leave=False) as bar:
        answers = chain.variants(number, by, wanted)
        bar.update()
    computed = opened.generator.positions_computed
    variants = []
    for label, link, answer in zip(by_shown, by, answers, strict=True):
        images: list[np.ndarray] = []
        if drawing is not None:
            images = [drawing.draw(embeddings, opened.null, seed) for embeddings in answer.embeddings]
        given = link if isinstance(link, np.ndarray) else None
        variants.append(Variant(label, given, answer.text, images))
    whole = sum(len(opened.generator.fit(chain.replace(number, link).links, wanted)[0]) for link in by)
    write_sheet(out, shown, number, variants)
    print(f"{out}: {len(by)} variants; {computed} positions computed of {whole} in all")


def reconstruct(run: Path, images: Sequence[Path], out: Path) -> None:
    """Write one picture: the images above, what the decoder makes of their embeddings below.

    Videos are taken by a video decoder and give an animation (`reconstruct_clips`). `run` is a work directory, or a
    run that holds several.
    """
    videos = [path for path in images if path.suffix.lower().removeprefix(".") in VIDEO_SUFFIXES]
    stage = run if (run / CONFIG).exists() else run / (VIDEO_STAGE if videos else DECODER_STAGE)
    config = load_config(stage)
    if config.train.task == "video_decoder":
        reconstruct_clips(stage, config, images, out)
        return
    if videos:
        raise UserError(f"{videos[0]}: is a video, and {stage} draws images; give a video decoder's work directory")
    _check_new_picture(out)
    reader = LinkReader(config.decoder.image_size)
    originals = np.stack([reader.image(path) for path in images])
    params = load_params(stage, config)
    redrawn = np.asarray(decoder_lib.autoencode(config, params, jnp.asarray(originals), jax.random.key(0)))
    rows = [np.concatenate(list(row), axis=1) for row in (originals / 255.0, redrawn)]
    Image.fromarray(np.round(np.concatenate(rows, axis=0) * 255).astype(np.uint8)).save(out)
    print(out)


def _check_new_picture(path: Path, suffixes: Sequence[str] = tuple(sorted(IMAGE_SUFFIXES))) -> None:
    """Raise `UserError` unless a picture can be written at `path` without overwriting anything."""
    if path.exists():
        raise UserError(f"{path}: exists already; give another name")
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: wanted a name that ends in one of {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: is no directory to write a picture into")
