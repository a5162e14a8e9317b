"""Weights in and out of work directories: `emu2 convert` and `emu2 export`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from emu2_jax import overrides
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import WeightsError
from emu2_jax.weights.convert import Source, import_weights, random_parameters
from emu2_jax.weights.diffusers_config import unet_json, vae_json
from emu2_jax.weights.export import export, hugging_face_config
from emu2_jax.weights.names import Form, official_shapes, table
from emu2_jax.weights.parameters import Parameter
from emu2_jax.weights.state_dict import flatten
from emu2_jax.weights.stream import appearing_whole, open_parameters, write_parameters
from experiments.inputs import make_task, open_tokenizer
from experiments.runs import CONFIG, load_config, resolve

DTYPES: Mapping[str, np.dtype | None] = {
    "stored": None,
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def convert(
    sources: Sequence[str],
    workdir: Path,
    recipe: str,
    gin_files: Iterable[Path],
    gin_flags: Iterable[str],
    *,
    dtype: str = "stored",
) -> None:
    """Make a work directory of the recipe's model from weight files; parts that none of them holds are drawn anew."""
    config, provenance = resolve(recipe, gin_files, gin_flags)
    init = make_task(config, None).init
    shapes = flatten(jax.eval_shape(init, jax.random.key(0)))
    parts = list(dict.fromkeys(path.split("/")[0] for path in shapes))
    tokenizer_note = _check_tokenizer(config)
    opened = [Source.open(text) for text in sources]
    imported = import_weights(opened, parts, config.model, config.decoder, seed=config.train.seed)
    held = {path.split("/")[0] for path in imported.parameters}
    fresh = [part for part in parts if part not in held]
    drawn = random_parameters(init, config.train.seed, fresh) if fresh else {}
    parameters: dict[str, Parameter] = {**imported.parameters, **drawn}
    for path, leaf in shapes.items():
        assert parameters[path].shape == leaf.shape, path
    dtypes = {path: DTYPES[dtype] or parameter.dtype for path, parameter in parameters.items()}
    fresh_notes = [f"{', '.join(fresh)}: in none of the files, drawn at random"] if fresh else []
    print("\n".join([*imported.notes, *fresh_notes, tokenizer_note]))
    total = sum(math.prod(parameter.shape) * dtypes[path].itemsize for path, parameter in parameters.items())
    text = overrides.dump(config, provenance)
    with appearing_whole(workdir) as temporary:
        with _progress("convert", total) as advance:
            write_parameters(temporary, parameters, dtypes, text, advance)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
    print(f"{workdir}: a work directory of {recipe}; start from it with --gin.train.init_from={workdir}")


def _check_tokenizer(config: ExperimentConfig) -> str:
    """Raise `ConfigError` when the run's tokenizer has another size than the embedding; a line if there is none yet."""
    if config.train.task != "pretrain":
        return "no tokenizer is needed"
    if not config.data.tokenizer or not Path(config.data.tokenizer).exists():
        return f"data.tokenizer: {config.data.tokenizer or 'none'} is not here, so its size was not checked"
    size = open_tokenizer(config).vocab_size
    return f"data.tokenizer: {size} pieces, as the embedding has rows"


def export_weights(workdir: Path, form: Form, folder: Path, *, dtype: str, shard_gb: float) -> None:
    """Write the newest checkpoint of a work directory as files of `form`."""
    if shard_gb <= 0:
        raise WeightsError(f"--shard_gb: got {shard_gb}, wanted more than 0")
    config = load_config(workdir)
    parameters = open_parameters(workdir)
    rows = table(form, config.model, config.decoder)
    wanted = DTYPES[dtype]
    stored = {parameters[row.path].dtype for row in rows.rows if row.path in parameters}
    files_dtype = wanted or (stored.pop() if len(stored) == 1 else None)
    total = sum(math.prod(shape) for shape in official_shapes(form, config.model, config.decoder).values())
    with _progress("export", total * (files_dtype or np.dtype(np.float32)).itemsize) as advance:
        names = export(
            parameters,
            rows,
            folder,
            dtype=wanted,
            shard_bytes=round(shard_gb * 1e9),
            config=_file_config(form, config, files_dtype or np.dtype(np.float32)),
            progress=advance,
        )
    print(f"{folder}: {len(names)} files, {total:,} parameters in form {form}")


def _file_config(form: Form, config: ExperimentConfig, dtype: np.dtype) -> dict[str, Any] | None:
    """The config.json beside the files of a form; None where there is none."""
    if form == "unet":
        return unet_json(config.decoder.unet)
    if form == "vae":
        return vae_json(config.decoder.vae, config.decoder.latent_scale)
    return hugging_face_config(form, config.model, dtype)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes; gives the function that advances it."""
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        yield lambda nbytes: (bar.update(nbytes), None)[1]
