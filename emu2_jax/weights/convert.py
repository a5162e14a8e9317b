"""Import: weight files of one or several forms become the parameters of one model, every tensor accounted for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu2_jax.config import DecoderConfig, ModelConfig
from emu2_jax.errors import WeightsError
from emu2_jax.models.eva_vit import resize_position_embedding
from emu2_jax.weights.diffusers_weights import fit_condition
from emu2_jax.weights.files import StoredTensor, Tensors, check_dtypes, open_weights
from emu2_jax.weights.layout import Layout
from emu2_jax.weights.names import FORMS, Form, all_names, table
from emu2_jax.weights.parameters import ComputedParameter, GrownParameter, Parameter, StoredParameter
from emu2_jax.weights.state_dict import flatten, listed, resolve
from emu2_jax.weights.table import Table, numberless

POSITIONS = "visual_encoder/position_embedding"
#: Parameters with an axis of the vocabulary, and which axis it is.
VOCABULARY: Mapping[str, int] = {"language_model/token_embedding": 0, "language_model/head": 1}


@dataclass(frozen=True)
class Source:
    """Opened files to take parts from."""

    path: str
    form: Form
    tensors: Tensors

    @classmethod
    def open(cls, text: str) -> Source:
        """Open `FORM=PATH`, or `PATH` whose form its names tell."""
        form, _, path = text.partition("=")
        if form in FORMS:
            return cls(path, form, open_weights(path))
        if re.fullmatch(r"\w+", form) and path:
            raise WeightsError(f"{text}: {form!r} is none of the forms {', '.join(FORMS)}")
        tensors = open_weights(text)
        return cls(text, recognise(list(tensors), text), tensors)


@dataclass(frozen=True)
class Imported:
    """Parameters found in files, and what has to be said about them."""

    parameters: Mapping[str, Parameter]  #: path -> parameter
    notes: list[str]


def recognise(names: Sequence[str], shown: str) -> Form:
    """The form whose names these are, whatever the number of layers. Raises `WeightsError` when it is none of them."""
    scores = {form: _score(names, all_names(form)) for form in FORMS}
    best = max(scores, key=lambda form: scores[form])
    if scores[best][0] < 0.5:
        raise WeightsError(f"{shown}: its names ({listed(names)}) are of none of the forms {', '.join(FORMS)}")
    return best


def _score(names: Sequence[str], rows: Table) -> tuple[float, float]:
    """Share of `names` that a form has (what it skips counts half), and share of the form's rows among them."""
    official = {numberless(name): row.path for row in rows.rows for name in (row.name, *row.aliases)}
    found = [name for name in names if numberless(name) in official]
    skipped = sum(numberless(name) not in official and rows.skip_reason(name) is not None for name in names)
    present = {official[numberless(name)] for name in found}
    return (len(found) + skipped / 2) / max(1, len(names)), len(present) / len(set(official.values()))


def adapted(form: Form) -> set[str]:
    """Parameters that an import adapts when their size differs: positions, and the vocabulary of a bare LLaMA."""
    return {POSITIONS, *VOCABULARY} if form == "llama_hf" else {POSITIONS}


def import_weights(
    sources: Sequence[Source],
    parts: Sequence[str],
    model: ModelConfig,
    decoder: DecoderConfig | None = None,
    *,
    seed: int = 0,
) -> Imported:
    """The parameters of `parts` that the sources hold, at the size of `model`.

    A U-Net for a condition of another width (SDXL's) is fitted: what multiplies it is drawn anew, by `seed`.

    Parts that no source holds are left to the caller. Raises `WeightsError`, naming file and tensor, when a source
    lacks a tensor, holds one that nobody knows or one of another shape, or when two sources hold the same part.
    """
    parameters: dict[str, Parameter] = {}
    notes: list[str] = []
    owner: dict[str, str] = {}
    for source in sources:
        rows = table(source.form, model, decoder)
        taken = [part for part in rows.parts if part in parts]
        if not taken:
            raise WeightsError(
                f"{source.path}: form {source.form!r} holds {', '.join(rows.parts)}; wanted any of {', '.join(parts)}"
            )
        for part in taken:
            if part in owner:
                raise WeightsError(f"{source.path}: holds {part}, which {owner[part]} holds too; leave one out")
            owner[part] = source.path
        fitted: tuple[str, ...] = ()
        if source.form == "unet":
            unet, key = (decoder or DecoderConfig()).unet, jax.random.key(seed)
            fit = fit_condition(source.tensors, unet, key, source=source.path)
            source, fitted = dataclasses.replace(source, tensors=fit.tensors), fit.notes
        found, said = _import_source(source, rows.taking(taken), model)
        parameters |= found
        notes += [*said, *fitted]
    return Imported(parameters, notes)


