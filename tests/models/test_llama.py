"""The language model against a float64 NumPy one that was written from the description of LLaMA alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from emu2_jax.config import LanguageConfig
from emu2_jax.models import llama

CONFIG: LanguageConfig = tiny.CONFIG.model.language
RTOL, ATOL = 1e-4, 2e-5
ROWS, LENGTH = 2, 6


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What could be wrong and would still train; the default is the right thing."""

    interleaved_rotary: bool = False
    no_rotary: bool = False
    rope_base: float = 10000.0
    post_norm: bool = False
    layer_norm: bool = False
    epsilon: float = 1e-6
    relu: bool = False
    up_is_gated: bool = False
    key_heads_in_turn: bool = False
    no_final_norm: bool = False

    def __str__(self) -> str:
        return next(name for name, value in vars(self).items() if value != getattr(Mistake, name))


def rms_norm(x: np.ndarray, scale: np.ndarray, mistake: Mistake) -> np.ndarray:
    if mistake.layer_norm:
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + mistake.epsilon) * scale


def rotate(x: np.ndarray, positions: np.ndarray, mistake: Mistake) -> np.ndarray:
    """T x K; channel pair number i turns by position / base^(2 i / K)."""
    if mistake.no_rotary:
        return x
    width = x.shape[1]
    out = np.empty_like(x)
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if mistake.interleaved_rotary else (i, i + width // 2)
        angle = positions / mistake.rope_base ** (2 * i / width)
        out[:, a] = x[:, a] * np.cos(angle) - x[:, b] * np.sin(angle)
        out[:, b] = x[:, b] * np.cos(angle) + x[:, a] * np.sin(angle)
    return out


def attention(x: np.ndarray, params: Any, positions: np.ndarray, mask: np.ndarray, mistake: Mistake) -> np.ndarray:
    out = np.zeros_like(x)
    shared = CONFIG.num_heads // CONFIG.num_kv_heads
    for head in range(CONFIG.num_heads):
        key_head = head % CONFIG.num_kv_heads if mistake.key_heads_in_turn else head // shared
        q = rotate(x @ params["q"][:, head], positions, mistake)
        k = rotate(x @ params["k"][:, key_head], positions, mistake)
        scores = np.where(mask, q @ k.T / np.sqrt(CONFIG.head_width), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out += weights @ (x @ params["v"][:, key_head]) @ params["out"][head]
    return out


def mlp(x: np.ndarray, params: Any, mistake: Mistake) -> np.ndarray:
    gate, up = x @ params["gate"], x @ params["up"]
    if mistake.up_is_gated:
        gate, up = up, gate
    activation = np.maximum(gate, 0.0) if mistake.relu else gate / (1.0 + np.exp(-gate))
    return (activation * up) @ params["down"]


def reference(
    x: np.ndarray, params: Any, positions: np.ndarray, mask: np.ndarray, mistake: Mistake = Mistake()
) -> np.ndarray:
    """Hidden states after the final norm of one row: T x D."""
    for number in range(CONFIG.num_layers):
        block = jax.tree.map(lambda leaf, number=number: leaf[number], params["blocks"]["layers"])
        before_attention, before_mlp = block["attention_norm"]["scale"], block["mlp_norm"]["scale"]
        if mistake.post_norm:
            x = x + rms_norm(attention(x, block["attention"], positions, mask, mistake), before_attention, mistake)
            x = x + rms_norm(mlp(x, block["mlp"], mistake), before_mlp, mistake)
        else:
            x = x + attention(rms_norm(x, before_attention, mistake), block["attention"], positions, mask, mistake)
            x = x + mlp(rms_norm(x, before_mlp, mistake), block["mlp"], mistake)
    return x if mistake.no_final_norm else rms_norm(x, params["final_norm"]["scale"], mistake)


def build(key: jax.Array) -> llama.LanguageModel:
    return llama.LanguageModel(CONFIG, rngs=nnx.Rngs(params=key))


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny.random_parameters(lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param)))


@pytest.fixture(scope="module")
def graphdef() -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(ROWS, LENGTH, CONFIG.width)).astype(np.float32)


