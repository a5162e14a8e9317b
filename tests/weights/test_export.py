"""Exported files: what other tools find in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
from tiny_weights import BFLOAT16, CLIP_FORMS, MODEL, model_of

from emu2_jax.config import ModelConfig
from emu2_jax.errors import WeightsError
from emu2_jax.weights import export as export_lib
from emu2_jax.weights.export import export, hugging_face_config
from emu2_jax.weights.files import open_weights
from emu2_jax.weights.names import Form, table
from emu2_jax.weights.parameters import ComputedParameter, Parameter
from emu2_jax.weights.state_dict import flatten, to_state_dict


def computed(tree: Any) -> dict[str, Parameter]:
    return {path: ComputedParameter(x.shape, x.dtype, lambda x=x: x) for path, x in flatten(tree).items()}  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("form", ["emu2", "emu2_hf", "llama_hf", *CLIP_FORMS])
def test_the_library_reads_what_the_index_says(
    tmp_path: Path, params: dict[str, Any], clip_params: dict[str, Any], form: Form, dtype: Any
) -> None:
    cast = jax.tree.map(lambda x: x.astype(dtype), clip_params if form in CLIP_FORMS else params)
    rows = table(form, model_of(form))
    names = export(computed(cast), rows, tmp_path / "out", shard_bytes=5000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    wanted = to_state_dict(cast, rows)
    assert index["weight_map"].keys() == wanted.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == names[: len(files)] == sorted(
        p.name for p in (tmp_path / "out").glob("*.safe*s")
    )
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safetensors.safe_open(tmp_path / "out" / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file}
            for name in opened.keys():  # noqa: SIM118
                np.testing.assert_array_equal(opened.get_tensor(name), wanted[name], err_msg=name, strict=True)
        own = sum(wanted[name].nbytes for name, where in index["weight_map"].items() if where == file)
        assert own <= 5000 or sum(where == file for where in index["weight_map"].values()) == 1


@pytest.mark.parametrize("form", ["emu2", *CLIP_FORMS])
@pytest.mark.parametrize("piece_bytes", [100, 500])
def test_large_tensors_are_written_in_runs(
    tmp_path: Path,
    params: dict[str, Any],
    clip_params: dict[str, Any],
    form: Form,
    piece_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export_lib, "PIECE_BYTES", piece_bytes)
    own = clip_params if form in CLIP_FORMS else params
    rows = table(form, model_of(form))
    export(computed(own), rows, tmp_path / "out")
    opened = open_weights(str(tmp_path / "out"))
    for name, array in to_state_dict(own, rows).items():
        np.testing.assert_array_equal(opened[name].array(), array, err_msg=name, strict=True)


def test_another_dtype_rounds_to_nearest(tmp_path: Path, params: dict[str, Any]) -> None:
    rows = table("llama_hf", MODEL)
    export(computed(params), rows, tmp_path / "out", dtype=BFLOAT16)
    opened = open_weights(str(tmp_path / "out"))
    for name, array in to_state_dict(params, rows).items():
        np.testing.assert_array_equal(opened[name].array(), array.astype(BFLOAT16), err_msg=name, strict=True)


def test_what_cannot_be_exported(tmp_path: Path, params: dict[str, Any]) -> None:
    encoder = {"visual_encoder": params["visual_encoder"]}
    with pytest.raises(WeightsError, match=r"form 'llama_hf' needs parameters that are not there: language_model/"):
        export(computed(encoder), table("llama_hf", MODEL), tmp_path / "out")
    with pytest.raises(WeightsError, match=r"visual_encoder/class_embedding: is \(16,\), the config has \(1792,\)"):
        export(computed(encoder), table("eva_timm", ModelConfig()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_configs_that_go_with_it() -> None:
    emu2 = hugging_face_config("emu2_hf", ModelConfig(), BFLOAT16)
    assert emu2 is not None
    vision = emu2["vision_config"]
    assert int(vision["width"] * vision["mlp_ratio"]) == 15360 and vision["head_width"] == 112
    # As the release's llama_config and class have them.
    official = {
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_attention_heads": 52,
        "num_hidden_layers": 60,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "vocab_size": 32272,
        "d_model": 1792,
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "architectures": ["EmuForCausalLM"],
    }
    assert official.items() <= emu2.items()
    llama = hugging_face_config("llama_hf", MODEL, np.dtype(np.float32))
    assert llama is not None
    assert (llama["architectures"], llama["num_key_value_heads"], llama["torch_dtype"]) == (
        ["LlamaForCausalLM"],
        2,
        "float32",
    )
    assert hugging_face_config("emu2", MODEL, BFLOAT16) is None
    other = dataclasses.replace(MODEL.language, qkv_bias=True, tied_head=True, attention_head_width=12)
    qwen2 = hugging_face_config("llama_hf", dataclasses.replace(MODEL, language=other), BFLOAT16)
    assert qwen2 is not None and qwen2["architectures"] == ["Qwen2ForCausalLM"]
    assert (qwen2["model_type"], qwen2["head_dim"], qwen2["tie_word_embeddings"]) == ("qwen2", 12, True)
