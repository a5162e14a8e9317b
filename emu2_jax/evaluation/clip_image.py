"""CLIP-I: the cosine between what CLIP makes of an image and of the redrawn one. Needs CLIP's weights, which the user
has: a file or directory in transformers' names (`clip_hf`) or in OpenAI's and open_clip's (`clip_open_clip`).

Images are squeezed to CLIP's size and normalised with its mean; the embedding is the projected, normed CLS position.
Source: paper table 5 (CLIP-I by ViT-L); CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from emu2_jax.config import EvaluationConfig, ModelConfig, VisionConfig
from emu2_jax.errors import ConfigError, WeightsError
from emu2_jax.models import eva_vit
from emu2_jax.task import Params
from emu2_jax.weights.convert import Source, import_weights
from emu2_jax.weights.parameters import read, whole
from emu2_jax.weights.state_dict import nest

#: Name of the projection of the CLS position, and whether its rows are the outputs, by form.
PROJECTIONS = {"clip_hf": ("visual_projection.weight", True), "clip_open_clip": ("visual.proj", False)}
BATCH = 32


@dataclasses.dataclass(frozen=True)
class ClipImages:
    """CLIP's image tower with its projection; a measure of `autoencoding`."""

    vision: VisionConfig
    params: Params
    projection: Float[Array, "D Q"]

    def embed(self, images: UInt8[np.ndarray, "images S S 3"]) -> Float[np.ndarray, "images Q"]:
        """Embeddings of unit length."""
        parts = [
            np.asarray(_embed(self.vision, self.params, self.projection, jnp.asarray(images[i : i + BATCH])))
            for i in range(0, len(images), BATCH)
        ]
        return np.concatenate(parts)

    def __call__(
        self, originals: UInt8[np.ndarray, "images S S 3"], redrawn: UInt8[np.ndarray, "images S S 3"]
    ) -> Float[np.ndarray, " images"]:
        """The cosine of each image with its redrawn one."""
        return (self.embed(originals) * self.embed(redrawn)).sum(-1)


def _embed(
    vision: VisionConfig, params: Params, projection: Float[Array, "D Q"], images: UInt8[Array, "B S S 3"]
) -> Float[Array, "B Q"]:
    size = vision.image_size
    if images.shape[1] != size:
        resized = jax.image.resize(images.astype(jnp.float32), (len(images), size, size, 3), "bicubic")
        images = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: eva_vit.VisualEncoder(vision, rngs=nnx.Rngs(params=0))))
    encoder: eva_vit.VisualEncoder = nnx.merge(graphdef, params)
    embeddings = encoder(eva_vit.normalize(images))[:, 0] @ projection
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


_embed = jax.jit(_embed, static_argnums=0)


def open_clip(path: str, vision: VisionConfig) -> ClipImages:
    """The image tower that a file or directory holds. Raises `WeightsError` for another model or another size."""
    if not vision.final_norm:
        raise ConfigError("evaluation.clip_vision.final_norm: is False; CLIP's embedding is that of its final norm")
    source = Source.open(path)
    if source.form not in PROJECTIONS:
        raise WeightsError(f"{path}: holds weights of form {source.form}; wanted CLIP's: {', '.join(PROJECTIONS)}")
    model = ModelConfig(vision=vision, num_visual_tokens=1)
    parameters = import_weights([source], ["visual_encoder"], model).parameters
    params = nest({name: read(parameter, whole(parameter.shape)) for name, parameter in parameters.items()})
    name, rows_are_outputs = PROJECTIONS[source.form]
    tensors = source.tensors
    if name not in tensors:
        raise WeightsError(f"{path}: has no {name}: the image tower alone gives no CLIP embedding")
    projection = np.asarray(tensors[name].array(), np.float32)
    in_float32 = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params["visual_encoder"])
    return ClipImages(vision, in_float32, jnp.asarray(projection.T if rows_are_outputs else projection))


def open_measures(config: EvaluationConfig) -> dict[str, ClipImages]:
    """The measures whose weights the config names."""
    return {} if config.clip_weights is None else {"clip_i": open_clip(config.clip_weights, config.clip_vision)}
