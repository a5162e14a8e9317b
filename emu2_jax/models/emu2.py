"""Emu2: visual encoder, connector and language model as one network, and its pretraining task."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from emu2_jax import losses as objective_lib
from emu2_jax import shards
from emu2_jax.config import ExperimentConfig, ModelConfig, ObjectiveConfig, VisionConfig
from emu2_jax.models import attention, eva_vit, layers, llama
from emu2_jax.task import Batch, Losses, Params, Term


class Emu2(nnx.Module):
    """The four parts. Their attribute names are the top-level keys of the parameter tree."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        visual_width, width = config.vision.width, config.language.width
        self.visual_encoder = eva_vit.VisualEncoder(config.vision, rngs=rngs)
        self.project_up = layers.Projection(visual_width, width, rngs=rngs)
        self.language_model = llama.LanguageModel(config.language, rngs=rngs)
        self.project_down = layers.Projection(width, visual_width, rngs=rngs)


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Random parameters, float32, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(Emu2(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def merge(config: ModelConfig, params: Params) -> Emu2:
    """The network with these parameters, to be used inside a traced function."""
    return nnx.merge(_graphdef(config), params)


@functools.cache
def _graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Emu2(config, rngs=nnx.Rngs(params=0))))


def init_visual_encoder(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Random parameters of the visual encoder alone (the decoder trains without a language model in memory)."""
    return nnx.to_pure_dict(nnx.state(eva_vit.VisualEncoder(config.vision, rngs=nnx.Rngs(params=key)), nnx.Param))


def encode_images(
    config: ModelConfig, visual_encoder_params: Params, images: UInt8[Array, "I S S 3"]
) -> Float[Array, "I N E"]:
    """Pooled visual embeddings of 8-bit RGB images, float32, no gradient.

    Images of another size than the encoder's are resized (bicubic, antialiased) as the release does.
    """
    size = config.vision.image_size
    if images.shape[1] != size:
        resized = jax.image.resize(images.astype(jnp.float32), (images.shape[0], size, size, 3), "bicubic")
        images = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
    embeddings = encode_normalized(config, visual_encoder_params, eva_vit.normalize(images))
    return jax.lax.stop_gradient(embeddings)


def encode_normalized(
    config: ModelConfig, visual_encoder_params: Params, images: Float[Array, "I S S 3"]
) -> Float[Array, "I N E"]:
    """Pooled visual embeddings of normalised images, float32."""
    encoder: eva_vit.VisualEncoder = nnx.merge(_encoder_graphdef(config.vision), visual_encoder_params)
    remat = config.vision_remat or config.remat
    embeddings = encoder(images.astype(jnp.dtype(config.compute_dtype)), remat=remat, kernel=config.attention)
    return eva_vit.pool(embeddings, config.num_visual_tokens).astype(jnp.float32)


@functools.cache
def _encoder_graphdef(config: VisionConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: eva_vit.VisualEncoder(config, rngs=nnx.Rngs(params=0))))


def interleave(
    token_embeddings: Float[Array, "B T D"],
    visual_inputs: Float[Array, "B X D"],
    is_visual: Array,
    visual_index: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Put the row's visual inputs (X = image slots x N) in the places of its visual positions."""
    gathered = jnp.take_along_axis(visual_inputs, visual_index[:, :, None], axis=1)
    return jnp.where(is_visual[:, :, None], gathered, token_embeddings)


class PretrainTask:
    """Next-element prediction over packed rows (`task.Task`). Terms: `text`, `regression`, `image_end`."""

    rows_are_independent = True

    def __init__(self, config: ExperimentConfig, *, image_start_id: int, image_end_id: int) -> None:
        self.model = config.model
        self.objective: ObjectiveConfig = config.objective
        self.image_start_id = image_start_id
        self.image_end_id = image_end_id
        self.encoder_is_frozen = "visual_encoder" in config.optimizer.frozen
        self.coefficients: Mapping[str, float] = _coefficients(config.objective)

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters of all four parts."""
        return init(self.model, key)

    def _targets(self, batch: Batch) -> objective_lib.Targets:
        return objective_lib.next_elements(
            batch, self.objective, image_start_id=self.image_start_id, image_end_id=self.image_end_id
        )

    def term_weights(self, batch: Batch) -> Mapping[str, Float[Array, ""]]:
        """How many positions of the batch carry each term."""
        targets = self._targets(batch)
        weights = {
            "text": targets.text_weights.sum(),
            "regression": targets.visual_weights.sum(),
            "image_end": targets.image_end_weights.sum(),
        }
        return {name: weights[name] for name in self.coefficients}

    def losses(self, params: Params, batch: Batch, key: PRNGKeyArray) -> Losses:
        """Both terms from one forward pass."""
        embeddings = self.visual_embeddings(params, batch)
        hidden = self.hidden(params, batch, embeddings, key)
        targets = self._targets(batch)
        head = llama.output_head(params["language_model"])
        block = self.objective.vocab_block_positions
        text = objective_lib.cross_entropy(hidden, head, targets.tokens, targets.text_weights, block_positions=block)
        terms = {"text": text.loss}
        metrics = {"text_accuracy": text.correct}
        if "regression" in self.coefficients:
            regression_terms, regression_metrics = self._regression(params, batch, hidden, embeddings, targets)
            terms |= regression_terms
            metrics |= regression_metrics
        return Losses(terms={name: terms[name] for name in self.coefficients}, metrics=metrics)

    def visual_embeddings(self, params: Params, batch: Batch) -> Float[Array, "B X E"]:
        """Pooled encoder embeddings of the row's image slots, X = M x N; zeros in empty slots. float32.

        The batch has either images, or embeddings that were worked out beforehand.
        """
        if "embeddings" in batch:
            stored: Float[Array, "B M N E"] = batch["embeddings"]
            rows, slots, num, width = stored.shape
            if slots == 0:
                return jnp.zeros((rows, 1, width), jnp.float32)
            masked = stored.astype(jnp.float32) * batch["image_mask"][:, :, None, None]
            return jax.lax.stop_gradient(masked.reshape(rows, slots * num, width))
        images: UInt8[Array, "B M S S 3"] = batch["images"]
        rows, slots, size = images.shape[:3]
        num, width = self.model.num_visual_tokens, self.model.vision.width
        if slots == 0:
            return jnp.zeros((rows, 1, width), jnp.float32)  # one row that nothing reads: gathers need an operand
        flat = eva_vit.normalize(images.reshape(rows * slots, size, size, 3))
        embeddings = encode_normalized(self.model, params["visual_encoder"], flat)
        embeddings = embeddings.reshape(rows, slots, num, width) * batch["image_mask"][:, :, None, None]
        embeddings = embeddings.reshape(rows, slots * num, width)
        return jax.lax.stop_gradient(embeddings) if self.encoder_is_frozen else embeddings

    def hidden(
        self, params: Params, batch: Batch, embeddings: Float[Array, "B X E"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states (after the final norm) of every position; `key` draws the visual input noise, if any."""
        dtype = jnp.dtype(self.model.compute_dtype)
        model = merge(self.model, params)
        if self.objective.visual_input_noise and key is not None:
            scale = self.objective.visual_input_noise * jax.lax.stop_gradient(embeddings.std(axis=-1, keepdims=True))
            keys = shards.row_keys(key, len(embeddings))
            embeddings = embeddings + scale * jax.vmap(lambda own: jax.random.normal(own, embeddings.shape[1:]))(keys)
        visual_inputs = model.project_up(embeddings.astype(dtype))
        tokens = model.language_model.embed(batch["tokens"], dtype)
        x = interleave(tokens, visual_inputs, batch["is_visual"], batch["visual_index"])
        mask = attention.Packed(batch["segment_ids"])
        remat, kernel = self.model.remat, self.model.attention
        return model.language_model(x, batch["positions"], mask, remat=remat, kernel=kernel)

    def _regression(
        self,
        params: Params,
        batch: Batch,
        hidden: Float[Array, "B T D"],
        embeddings: Float[Array, "B X E"],
        targets: objective_lib.Targets,
    ) -> tuple[dict[str, Term], dict[str, Term]]:
        predicted = layers.product(hidden, params["project_down"]["kernel"].astype(hidden.dtype))
        target = jnp.take_along_axis(embeddings, targets.visual_index[:, :, None], axis=1)
        sums = objective_lib.regression(predicted, target, targets.visual_weights)
        cosine_loss = self.objective.regression_cosine_weight * (sums.cosine.weight - sums.cosine.sum)
        terms = {"regression": Term(sums.squared_error.sum + cosine_loss, sums.squared_error.weight)}
        if "image_end" in self.coefficients:
            # Emu1 regresses in the language model's width, Emu2 in the encoder's: the [/IMG] target has no encoder
            # embedding, so this one is compared after `project_up`, where the prediction would be fed back.
            fed_back = layers.product(predicted, params["project_up"]["kernel"].astype(predicted.dtype))
            image_end = params["language_model"]["token_embedding"][self.image_end_id]
            end_target = jnp.broadcast_to(image_end, fed_back.shape)
            terms["image_end"] = objective_lib.regression(fed_back, end_target, targets.image_end_weights).squared_error
        metrics = {
            "regression_mse": sums.squared_error,
            "regression_cosine": sums.cosine,
            "regression_norm_ratio": sums.norm_ratio,
        }
        return terms, metrics

    def model_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Model FLOPs of one step (`task.Task.model_flops`), from the widths alone."""
        rows, length = batch_shapes["tokens"]
        slots = batch_shapes["image_mask"][1]
        vision, language = self.model.vision, self.model.language
        patches = vision.grid_size**2 + 1
        vision_matrices = vision.num_layers * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
        vision_attention = vision.num_layers * 4 * patches**2 * vision.width
        patch_embedding = 2 * (patches - 1) * 3 * vision.patch_size**2 * vision.width
        encoder = rows * slots * (2 * patches * vision_matrices + vision_attention + patch_embedding)
        query_width, key_value_width = (n * language.head_width for n in (language.num_heads, language.num_kv_heads))
        language_matrices = language.num_layers * (
            language.width * (2 * query_width + 2 * key_value_width) + 3 * language.width * language.mlp_width
        )
        head = language.width * language.vocab_size
        causal_attention = language.num_layers * 2 * length * query_width
        decoder = rows * length * (2 * (language_matrices + head) + causal_attention)
        projections = 2 * language.width * vision.width * rows * slots * self.model.num_visual_tokens
        if "regression" in self.coefficients:
            projections += 2 * language.width * vision.width * rows * length
        if "image_end" in self.coefficients:
            projections += 2 * language.width * vision.width * rows * length
        passes = 0 if "embeddings" in batch_shapes else 1 if self.encoder_is_frozen else 3
        return passes * encoder + 3 * (decoder + projections)


def _coefficients(objective: ObjectiveConfig) -> dict[str, float]:
    """Loss terms that are computed at all, with their weights in the total."""
    coefficients = {"text": objective.text_loss_weight}
    if objective.regression_loss_weight:
        coefficients["regression"] = objective.regression_loss_weight
        if objective.regress_image_end:
            coefficients["image_end"] = objective.regression_loss_weight
    return coefficients
