"""CLIP's visual encoder as files of its own code, of transformers and of timm: each reads what is written here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import goldens
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is an optional dependency; make test-parity installs it")
references = pytest.importorskip("references", reason="the parity job's; it loads transformers and timm")

import transformers
from timm.models.vision_transformer import checkpoint_filter_fn

from emu2_jax import weights
from emu2_jax.weights.convert import Source, import_weights
from emu2_jax.weights.export import export, hugging_face_config
from emu2_jax.weights.parameters import ComputedParameter, Parameter, read, whole
from emu2_jax.weights.state_dict import flatten, to_state_dict

CLIP, OPEN_CLIP = goldens.CASES["clip"], goldens.CASES["open_clip"]


def stored(case: goldens.Case) -> goldens.Arrays:
    return flatten({"visual_encoder": goldens.load(case).params})


def test_transformers_reads_what_is_written_here(tmp_path: Path) -> None:
    config = dataclasses.replace(CLIP.model, vision=dataclasses.replace(CLIP.vision, final_norm=True))
    rng = np.random.default_rng(0)
    norm = {f"visual_encoder/final_norm/{x}": rng.normal(size=8).astype(np.float32) for x in ("scale", "bias")}
    params = {**stored(CLIP), **norm}
    sources: dict[str, Parameter] = {
        path: ComputedParameter(x.shape, x.dtype, lambda x=x: x)  # type: ignore[misc]
        for path, x in params.items()
    }
    settings = hugging_face_config("clip_hf", config, np.dtype(np.float32))
    export(sources, weights.table("clip_hf", config), tmp_path / "ours", config=settings)
    theirs, info = transformers.CLIPVisionModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    golden = goldens.load(CLIP)
    encoded = theirs(torch.from_numpy(golden.inputs["images"]).permute(0, 3, 1, 2)).last_hidden_state
    np.testing.assert_allclose(encoded.detach().numpy(), golden.forward["encoded"], rtol=1e-4, atol=2e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_weights([Source.open(str(tmp_path / "theirs"))], ["visual_encoder"], config).parameters
    assert imported.keys() == params.keys()
    for path, parameter in imported.items():
        np.testing.assert_array_equal(read(parameter, whole(parameter.shape)), params[path], err_msg=path)


def test_both_towers_as_transformers_writes_them(tmp_path: Path) -> None:
    vision = references.clip(CLIP.vision).config
    text = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    both = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=4)
    )
    both.save_pretrained(tmp_path)
    source = Source.open(str(tmp_path))
    assert source.form == "clip_hf"
    imported = import_weights([source], ["visual_encoder"], CLIP.model).parameters
    assert imported.keys() == stored(CLIP).keys()
    qkv = imported["visual_encoder/blocks/layers/attention/qkv"]
    wanted = both.vision_model.encoder.layers[1].self_attn.k_proj.weight.detach().numpy()
    np.testing.assert_array_equal(read(qkv, whole(qkv.shape))[1, :, 1].reshape(8, 8).T, wanted)


def test_timm_turns_open_clip_s_names_into_its_own_as_the_tables_do() -> None:
    params = {"visual_encoder": goldens.load(OPEN_CLIP).params}
    open_clip = to_state_dict(params, weights.table("clip_open_clip", OPEN_CLIP.model))
    tensors = {name: torch.from_numpy(array) for name, array in open_clip.items()}
    converted = checkpoint_filter_fn(tensors, references.open_clip(OPEN_CLIP.vision))
    wanted = to_state_dict(params, weights.table("vit_timm", OPEN_CLIP.model))
    assert converted.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(converted[name].numpy(), array, err_msg=name, strict=True)


def test_open_clip_s_attention_holds_q_k_and_v_as_pytorch_s_does() -> None:
    """OpenAI's and open_clip's blocks have PyTorch's own attention."""
    names = {name for name, _ in torch.nn.MultiheadAttention(8, 2).named_parameters()}
    prefix = "visual.transformer.resblocks.0.attn."
    shapes = weights.official_shapes("clip_open_clip", OPEN_CLIP.model)
    assert {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)} == names
