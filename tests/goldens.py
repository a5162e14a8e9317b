"""What the reference implementations give, and what this package gives: cases, golden files, comparison.

A case is a small model of one kind. The parity job (`make test-parity`) runs the PyTorch reference of every case and
writes its numbers to `tests/golden/*.npz`; `tests/test_goldens.py` holds the package against these files without
PyTorch. The names in a file: `params/...` (this package's tree), `inputs/...`, `forward/...`, `gradients/...`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from emu2_jax.config import (
    ExperimentConfig,
    LanguageConfig,
    ModelConfig,
    ObjectiveConfig,
    VisionConfig,
)
from emu2_jax.models import emu2, eva_vit, layers, llama
from emu2_jax.sequence import RowShape

FOLDER = Path(__file__).parent / "golden"

#: Of hidden states, embeddings, logits and losses, element by element.
RTOL, ATOL = 1e-4, 2e-5
#: Of a tensor's gradient, in norm; and the least norm that counts, as a share of all gradients: where there
#: is no rotary, a bias on k moves all scores of a query alike, so that its gradient is nothing but rounding.
GRADIENT_RTOL, GRADIENT_FLOOR = 1e-4, 1e-5

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what is run of it: all of Emu2, a language model, or a visual encoder."""

    name: str
    kind: Literal["emu2", "language", "vision"]
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vision=self.vision,
            language=self.language,
            num_visual_tokens=4,
            compute_dtype="float32",
            frozen_dtype="float32",
            remat="none",
        )


VISION = VisionConfig(image_size=8, patch_size=2, width=8, num_layers=2, num_heads=2, mlp_width=20)
LANGUAGE = LanguageConfig(vocab_size=38, width=12, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=20)
CLIP = dataclasses.replace(
    VISION,
    layer_norm_epsilon=1e-5,
    block_norm="pre",
    activation="quick_gelu",
    k_bias=True,
    patch_bias=False,
    input_norm=True,
)
CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("emu2", "emu2", VISION, LANGUAGE),
        Case(
            "llama_grouped_tied",
            "language",
            language=dataclasses.replace(
                LANGUAGE, num_heads=4, num_kv_heads=2, attention_head_width=4, rope_base=500000.0, tied_head=True
            ),
        ),
        Case(
            "qwen2",
            "language",
            language=dataclasses.replace(LANGUAGE, num_kv_heads=1, rope_base=1e6, qkv_bias=True),
        ),
        Case("clip", "vision", CLIP),
        Case("open_clip", "vision", dataclasses.replace(CLIP, activation="gelu", final_norm=True)),
        Case("eva_clip_pre_norm", "vision", dataclasses.replace(VISION, block_norm="pre", final_norm=True)),
    )
}

ROW_SHAPE = RowShape(length=24, image_slots=2, visual_tokens=4, image_size=8)
#: Two documents to a row, pictures first, inside and last, one row with a single picture, and padding.
DOCUMENTS: list[list[tiny.Document]] = [
    [[tiny.BOS, tiny.PICTURE, 5, 6, tiny.EOS], [tiny.BOS, 7, 9, tiny.PICTURE, tiny.EOS]],
    [[tiny.BOS, 10, 11, tiny.EOS], [tiny.BOS, 12, tiny.PICTURE, 13, 14, tiny.EOS]],
]


#: Tokens in each of the two sequences that a language model is run on.
LENGTH = 12


def inputs(case: Case, seed: int = 1, length: int = LENGTH) -> Arrays:
    """What the model is run on."""
    rng = np.random.default_rng(seed)
    if case.kind == "emu2":
        return tiny.pack(DOCUMENTS, dataclasses.replace(ROW_SHAPE, image_size=case.vision.image_size), seed)
    if case.kind == "language":
        return {"tokens": rng.integers(0, case.language.vocab_size, (2, length)).astype(np.int32)}
    size, width = case.vision.image_size, case.vision.width
    cotangent = rng.normal(size=(2, 1 + case.vision.grid_size**2, width))
    images = rng.normal(size=(2, size, size, 3))
    return {"images": images.astype(np.float32), "cotangent": cotangent.astype(np.float32)}


def experiment(case: Case) -> ExperimentConfig:
    return dataclasses.replace(
        tiny.CONFIG, model=case.model, objective=ObjectiveConfig(vocab_block_positions=8), name=case.name
    )


def shapes(case: Case) -> Any:
    """The parameter tree of a case, as shapes."""
    return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(_module(case), nnx.Param)))


def _module(case: Case) -> nnx.Module:
    rngs = nnx.Rngs(params=0)
    if case.kind == "emu2":
        return emu2.Emu2(case.model, rngs=rngs)
    if case.kind == "language":
        return llama.LanguageModel(case.language, rngs=rngs)
    return eva_vit.VisualEncoder(case.vision, rngs=rngs)


def _merge(case: Case, params: Any) -> Any:
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: _module(case))), params)