#: Not 0, 1, 2, ...: positions are what they are given, and differ from row to row.
POSITIONS = np.array([[0, 1, 2, 3, 4, 5], [7, 8, 9, 40, 41, 42]], np.int32)
MASK = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (ROWS, LENGTH, LENGTH))


@pytest.fixture(scope="module")
def hidden(graphdef: nnx.GraphDef, params: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(
        jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, jnp.asarray(POSITIONS), jnp.asarray(MASK)))(params, x)
    )


def references(x: np.ndarray, params: Any, mistake: Mistake = Mistake()) -> np.ndarray:
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    rows = zip(x.astype(np.float64), POSITIONS, MASK, strict=True)
    return np.stack([reference(row, params, positions, mask, mistake) for row, positions, mask in rows])


def test_forward_agrees_with_the_reference(x: np.ndarray, params: Any, hidden: np.ndarray) -> None:
    np.testing.assert_allclose(hidden, references(x, params), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "mistake",
    [
        Mistake(interleaved_rotary=True),
        Mistake(no_rotary=True),
        Mistake(rope_base=9000.0),
        Mistake(post_norm=True),
        Mistake(layer_norm=True),
        Mistake(epsilon=1e-3),
        Mistake(relu=True),
        Mistake(up_is_gated=True),
        Mistake(key_heads_in_turn=True),
        Mistake(no_final_norm=True),
    ],
    ids=str,
)
def test_the_tolerance_is_tight_enough_to_see(mistake: Mistake, x: np.ndarray, params: Any, hidden: np.ndarray) -> None:
    assert not np.allclose(hidden, references(x, params, mistake), rtol=RTOL, atol=ATOL)


def test_logits_are_float32_products_with_the_untied_head(graphdef: nnx.GraphDef, params: Any) -> None:
    hidden = np.random.default_rng(3).normal(size=(2, CONFIG.width)).astype(np.float32)
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(model.logits(jnp.asarray(hidden)), hidden @ params["head"], rtol=1e-4, atol=1e-5)
    assert model.logits(jnp.asarray(hidden, jnp.bfloat16)).dtype == jnp.float32


def test_transformers_agrees_with_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its LLaMA (grouped queries, heads of another width, tied head) by its golden file."""
    case = goldens.CASES["llama_grouped_tied"]
    golden = goldens.load(case)
    monkeypatch.setitem(globals(), "CONFIG", case.language)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), golden.params)
    length = golden.inputs["tokens"].shape[1]
    positions, mask = np.arange(length), np.tril(np.ones((length, length), bool))
    mistake = Mistake(rope_base=case.language.rope_base)
    for tokens, hidden, logits in zip(
        golden.inputs["tokens"], golden.forward["hidden"], golden.forward["logits"], strict=True
    ):
        expected = reference(params["token_embedding"][tokens], params, positions, mask, mistake)
        np.testing.assert_allclose(hidden, expected, rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(logits, expected @ params["token_embedding"].T, rtol=RTOL, atol=ATOL)


def test_the_parameters_are_those_of_the_description(params: Any) -> None:
    """No bias anywhere, an untied head, two key/value heads for four query heads."""
    assert jax.tree.map(np.shape, params) == {
        "token_embedding": (48, 32),
        "blocks": {
            "layers": {
                "attention_norm": {"scale": (2, 32)},
                "attention": {"q": (2, 32, 4, 8), "k": (2, 32, 2, 8), "v": (2, 32, 2, 8), "out": (2, 4, 8, 32)},
                "mlp_norm": {"scale": (2, 32)},
                "mlp": {"gate": (2, 32, 56), "up": (2, 32, 56), "down": (2, 56, 32)},
            }
        },
        "final_norm": {"scale": (32,)},
        "head": (32, 48),
    }


def test_the_release_sizes_are_the_defaults() -> None:
    config = LanguageConfig()
    assert (config.width, config.num_layers, config.mlp_width, config.vocab_size) == (6656, 60, 17920, 32272)
    assert config.num_heads == config.num_kv_heads == 52
    assert config.head_width == 128
    assert (config.rms_norm_epsilon, config.rope_base) == (1e-6, 10000.0)
