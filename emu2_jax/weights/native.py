"""A model from a state dict in the official names, to hold against the original: same inputs, same names.

    from emu2_jax import weights

    model = weights.from_native(state_dict, config)         # config: a ModelConfig, at any size
    model.encode_image(pixels)                              # pooled visual embeddings
    model.hidden_states(tokens, pixels)                     # after the final norm
    model.logits(tokens, pixels)
    losses, gradients = model.losses_and_gradients(tokens, pixels)   # gradients under the names of the state dict

Inputs are the release's: pixels normalised, colours first; tokens with the id of `<image>` where a visual embedding
goes, N of them for each image, in the order of the images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from emu2_jax.config import ExperimentConfig, ModelConfig, ObjectiveConfig
from emu2_jax.errors import WeightsError
from emu2_jax.models.emu2 import PretrainTask, encode_normalized, merge
from emu2_jax.task import Batch, Params
from emu2_jax.weights.names import Form, table
from emu2_jax.weights.state_dict import resolve, to_params, to_state_dict

#: Ids of `[IMG]`, `[/IMG]` and `<image>`. Source: the release's order of special tokens, after LLaMA's 32000 pieces.
IMAGE_START_ID, IMAGE_END_ID, IMAGE_ID = 32001, 32002, 32003


def from_native(
    state_dict: Mapping[str, Num[np.ndarray, "..."]],
    config: ModelConfig,
    *,
    form: Form = "emu2",
    objective: ObjectiveConfig | None = None,
    image_start_id: int = IMAGE_START_ID,
    image_end_id: int = IMAGE_END_ID,
    image_id: int = IMAGE_ID,
) -> NativeModel:
    """The model that a state dict holds, in float32. Give the ids where the vocabulary is not Emu2's.

    `config.compute_dtype` is of the products: "float32" to compare with the original. Raises `WeightsError` that lists
    every tensor that is missing, unexpected or of another shape.
    """
    return NativeModel(state_dict, config, form, objective or ObjectiveConfig(), image_start_id, image_end_id, image_id)


class NativeModel:
    """Emu2 under the official names; see the module."""

    def __init__(
        self,
        state_dict: Mapping[str, Num[np.ndarray, "..."]],
        config: ModelConfig,
        form: Form,
        objective: ObjectiveConfig,
        image_start_id: int,
        image_end_id: int,
        image_id: int,
    ) -> None:
        self.config = config
        self.image_id = image_id
        self._table = table(form, config)
        shapes = {name: np.shape(array) for name, array in state_dict.items()}
        resolution = resolve(self._table, shapes, source="state dict")
        #: Official name -> the name that the state dict has for it.
        self._given = {
            official: given for row, names in resolution.names for official, given in zip(row.names, names, strict=True)
        }
        arrays = {name: np.asarray(array, np.float32) for name, array in state_dict.items()}
        self.params: Params = jax.tree.map(jnp.asarray, to_params(arrays, self._table))
        self._programs = _programs(config, objective, image_start_id, image_end_id)

    def encode_image(self, pixels: Float[Any, "I 3 S S"]) -> Float[Array, "I N E"]:
        """Pooled visual embeddings, before `project_up`, of normalised images."""
        return encode_normalized(self.config, self.params["visual_encoder"], _channels_last(pixels))

    def hidden_states(
        self, tokens: Int[Any, "B T"], pixels: Any = None, attention_mask: Any = None
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. `attention_mask` is 0 on padding, which may stand on either side."""
        batch = self._batch(tokens, pixels, attention_mask, None)
        return self._programs.hidden(self.params, batch)

    def logits(self, tokens: Int[Any, "B T"], pixels: Any = None, attention_mask: Any = None) -> Float[Array, "B T V"]:
        """Scores over the vocabulary at every position, float32."""
        hidden = self.hidden_states(tokens, pixels, attention_mask)
        return merge(self.config, self.params).language_model.logits(hidden)

    def predicted_embeddings(
        self, tokens: Int[Any, "B T"], pixels: Any = None, attention_mask: Any = None
    ) -> Float[Array, "B T E"]:
        """What the regression head (`project_down`) makes of every position."""
        return merge(self.config, self.params).project_down(self.hidden_states(tokens, pixels, attention_mask))

    def losses(
        self, tokens: Int[Any, "B T"], pixels: Any = None, attention_mask: Any = None, loss_weights: Any = None
    ) -> dict[str, float]:
        """`text`: mean cross-entropy, nats; `regression`: mean squared error of visual embeddings.

        Every element after a row's first is a target, with the weight that `loss_weights` (B x T) has at it, 1 by
        default; a term without targets is 0.
        """
        batch = self._batch(tokens, pixels, attention_mask, loss_weights)
        return {name: float(value) for name, value in self._programs.losses(self.params, batch).items()}

    def losses_and_gradients(
        self,
        tokens: Int[Any, "B T"],
        pixels: Any = None,
        attention_mask: Any = None,
        loss_weights: Any = None,
        *,
        text: float = 1.0,
        regression: float = 1.0,
    ) -> tuple[dict[str, float], dict[str, Float[np.ndarray, "..."]]]:
        """The losses, and the gradient of `text` times the one plus `regression` times the other.

        The gradient has the state dict's names and shapes. Targets of the regression carry no gradient.
        """
        batch = self._batch(tokens, pixels, attention_mask, loss_weights)
        losses, gradients = self._programs.gradients(self.params, batch, text, regression)
        named = to_state_dict(jax.device_get(gradients), self._table)
        values = {name: float(value) for name, value in losses.items()}
        return values, {self._given[name]: array for name, array in named.items()}

    def _batch(self, tokens: Any, pixels: Any, attention_mask: Any, loss_weights: Any) -> Batch:
        """Fields of packed rows (`emu2_jax.sequence`), one document a row; `pixels` in place of `images`."""
        tokens = np.asarray(tokens, np.int32)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask, np.int32)
        is_visual = tokens == self.image_id
        side = self.config.vision.image_size
        pixels = np.zeros((0, 3, side, side), np.float32) if pixels is None else np.asarray(pixels, np.float32)
        wanted = len(pixels) * self.config.num_visual_tokens
        if is_visual.sum() != wanted:
            raise WeightsError(
                f"tokens: {is_visual.sum()} of them are <image> ({self.image_id}); wanted {wanted}, "
                f"{self.config.num_visual_tokens} for each of {len(pixels)} images"
            )
        index = np.cumsum(is_visual.reshape(-1)).reshape(tokens.shape) - 1
        return {
            "tokens": tokens,
            "segment_ids": mask,
            "positions": np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32),
            "is_visual": is_visual,
            "visual_index": np.where(is_visual, index, 0).astype(np.int32),
            "loss_weights": np.ones(tokens.shape, np.float32)
            if loss_weights is None
            else np.asarray(loss_weights, np.float32),
            "pixels": np.asarray(_channels_last(pixels)),
        }


