"""The visual encoder against a float64 NumPy one that was written from the description of EVA-02-CLIP-E-plus alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emu2_jax.config import VisionConfig
from emu2_jax.models import emu2, eva_vit

CONFIG: VisionConfig = tiny.CONFIG.model.vision
RTOL, ATOL = 1e-4, 2e-5


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What could be wrong and would still train; the default is the right thing.

    A bias on k is not here: it moves all scores of a query alike, which softmax does not see. The test of the parameter
    shapes does.
    """

    tanh_gelu: bool = False
    pre_norm: bool = False
    norm_around_residual: bool = False
    no_q_bias: bool = False
    final_norm: bool = False
    epsilon: float = 1e-6
    column_order: bool = False

    def __str__(self) -> str:
        return next(name for name, value in vars(self).items() if value != getattr(Mistake, name))


def erf_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, params: dict[str, np.ndarray], epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * params["scale"] + params["bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(x: np.ndarray, params: dict[str, np.ndarray], mistake: Mistake) -> np.ndarray:
    """One image: P x D to P x D, head by head."""
    out = np.zeros_like(x) + params["out_bias"]
    for head in range(CONFIG.num_heads):
        q, k, v = (x @ params["qkv"][:, part, head] for part in range(3))
        q = q if mistake.no_q_bias else q + params["q_bias"][head]
        v = v + params["v_bias"][head]
        weights = softmax(q @ k.T / math.sqrt(CONFIG.width // CONFIG.num_heads))
        out += weights @ v @ params["out"][head]
    return out


def mlp(x: np.ndarray, params: dict[str, np.ndarray], mistake: Mistake) -> np.ndarray:
    gelu = tanh_gelu if mistake.tanh_gelu else erf_gelu
    return gelu(x @ params["up"] + params["up_bias"]) @ params["down"] + params["down_bias"]


def reference(image: np.ndarray, params: Any, mistake: Mistake = Mistake()) -> np.ndarray:
    """Embeddings (CLS first) of one normalised image."""
    size, patch = CONFIG.image_size, CONFIG.patch_size
    corners = [(row, column) for row in range(0, size, patch) for column in range(0, size, patch)]
    if mistake.column_order:
        corners = [(column, row) for row, column in corners]
    patches = np.stack([image[row : row + patch, column : column + patch].reshape(-1) for row, column in corners])
    x = np.concatenate([params["class_embedding"][None], patches @ params["patch_kernel"] + params["patch_bias"]])
    x = x + params["position_embedding"]
    for number in range(CONFIG.num_layers):
        block = jax.tree.map(lambda leaf, number=number: leaf[number], params["blocks"]["layers"])
        for sublayer, norm, inner in (
            (attention, block["attention_norm"], block["attention"]),
            (mlp, block["mlp_norm"], block["mlp"]),
        ):
            if mistake.pre_norm:
                x = x + sublayer(layer_norm(x, norm, mistake.epsilon), inner, mistake)
            elif mistake.norm_around_residual:
                x = layer_norm(x + sublayer(x, inner, mistake), norm, mistake.epsilon)
            else:
                x = x + layer_norm(sublayer(x, inner, mistake), norm, mistake.epsilon)
    if mistake.final_norm:
        x = layer_norm(x, {"scale": np.ones(CONFIG.width), "bias": np.zeros(CONFIG.width)}, mistake.epsilon)
    return x


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny.random_parameters(lambda key: emu2.init_visual_encoder(tiny.CONFIG.model, key))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)


def normalized(images: np.ndarray) -> np.ndarray:
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return (images / 255.0 - mean) / std


@pytest.fixture(scope="module")
def pooled(params: Any, images: np.ndarray) -> np.ndarray:
    """What the package makes of the images: 2 x 4 x 16."""
    return np.asarray(jax.jit(lambda p, x: emu2.encode_images(tiny.CONFIG.model, p, x))(params, jnp.asarray(images)))


def pooled_reference(images: np.ndarray, params: Any, mistake: Mistake = Mistake()) -> np.ndarray:
    """The 4 x 4 patches in 2 x 2 windows, each the mean of its four; no CLS."""
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    return np.stack(
        [
            np.stack([reference(image, params, mistake)[1:][window].mean(0) for window in windows])
            for image in normalized(images)
        ]
    )


def test_forward_agrees_with_the_reference(params: Any, images: np.ndarray, pooled: np.ndarray) -> None:
    np.testing.assert_allclose(pooled, pooled_reference(images, params), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "mistake",
    [
        Mistake(tanh_gelu=True),
        Mistake(pre_norm=True),
        Mistake(norm_around_residual=True),
        Mistake(no_q_bias=True),
        Mistake(final_norm=True),
        Mistake(epsilon=1e-3),
        Mistake(column_order=True),
    ],
    ids=str,
)
def test_the_tolerance_is_tight_enough_to_see(
    mistake: Mistake, params: Any, images: np.ndarray, pooled: np.ndarray
) -> None:
    assert not np.allclose(pooled, pooled_reference(images, params, mistake), rtol=RTOL, atol=ATOL)


def test_timm_agrees_with_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA-02-CLIP-E-plus as timm has it, by its golden file: what was read here is what others read."""
    golden = goldens.load(goldens.CASES["emu2"])
    monkeypatch.setitem(globals(), "CONFIG", goldens.CASES["emu2"].vision)
    images = golden.inputs["images"].reshape(-1, 8, 8, 3)
    expected = pooled_reference(images, golden.params["visual_encoder"]).reshape(2, -1, 8)
    present = np.repeat(golden.inputs["image_mask"], 4, axis=1)[:, :, None]
    np.testing.assert_allclose(golden.forward["embeddings"], expected * present, rtol=RTOL, atol=ATOL)


def test_the_parameters_are_those_of_the_description(params: Any) -> None:
    """No k bias, no final norm, biases on the output and the MLP, one position for CLS and each of the 16 patches."""
    shapes = jax.tree.map(np.shape, params)
    norm = {"scale": (2, 16), "bias": (2, 16)}
    assert shapes == {
        "patch_kernel": (2 * 2 * 3, 16),
        "patch_bias": (16,),
        "class_embedding": (16,),
        "position_embedding": (17, 16),
        "blocks": {
            "layers": {
                "attention": {
                    "qkv": (2, 16, 3, 2, 8),
                    "q_bias": (2, 2, 8),
                    "v_bias": (2, 2, 8),
                    "out": (2, 2, 8, 16),
                    "out_bias": (2, 16),
                },
                "attention_norm": norm,
                "mlp": {"up": (2, 16, 40), "up_bias": (2, 40), "down": (2, 40, 16), "down_bias": (2, 16)},
                "mlp_norm": norm,
            }
        },
    }


def test_the_release_sizes_are_the_defaults() -> None:
    config = VisionConfig()
    assert (config.width, config.num_layers, config.num_heads, config.patch_size) == (1792, 64, 16, 14)
    assert config.mlp_width == int(1792 * 8.571428571428571)
    assert config.layer_norm_epsilon == 1e-6
    assert config.grid_size == 32


def test_normalize() -> None:
    black_and_white = np.stack([np.zeros((1, 1, 3)), np.full((1, 1, 3), 255)]).astype(np.uint8)
    np.testing.assert_allclose(
        eva_vit.normalize(jnp.asarray(black_and_white))[:, 0, 0],
        [[-1.79226253, -1.75209713, -1.48021977], [1.93033625, 2.07488384, 2.14589699]],
        rtol=1e-6,
    )


def test_patchify_reads_row_by_row() -> None:
    """A 4 x 4 image whose red channel counts its pixels; patches of 2 x 2."""
    image = np.zeros((1, 4, 4, 3), np.float32)
    image[0, :, :, 0] = np.arange(16).reshape(4, 4)
    patches = np.asarray(eva_vit.patchify(jnp.asarray(image), 2))
    np.testing.assert_array_equal(patches[0, :, ::3], [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    np.testing.assert_array_equal(patches[0, :, 1::3], np.zeros((4, 4)))


def test_pool_drops_cls_and_averages_windows() -> None:
    embeddings = np.concatenate([[1000.0], np.arange(16.0)]).astype(np.float32).reshape(1, 17, 1)
    np.testing.assert_array_equal(eva_vit.pool(jnp.asarray(embeddings), 4)[0, :, 0], [2.5, 4.5, 10.5, 12.5])
    np.testing.assert_array_equal(eva_vit.pool(jnp.asarray(embeddings), 16)[0, :, 0], np.arange(16.0))
    np.testing.assert_array_equal(eva_vit.pool(jnp.asarray(embeddings), 1)[0, :, 0], [7.5])


def test_images_of_another_size_are_resized_to_the_encoders(params: Any, pooled: np.ndarray) -> None:
    """A picture of one colour stays that colour at any size."""
    encode = jax.jit(lambda p, x: emu2.encode_images(tiny.CONFIG.model, p, x))
    colour = np.array([200, 30, 90], np.uint8)
    small, large = np.broadcast_to(colour, (1, 8, 8, 3)), np.broadcast_to(colour, (1, 20, 20, 3))
    np.testing.assert_allclose(encode(params, jnp.asarray(small)), encode(params, jnp.asarray(large)), atol=1e-5)