def _forward(case: Case, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that is differentiated, and everything that is compared."""
    if case.kind == "vision":
        encoded = _merge(case, params)(batch["images"])
        return (encoded * batch["cotangent"]).sum(), {"encoded": encoded}
    if case.kind == "language":
        model, tokens = _merge(case, params), batch["tokens"]
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = layers.packed_causal_mask(jnp.ones_like(tokens))
        hidden = model(model.embed(tokens, jnp.dtype("float32")), positions, mask)
        logits = model.logits(hidden)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -logp.mean(), {"hidden": hidden, "logits": logits, "loss": -logp.mean()}
    pretrain = Recording(experiment(case), image_start_id=tiny.IMAGE_START, image_end_id=tiny.IMAGE_END)
    losses = pretrain.losses(params, batch, jax.random.key(0))
    weights = pretrain.term_weights(batch)
    means = {name: term.sum / weights[name] for name, term in losses.terms.items()}
    total = jnp.asarray(sum(pretrain.coefficients[name] * mean for name, mean in means.items()))
    hidden = pretrain.recorded["hidden"] * (batch["segment_ids"] > 0)[:, :, None]
    return total, {
        "embeddings": pretrain.recorded["embeddings"],
        "hidden": hidden,
        "logits": emu2.merge(case.model, params).language_model.logits(hidden),
        **{f"loss_{name}": mean for name, mean in means.items()},
        **{f"weight_{name}": weight for name, weight in weights.items()},
    }


class Recording(emu2.PretrainTask):
    """The task, and what its losses were computed from."""

    def __init__(self, config: ExperimentConfig, **ids: int) -> None:
        super().__init__(config, **ids)
        self.recorded: dict[str, jax.Array] = {}

    def visual_embeddings(self, *arguments: Any) -> jax.Array:
        return self.recorded.setdefault("embeddings", super().visual_embeddings(*arguments))

    def hidden(self, *arguments: Any) -> jax.Array:
        hidden = super().hidden(*arguments)
        self.recorded.setdefault("hidden", hidden)
        return hidden


def forward(case: Case, params: Any, batch: Arrays) -> Arrays:
    """What the package computes."""
    run = jax.jit(lambda params, batch: _forward(case, params, batch)[1])
    return {name: np.asarray(value) for name, value in run(*_on_device((params, batch))).items()}


def forward_and_gradients(case: Case, params: Any, batch: Arrays) -> tuple[Arrays, Any]:
    """The same, and the gradient of the case's loss with respect to every parameter."""
    run = jax.jit(jax.grad(lambda params, batch: _forward(case, params, batch), has_aux=True))
    gradients, outputs = jax.tree.map(np.asarray, run(*_on_device((params, batch))))
    return outputs, gradients


def _on_device(arrays: Any) -> Any:
    return jax.tree.map(jnp.asarray, arrays)


@dataclasses.dataclass(frozen=True)
class Golden:
    """What a reference gave for a case."""

    params: Any
    inputs: Arrays
    forward: Arrays
    gradients: Any


def save(case: Case, golden: Golden) -> None:
    arrays = {
        f"{section}/{path}": array
        for section in ("params", "inputs", "forward", "gradients")
        for path, array in flatten(getattr(golden, section)).items()
    }
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{case.name}.npz", **arrays)


def load(case: Case) -> Golden:
    sections: dict[str, Arrays] = {"params": {}, "inputs": {}, "forward": {}, "gradients": {}}
    with np.load(FOLDER / f"{case.name}.npz") as file:
        for name in file.files:
            section, path = name.split("/", 1)
            sections[section][path] = file[name]
    return Golden(
        params=unflatten(sections["params"]),
        inputs=sections["inputs"],
        forward=sections["forward"],
        gradients=unflatten(sections["gradients"]),
    )


def flatten(tree: Any) -> Arrays:
    """`blocks/layers/mlp/up` -> array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): np.asarray(leaf) for path, leaf in leaves}


def unflatten(arrays: Mapping[str, Any]) -> Any:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def forward_differences(expected: Arrays, got: Arrays) -> dict[str, float]:
    """Largest share of the tolerance that is used, output by output; above 1 they differ. nan counts as infinite."""
    assert set(expected) == set(got)
    shares = {
        name: np.max(np.abs(got[name] - value) / (ATOL + RTOL * np.abs(value))) for name, value in expected.items()
    }
    return {name: float(np.nan_to_num(share, nan=np.inf)) for name, share in shares.items()}


def gradient_differences(expected: Any, got: Any) -> dict[str, float]:
    """Relative difference in norm of each tensor's gradient; the layers of a stack are tensors of their own."""
    expected, got = tensors(expected), tensors(got)
    assert set(expected) == set(got)
    floor = GRADIENT_FLOOR * np.sqrt(sum(float(np.sum(value.astype(np.float64) ** 2)) for value in expected.values()))
    return {
        name: float(np.nan_to_num(norm(got[name] - value) / max(norm(value), floor), nan=np.inf))
        for name, value in expected.items()
    }


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def tensors(tree: Any) -> Arrays:
    """The leaves of a tree, with the layers of a stack apart."""
    apart: Arrays = {}
    for path, array in flatten(tree).items():
        if "/layers/" in path:
            apart |= {f"{path}[{layer}]": value for layer, value in enumerate(array)}
        else:
            apart[path] = array
    return apart


def has_parameters(case: Case, golden: Golden) -> bool:
    """Whether the package's parameter tree is the reference's."""
    return bool(jax.tree.map(np.shape, shapes(case)) == jax.tree.map(np.shape, golden.params))


def failures(case: Case, golden: Golden) -> list[str]:
    """Where the package differs from the reference; empty when it agrees."""
    if not has_parameters(case, golden):
        return ["the parameter tree"]
    outputs, gradients = forward_and_gradients(case, golden.params, golden.inputs)
    relative = gradient_differences(golden.gradients, gradients)
    wrong = [f"gradient of {name}: {value:.3g}" for name, value in relative.items() if value > GRADIENT_RTOL]
    return [*forward_failures(golden, outputs), *wrong]


def forward_failures(golden: Golden, outputs: Arrays) -> list[str]:
    """The outputs that differ, and by how much of the tolerance."""
    shares = forward_differences(golden.forward, outputs)
    return [f"{name}: {share:.3g} x tolerance" for name, share in shares.items() if share > 1]
