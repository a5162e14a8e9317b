"""The language model as files that `transformers` loads with every key matched, and back from files it wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="PyTorch is an optional dependency; make test-parity installs it")
references = pytest.importorskip("references", reason="the parity job's; it loads transformers and timm")

import transformers

from emu2_jax import weights
from emu2_jax.models import emu2
from emu2_jax.weights.convert import Source, import_weights
from emu2_jax.weights.export import export, hugging_face_config
from emu2_jax.weights.parameters import ComputedParameter, read, whole
from emu2_jax.weights.state_dict import flatten, to_state_dict

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied_head": True},
    "tied": {"tied_head": True},
    "wide_heads": {"attention_head_width": 12},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(tmp_path: Path, variant: str) -> None:
    base = tiny.CONFIG.model
    model = dataclasses.replace(base, language=dataclasses.replace(base.language, **VARIANTS[variant]))
    params = tiny.random_parameters(lambda key: emu2.init(model, key))
    flat = flatten(params)
    rows = weights.table("llama_hf", model)
    sources = {path: ComputedParameter(x.shape, x.dtype, lambda x=x: x) for path, x in flat.items()}
    config = hugging_face_config("llama_hf", model, np.dtype(np.float32))
    export(sources, rows, tmp_path / "ours", shard_bytes=20_000, config=config)

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    tokens = np.array([[1, 5, 6, 9, 12, 40, 3, 2]])
    native = weights.from_native(to_state_dict(params, weights.table("emu2", model)), model, image_id=tiny.IMAGE)
    wanted = theirs(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(native.logits(tokens), wanted, rtol=1e-4, atol=2e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_weights([Source.open(str(tmp_path / "theirs"))], ["language_model"], model).parameters
    for path, parameter in imported.items():
        np.testing.assert_array_equal(read(parameter, whole(parameter.shape)), flat[path], err_msg=path)
