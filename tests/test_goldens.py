"""The package against numbers that PyTorch implementations of others gave, and proof that these comparisons can fail.

The files in `tests/golden` hold small models: weights, inputs, outputs, losses and the gradient of every parameter.
`make test-parity` runs the references (transformers, timm) again, `make goldens` writes the files anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import CASES, Case, Golden

from emu2_jax import losses
from emu2_jax.models import emu2, eva_vit, layers, llama

EMU2, GROUPED, CLIP = CASES["emu2"], CASES["llama_grouped_tied"], CASES["clip"]


@pytest.mark.parametrize("name", CASES)
def test_the_package_gives_what_the_reference_gives(name: str) -> None:
    case = CASES[name]
    assert goldens.failures(case, goldens.load(case)) == []


def test_the_whole_model_is_in_its_golden() -> None:
    golden = goldens.load(EMU2)
    assert set(golden.params) == {"visual_encoder", "project_up", "language_model", "project_down"}
    assert (golden.forward["weight_text"], golden.forward["weight_regression"]) == (19.0, 12.0)


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_is_so_small_that_nothing_is_asked_of_it(name: str) -> None:
    """Only that of a k bias without rotary, which is zero."""
    norms = {path: goldens.norm(array) for path, array in goldens.tensors(goldens.load(CASES[name]).gradients).items()}
    floor = goldens.GRADIENT_FLOOR * np.sqrt(sum(value**2 for value in norms.values()))
    small = {path for path, value in norms.items() if value < floor}
    expected = (
        {f"blocks/layers/attention/k_bias[{layer}]" for layer in range(2)} if CASES[name].vision.k_bias else set()
    )
    assert small == expected


def test_positions_that_go_on_in_the_second_document_are_no_mistake() -> None:
    """Rotary positions are relative and documents do not see each other; so this one is not among those below."""
    golden = goldens.load(EMU2)
    going_on = np.broadcast_to(np.arange(golden.inputs["tokens"].shape[1], dtype=np.int32), (2, 24))
    assert outputs_agree(EMU2, changed_inputs(golden, positions=going_on))


def changed_inputs(golden: Golden, **arrays: np.ndarray) -> Golden:
    return dataclasses.replace(golden, inputs=golden.inputs | arrays)


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    """The package remembers what a model of a config looks like; a patched one must neither use that nor leave one."""

    def forget() -> None:
        emu2._graphdef.cache_clear()
        emu2._encoder_graphdef.cache_clear()

    forget()
    yield
    forget()


Patch = pytest.MonkeyPatch
Mistake = Callable[[Patch], None]


def vision(case: Case = EMU2, **settings: Any) -> Case:
    return dataclasses.replace(case, vision=dataclasses.replace(case.vision, **settings))


def language(case: Case = EMU2, **settings: Any) -> Case:
    return dataclasses.replace(case, language=dataclasses.replace(case.language, **settings))


#: What a setting of another value would be.
WRONG_SETTINGS: dict[str, tuple[Case, Case]] = {
    "layer norm epsilon 1e-5": (EMU2, vision(layer_norm_epsilon=1e-5)),
    "layer norm epsilon 1e-7": (EMU2, vision(layer_norm_epsilon=1e-7)),
    "RMS norm epsilon 1e-5": (EMU2, language(rms_norm_epsilon=1e-5)),
    "RMS norm epsilon 1e-8": (EMU2, language(rms_norm_epsilon=1e-8)),
    "pre-norm encoder": (EMU2, vision(block_norm="pre")),
    "quick GELU": (EMU2, vision(activation="quick_gelu")),
    "a k bias": (EMU2, vision(k_bias=True)),
    "rotary base 500000": (EMU2, language(rope_base=500000.0)),
    "rotary base of LLaMA 2 in a LLaMA 3": (GROUPED, language(GROUPED, rope_base=10000.0)),
    "an untied head": (GROUPED, language(GROUPED, tied_head=False)),
    "exact GELU in OpenAI's CLIP": (CLIP, vision(CLIP, activation="gelu")),
    "EVA's epsilon in CLIP": (CLIP, vision(CLIP, layer_norm_epsilon=1e-6)),
}


def outputs_agree(case: Case, golden: Golden) -> bool:
    """Computed operation by operation: what is the same in every mistake is then compiled once."""
    if not goldens.has_parameters(case, golden):
        return False
    with jax.disable_jit():
        return not goldens.forward_failures(golden, goldens.forward(case, golden.params, golden.inputs))


def test_outputs_agree_without_a_mistake() -> None:
    for case in (EMU2, GROUPED, CLIP):
        assert outputs_agree(case, goldens.load(case))


@pytest.mark.parametrize("mistake", WRONG_SETTINGS)
def test_a_wrong_setting_turns_the_golden_red(mistake: str) -> None:
    case, wrong = WRONG_SETTINGS[mistake]
    assert not outputs_agree(wrong, goldens.load(case))


def tanh_gelu(patch: Patch) -> None:
    patch.setattr(eva_vit, "gelu", lambda x: jax.nn.gelu(x, approximate=True))


def norm_around_the_residual(patch: Patch) -> None:
    def call(self: Any, x: jax.Array, kernel: Any = "plain") -> jax.Array:
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.mlp(x))

    patch.setattr(eva_vit.Block, "__call__", call)


def final_norm_on_the_encoder(patch: Patch) -> None:
    encode = eva_vit.VisualEncoder.__call__

    def call(self: Any, images: jax.Array, **how: Any) -> jax.Array:
        x = encode(self, images, **how)
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    patch.setattr(eva_vit.VisualEncoder, "__call__", call)


def encoder_attention(patch: Patch, *, bias_on: str = "qv") -> None:
    def call(self: Any, x: jax.Array, kernel: Any = "plain") -> jax.Array:
        projected = dict(zip("qkv", jnp.moveaxis(jnp.einsum("ipd,dchk->ipchk", x, self.qkv[...]), 2, 0), strict=True))
        for name, bias in zip(bias_on, (self.q_bias[...], self.v_bias[...]), strict=True):
            projected[name] += bias
        return jnp.einsum("iphk,hkd->ipd", layers.attend(**projected), self.out[...]) + self.out_bias[...]

    patch.setattr(eva_vit.Attention, "__call__", call)


def the_q_bias_on_k(patch: Patch) -> None:
    encoder_attention(patch, bias_on="kv")


def biases_in_the_wrong_order(patch: Patch) -> None:
    encoder_attention(patch, bias_on="vq")


def cls_pooled_in(patch: Patch) -> None:
    pool = eva_vit.pool
    patch.setattr(eva_vit, "pool", lambda x, num: pool(jnp.concatenate([x[:, -1:], x[:, :-1]], axis=1), num))


def pooled_column_by_column(patch: Patch) -> None:
    pool = eva_vit.pool
    patch.setattr(eva_vit, "pool", lambda x, num: pool(x, num).reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(-1, 4, 8))


def patches_column_by_column(patch: Patch) -> None:
    patchify = eva_vit.patchify
    patch.setattr(eva_vit, "patchify", lambda images, size: patchify(images.swapaxes(1, 2), size))


def images_scaled_to_one_half(patch: Patch) -> None:
    patch.setattr(eva_vit, "CLIP_MEAN", (0.5, 0.5, 0.5))


def interleaved_rotary(patch: Patch) -> None:
    def rotate(x: jax.Array, positions: jax.Array, *, base: float, **_: bool) -> jax.Array:
        half = x.shape[-1] // 2
        angle = positions[:, :, None, None] * base ** (-jnp.arange(half) / half)
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (even * jnp.cos(angle) - odd * jnp.sin(angle), odd * jnp.cos(angle) + even * jnp.sin(angle))
        return jnp.stack(turned, axis=-1).reshape(x.shape)

    patch.setattr(layers, "rotate", rotate)


def no_rotary(patch: Patch) -> None:
    patch.setattr(layers, "rotate", lambda x, positions, **_: x)


def attention_without_scale(patch: Patch) -> None:
    attend = layers.attend
    patch.setattr(layers, "attend", lambda q, *rest, **more: attend(q * q.shape[-1] ** 0.5, *rest, **more))


def attention_scaled_by_the_residual_width(patch: Patch) -> None:
    """Heads of 4 channels where width / num_heads is 3."""
    attend = layers.attend
    patch.setattr(layers, "attend", lambda q, *rest, **more: attend(q * (4 / 3) ** 0.5, *rest, **more))


def key_heads_in_turn(patch: Patch) -> None:
    """Query head h reads key head h % G instead of h // (H / G)."""
    attend = layers.attend

    def call(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, **more: bool) -> jax.Array:
        turns = jnp.array([0, 2, 1, 3])
        return attend(q[:, :, turns], k, v, mask, **more)[:, :, turns]

    patch.setattr(layers, "attend", call)