def _import_source(source: Source, rows: Table, model: ModelConfig) -> tuple[dict[str, Parameter], list[str]]:
    tensors = source.tensors
    found_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    resolution = resolve(rows, found_shapes, source=source.path, free=adapted(source.form))
    notes = [f"{source.path}: {', '.join(rows.parts)} taken ({source.form})"]
    for reason in dict.fromkeys(resolution.skipped.values()):
        count = list(resolution.skipped.values()).count(reason)
        notes.append(f"{source.path}: {count} tensors skipped: {reason}")
    parameters: dict[str, Parameter] = {}
    for path, pieces in resolution.parameters.items():
        stored = [(row.layout, [tensors[name] for name in names]) for row, names in pieces]
        check_dtypes([tensor for _, of_piece in stored for tensor in of_piece])
        parameters[path], note = _parameter(path, stored, model)
        if note:
            notes.append(note)
    return parameters, notes


def _parameter(
    path: str, pieces: Sequence[tuple[Layout, Sequence[StoredTensor]]], model: ModelConfig
) -> tuple[Parameter, str]:
    layout, (tensor, *_) = pieces[0]  # what may have another shape is one piece
    if tensor.shape == layout.stored_shape:
        return StoredParameter(pieces), ""
    if path == POSITIONS:
        return _resized_positions(layout, tensor)
    axis = VOCABULARY[path]
    rows, width = tensor.shape if len(tensor.shape) == 2 else (0, 0)
    if width != model.language.width or not 0 < rows < model.language.vocab_size:
        raise WeightsError(
            f"{tensor.file}: {tensor.name} is {' x '.join(map(str, tensor.shape))}, wanted at most "
            f"{model.language.vocab_size} x {model.language.width} (model.language.vocab_size x width)"
        )
    stored = StoredParameter([(layout.resized(V=rows), [tensor])])
    grown = GrownParameter(stored, axis, model.language.vocab_size, tensor)
    new = model.language.vocab_size - rows
    return grown, f"{tensor.file}: {tensor.name} has {rows} rows; {new} are added at their mean, for special tokens"


def _resized_positions(layout: Layout, tensor: StoredTensor) -> tuple[Parameter, str]:
    (wanted, width) = layout.our_shape
    have = math.prod(tensor.shape[:-1])
    side = round(max(have - 1, 0) ** 0.5)
    if have < 2 or 1 + side**2 != have or tensor.shape != layout.resized(P=have).stored_shape:
        raise WeightsError(
            f"{tensor.file}: {tensor.name} is {' x '.join(map(str, tensor.shape))}, which is no position embedding of "
            f"a square of patches and CLS, {width} wide"
        )

    def compute() -> np.ndarray:
        old = jnp.asarray(tensor.array().reshape(have, width).astype(np.float32))
        return np.asarray(resize_position_embedding(old, wanted)).astype(tensor.dtype)

    new_side = round((wanted - 1) ** 0.5)
    assert tensor.dtype is not None
    note = f"{tensor.file}: {tensor.name} interpolated from {side} x {side} to {new_side} x {new_side} patches"
    return ComputedParameter(layout.our_shape, tensor.dtype, compute), note


def random_parameters(init: Any, seed: int, parts: Sequence[str]) -> dict[str, Parameter]:
    """Parameters of `parts` as a run with this `train.seed` would draw them, each computed when it is read."""
    key = jax.random.fold_in(jax.random.key(seed), 0)  # as `train.build_program` does
    shapes = flatten(jax.eval_shape(init, key))

    def draw(path: str) -> np.ndarray:
        return np.asarray(jax.jit(lambda key: flatten(init(key))[path])(key))

    return {
        path: ComputedParameter(leaf.shape, np.dtype(leaf.dtype), lambda path=path: draw(path))  # type: ignore[misc]
        for path, leaf in shapes.items()
        if path.split("/")[0] in parts
    }
