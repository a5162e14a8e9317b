"""An Emu2 made of another decoder (LLaMA 3, Qwen2) and another encoder (CLIP): everything that follows from a config.

That these networks compute the right thing is held against transformers and timm (`tests/test_goldens.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, Mesh

from emu2_jax import metrics, optimizer, sharding
from emu2_jax.config import ExperimentConfig, validate
from emu2_jax.errors import WeightsError
from emu2_jax.models import emu2, llama
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.sequence import batch_shapes
from emu2_jax.weights.names import table
from emu2_jax.weights.state_dict import flatten, to_params, to_state_dict

CLIP = dataclasses.replace(
    tiny.CONFIG.model.vision,
    layer_norm_epsilon=1e-5,
    block_norm="pre",
    activation="quick_gelu",
    k_bias=True,
    patch_bias=False,
    input_norm=True,
    final_norm=True,
)
DECODER = dataclasses.replace(
    tiny.CONFIG.model.language, attention_head_width=16, qkv_bias=True, tied_head=True, rope_base=500000.0
)
MODEL = dataclasses.replace(tiny.CONFIG.model, vision=CLIP, language=DECODER)
CONFIG: ExperimentConfig = validate(dataclasses.replace(tiny.CONFIG, model=MODEL))
#: Two captioned pictures.
ROWS: list[list[tiny.Document]] = [[[tiny.BOS, tiny.PICTURE, 5, 6, tiny.EOS]], [[tiny.BOS, 7, tiny.PICTURE, tiny.EOS]]]


@pytest.fixture(scope="module")
def task() -> PretrainTask:
    return PretrainTask(CONFIG, image_start_id=tiny.IMAGE_START, image_end_id=tiny.IMAGE_END)


@pytest.fixture(scope="module")
def shapes(task: PretrainTask) -> Any:
    return jax.eval_shape(task.init, jax.random.key(0))


@pytest.fixture(scope="module")
def params(task: PretrainTask) -> Any:
    return jax.tree.map(jnp.asarray, tiny.random_parameters(task.init))


def test_the_tree_has_what_the_config_says_and_no_more(shapes: Any) -> None:
    default = set(flatten(jax.eval_shape(tiny.task().init, jax.random.key(0))))
    own = set(flatten(shapes))
    norms = {f"visual_encoder/{name}_norm/{leaf}" for name in ("input", "final") for leaf in ("scale", "bias")}
    biases = {f"language_model/blocks/layers/attention/{name}_bias" for name in "qkv"}
    assert own - default == norms | biases | {"visual_encoder/blocks/layers/attention/k_bias"}
    assert default - own == {"language_model/head", "visual_encoder/patch_bias"}
    attention = shapes["language_model"]["blocks"]["layers"]["attention"]
    assert jax.tree.map(np.shape, attention) == {
        "q": (2, 32, 4, 16),
        "k": (2, 32, 2, 16),
        "v": (2, 32, 2, 16),
        "out": (2, 4, 16, 32),
        "q_bias": (2, 4, 16),
        "k_bias": (2, 2, 16),
        "v_bias": (2, 2, 16),
    }


def test_every_parameter_has_a_place_and_only_matrices_decay(shapes: Any) -> None:
    sharding.parameter_shardings(shapes, cast(Mesh, AbstractMesh((2, 4, 2), sharding.AXES)))
    new = {path.rsplit("/", 1)[-1] for path in flatten(shapes) if path.endswith("bias") or "norm" in path}
    assert not new & optimizer.DECAYED


def test_pre_norm_blocks_start_with_the_norm_at_one(task: PretrainTask) -> None:
    encoder = task.init(jax.random.key(0))["visual_encoder"]
    for norm in (encoder["blocks"]["layers"]["mlp_norm"], encoder["input_norm"], encoder["final_norm"]):
        np.testing.assert_array_equal(norm["scale"], np.ones_like(norm["scale"]))


def test_model_flops_are_those_of_the_traced_program(task: PretrainTask, shapes: Any) -> None:
    arrays = batch_shapes(2, tiny.ROW_SHAPE)
    batch = {name: jax.ShapeDtypeStruct(dims, dtype) for name, (dims, dtype) in arrays.items()}
    everything = metrics.count_flops(task.losses, shapes, batch, jax.eval_shape(lambda: jax.random.key(0)))
    attention_width = DECODER.num_heads * 16
    full_attention = 2 * 2 * DECODER.num_layers * 2 * tiny.ROW_SHAPE.length**2 * attention_width
    expected = 3 * (everything - full_attention // 2)
    assert task.model_flops({name: dims for name, (dims, _) in arrays.items()}) == expected


def test_a_tied_head_scores_with_the_token_embedding_and_both_uses_train_it(task: PretrainTask, params: Any) -> None:
    language = params["language_model"]
    np.testing.assert_array_equal(llama.output_head(language), language["token_embedding"].T)
    hidden = jnp.ones((1, 32))
    logits = emu2.merge(MODEL, params).language_model.logits(hidden)
    np.testing.assert_allclose(logits, hidden @ language["token_embedding"].T, rtol=1e-4, atol=1e-5)

    batch = {name: jnp.asarray(array) for name, array in tiny.pack(ROWS).items()}

    def text_loss(table: jax.Array) -> jax.Array:
        tied = {**params, "language_model": {**language, "token_embedding": table}}
        return task.losses(tied, batch, jax.random.key(0)).terms["text"].sum

    gradient = np.asarray(jax.jit(jax.grad(text_loss))(language["token_embedding"]))
    read = sorted({tiny.BOS, tiny.IMAGE_START, tiny.IMAGE_END, 5, 6, 7, tiny.EOS})
    never_read = sorted(set(range(48)) - set(read))
    assert np.abs(gradient[never_read]).min(axis=-1).max() > 0  # as rows of the head
    assert np.linalg.norm(gradient[read]) > np.linalg.norm(gradient[never_read])


def test_weights_of_the_decoder_go_by_their_official_names(shapes: Any) -> None:
    """Qwen2's biases; no lm_head, and one that a file holds all the same is known."""
    names = table("llama_hf", MODEL)
    language = {"language_model": tiny.random_parameters(lambda _: shapes["language_model"])}
    weights = to_state_dict(language, names)
    assert "lm_head.weight" not in weights
    assert weights["model.layers.1.self_attn.k_proj.bias"].shape == (32,)
    assert weights["model.layers.1.self_attn.o_proj.weight"].shape == (32, 64)
    back = to_params({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, names)
    jax.tree.map(np.testing.assert_array_equal, back, language)


def test_a_table_of_another_family_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"^model\.vision\.k_bias: is True, which no encoder of the EVA-CLIP family"):
        table("eva_timm", MODEL)