def gelu_for_silu(patch: Patch) -> None:
    patch.setattr(jax.nn, "silu", jax.nn.gelu)


def the_other_half_gated(patch: Patch) -> None:
    def call(self: Any, x: jax.Array) -> jax.Array:
        return ((x @ self.gate[...]) * jax.nn.silu(x @ self.up[...])) @ self.down[...]

    patch.setattr(llama.MLP, "__call__", call)


def rms_norm_less_the_mean(patch: Patch) -> None:
    normed = layers.RMSNorm.__call__
    patch.setattr(layers.RMSNorm, "__call__", lambda self, x: normed(self, x - x.mean(-1, keepdims=True)))


def no_final_norm(patch: Patch) -> None:
    def call(self: Any, x: Any, positions: Any, mask: Any, **how: Any) -> jax.Array:
        return self.blocks.scan(lambda block, x, _: (block(x, positions, mask), None), x)[0]

    patch.setattr(llama.LanguageModel, "__call__", call)


def regression_before_the_final_norm(patch: Patch) -> None:
    regression = emu2.PretrainTask._regression

    def call(self: Any, params: Any, batch: Any, hidden: Any, embeddings: Any, targets: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            no_final_norm(inner)
            hidden = self.hidden(params, batch, embeddings)
        return regression(self, params, batch, hidden, embeddings, targets)

    patch.setattr(emu2.PretrainTask, "_regression", call)


def regression_of_the_embedding_at_hand(patch: Patch) -> None:
    """Off by one: visual position k predicts k, not k + 1."""
    following = losses.next_elements

    def call(batch: Any, *rest: Any, **more: Any) -> Any:
        return following(batch, *rest, **more)._replace(visual_index=batch["visual_index"])

    patch.setattr(losses, "next_elements", call)


def regression_one_position_late(patch: Patch) -> None:
    """The first embedding is not predicted at [IMG], and the last visual position predicts once more."""
    following = losses.next_elements

    def call(batch: Any, *rest: Any, **more: Any) -> Any:
        targets = following(batch, *rest, **more)
        return targets._replace(visual_weights=jnp.roll(targets.visual_weights, 1, axis=1))

    patch.setattr(losses, "next_elements", call)


def regression_summed_over_channels(patch: Patch) -> None:
    regression = losses.regression

    def call(*arguments: Any) -> Any:
        sums = regression(*arguments)
        squared = sums.squared_error
        return sums._replace(squared_error=squared._replace(sum=squared.sum * 8))

    patch.setattr(losses, "regression", call)


def the_end_of_an_image_without_loss(patch: Patch) -> None:
    following = losses.next_elements

    def call(batch: Any, objective: Any, **ids: Any) -> Any:
        return following(batch, dataclasses.replace(objective, supervise_image_end=False), **ids)

    patch.setattr(losses, "next_elements", call)


def attention_to_what_follows(patch: Patch) -> None:
    patch.setattr(layers, "packed_causal_mask", lambda ids: ids[:, :, None] == ids[:, None, :])


def attention_to_the_other_document(patch: Patch) -> None:
    patch.setattr(
        layers,
        "packed_causal_mask",
        lambda ids: jnp.broadcast_to(jnp.tril(jnp.ones((24, 24), bool)), (ids.shape[0], 24, 24)),
    )


def token_embeddings_below_the_visual_ones(patch: Patch) -> None:
    interleave = emu2.interleave
    patch.setattr(emu2, "interleave", lambda tokens, *rest: interleave(tokens, *rest) + rest[1][:, :, None] * tokens)


MISTAKES: tuple[tuple[Case, Mistake], ...] = (
    *(
        (EMU2, mistake)
        for mistake in (
            tanh_gelu,
            norm_around_the_residual,
            final_norm_on_the_encoder,
            the_q_bias_on_k,
            biases_in_the_wrong_order,
            cls_pooled_in,
            pooled_column_by_column,
            patches_column_by_column,
            images_scaled_to_one_half,
            interleaved_rotary,
            no_rotary,
            attention_without_scale,
            gelu_for_silu,
            the_other_half_gated,
            rms_norm_less_the_mean,
            no_final_norm,
            regression_before_the_final_norm,
            regression_of_the_embedding_at_hand,
            regression_one_position_late,
            regression_summed_over_channels,
            the_end_of_an_image_without_loss,
            attention_to_what_follows,
            attention_to_the_other_document,
            token_embeddings_below_the_visual_ones,
        )
    ),
    (GROUPED, key_heads_in_turn),
    (GROUPED, attention_scaled_by_the_residual_width),
)


@pytest.mark.parametrize(("case", "mistake"), MISTAKES, ids=[mistake.__name__ for _, mistake in MISTAKES])
def test_a_deliberate_mistake_turns_the_golden_red(case: Case, mistake: Mistake, monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    assert not outputs_agree(case, goldens.load(case))


def test_targets_that_carry_a_gradient_turn_the_golden_red(monkeypatch: Patch) -> None:
    """The one mistake here that no output shows."""
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    differences = goldens.failures(EMU2, goldens.load(EMU2))
    assert differences
    assert all(difference.startswith("gradient of visual_encoder/") for difference in differences)


def test_positions_that_stand_still_over_a_picture_turn_the_golden_red() -> None:
    golden = goldens.load(EMU2)
    positions = golden.inputs["positions"] - np.cumsum(golden.inputs["is_visual"], axis=1, dtype=np.int32)
    assert not outputs_agree(EMU2, changed_inputs(golden, positions=positions))