class _TaskOnPixels(PretrainTask):
    """The pretraining task on images that are normalised already; every row sees the embeddings of all of them."""

    def visual_embeddings(self, params: Params, batch: Batch) -> Float[Array, "B X E"]:
        pixels, rows = batch["pixels"], batch["tokens"].shape[0]
        if not len(pixels):
            return jnp.zeros((rows, 1, self.model.vision.width), jnp.float32)
        embeddings = encode_normalized(self.model, params["visual_encoder"], pixels)
        flat = embeddings.reshape(1, -1, embeddings.shape[-1])
        return jnp.broadcast_to(flat, (rows, *flat.shape[1:]))


class _Programs(NamedTuple):
    """Compiled functions of (params, batch)."""

    hidden: Callable[[Params, Batch], Array]
    losses: Callable[[Params, Batch], dict[str, Array]]
    gradients: Callable[[Params, Batch, float, float], tuple[dict[str, Array], Params]]


@functools.cache
def _programs(config: ModelConfig, objective: ObjectiveConfig, image_start_id: int, image_end_id: int) -> _Programs:
    """Compiled once for all models of one size."""
    experiment = ExperimentConfig(name="native", model=config, objective=objective)
    task = _TaskOnPixels(experiment, image_start_id=image_start_id, image_end_id=image_end_id)

    def hidden(params: Params, batch: Batch) -> Array:
        return task.hidden(params, batch, task.visual_embeddings(params, batch))

    def losses(params: Params, batch: Batch) -> dict[str, Array]:
        terms = task.losses(params, batch, jax.random.key(0)).terms
        return {name: term.sum / jnp.where(term.weight > 0, term.weight, 1.0) for name, term in terms.items()}

    def total(params: Params, batch: Batch, text: float, regression: float) -> tuple[Array, dict[str, Array]]:
        values = losses(params, batch)
        return text * values["text"] + regression * values.get("regression", jnp.zeros(())), values

    def gradients(params: Params, batch: Batch, text: float, regression: float) -> tuple[dict[str, Array], Params]:
        gradient, values = jax.grad(total, has_aux=True)(params, batch, text, regression)
        return values, gradient

    return _Programs(jax.jit(hidden), jax.jit(losses), jax.jit(gradients))


def _channels_last(pixels: Any) -> Float[Array, "I S S 3"]:
    return jnp.asarray(pixels, jnp.float32).transpose(0, 2, 3, 1)
