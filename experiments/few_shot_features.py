"""Features of images for RICES: pooled embeddings of the run's own encoder, kept on disk, or files that the user names.

A file `queries*.npz` or `support*.npz` holds `keys` (of samples), `features` [images, width] and `encoder` (who made
them, a text). Several together cover the images of their side.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from emu2_jax.errors import DataError
from emu2_jax.evaluation.retrieval import normalised
from experiments.encode import Part

Side = Literal["queries", "support"]
Pixels = UInt8[np.ndarray, "S S 3"]

#: Images of a file that this module writes.
CHUNK = 1024
#: Images that are decoded before they are encoded.
_AT_ONCE = 16


def own_features(
    folder: Path,
    side: Side,
    keys: Sequence[str],
    pixels: Callable[[int], Pixels],
    encode: Callable[[Sequence[Pixels]], Float[np.ndarray, "I N E"]],
    encoder: str,
    images: str,
    part: Part,
) -> Float[np.ndarray, "I E"]:
    """The mean over an image's visual embeddings, of every image; what is in `folder` already is not computed again.

    `images` says which they are: other datasets may have the same keys. Parts begin with different files and take over
    what nobody has done, so that none waits for another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = range(-(-len(keys) // CHUNK))
    own = list(chunks[part.number - 1 :: part.count])
    others = [chunk for chunk in chunks if chunk not in own]
    numbers = {chunk: range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(keys))) for chunk in chunks}

    def is_there(chunk: int) -> bool:
        return _holds(_path(folder, side, chunk), [keys[i] for i in numbers[chunk]], encoder, images)

    missing = [chunk for chunk in (*own, *others) if not is_there(chunk)]
    with tqdm(total=sum(len(numbers[i]) for i in missing), desc=f"features, {side}", unit="image", leave=False) as bar:
        for chunk in missing:
            if not is_there(chunk):  # by now
                found = []
                for start in range(0, len(numbers[chunk]), _AT_ONCE):
                    batch = numbers[chunk][start : start + _AT_ONCE]
                    found.append(encode([pixels(i) for i in batch]).mean(axis=1))
                    bar.update(len(batch))
                own_keys = np.array([keys[i] for i in numbers[chunk]])
                _write(_path(folder, side, chunk), own_keys, np.concatenate(found), encoder, images)
    return normalised(np.concatenate([_read(_path(folder, side, chunk), encoder)[1] for chunk in chunks]))


def named_features(folder: Path, side: Side, keys: Sequence[str], encoder: str) -> Float[np.ndarray, "I E"]:
    """Features of the samples `keys` from the files of a directory, of length 1.

    Raises `DataError` when there are none, when another encoder than `encoder` made them, or a sample has none.
    """
    paths = sorted(folder.glob(f"{side}*.npz"))
    if not paths:
        raise DataError(f"evaluation.few_shot.features: {folder} has no {side}*.npz")
    found_keys: list[str] = []
    found = []
    for path in paths:
        own_keys, features = _read(path, encoder)
        found_keys += own_keys
        found.append(features)
    if len({features.shape[1] for features in found}) > 1:
        raise DataError(f"evaluation.few_shot.features: {folder}: {side}*.npz have features of different widths")
    features = normalised(np.concatenate(found))
    if found_keys == list(keys):
        return features
    rows = {key: row for row, key in enumerate(found_keys)}
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if list(keys).count(key) > 1)
        raise DataError(f"evaluation.few_shot.features: two samples of {side} have the key {twice!r}; keys must differ")
    missing = next((key for key in keys if key not in rows), None)
    if missing is not None:
        raise DataError(f"evaluation.few_shot.features: {folder}: {side}*.npz have none of sample {missing!r}")
    return features[[rows[key] for key in keys]]


def _path(folder: Path, side: Side, chunk: int) -> Path:
    return folder / f"{side}-{chunk:06d}.npz"


def _holds(path: Path, keys: Sequence[str], encoder: str, images: str) -> bool:
    """Whether a file that this module wrote is of these images and this encoder; else it is written anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            of_these = str(file["encoder"]) == encoder and str(file["images"]) == images
            return of_these and file["keys"].tolist() == list(keys)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False


def _write(path: Path, keys: np.ndarray, features: Float[np.ndarray, "I E"], encoder: str, images: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.savez(
            file, keys=keys, features=features.astype(np.float32), encoder=np.array(encoder), images=np.array(images)
        )
    os.replace(partial, path)


def _read(path: Path, encoder: str) -> tuple[list[str], Float[np.ndarray, "I E"]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            keys, features, made_by = file["keys"], file["features"], str(file["encoder"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: wanted an .npz of keys, features and encoder: {error}") from error
    if features.ndim != 2 or len(features) != len(keys):
        raise DataError(f"{path}: has features of shape {features.shape} for {len(keys)} keys; wanted one row each")
    if made_by != encoder:
        raise DataError(
            f"{path}: was made by the encoder {made_by!r}; wanted {encoder!r}. If its features are meant: "
            f"--gin.evaluation.few_shot.features_encoder='{made_by}'"
        )
    return [str(key) for key in keys], features
