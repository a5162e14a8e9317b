"""Generates on one device and on meshes of eight; prints how the answers differ.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/generation/sharded_generation.py

A program of its own because the number of host devices is fixed when jax starts. `test_sharded.py` reads the JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import search_cases

from emu2_jax import sharding
from emu2_jax.config import MeshConfig
from emu2_jax.generation.answer import Wanted
from emu2_jax.generation.generator import Generator
from emu2_jax.generation.prompt import Elements
from emu2_jax.generation.sampling import RELEASE_BEAMS, Sampling

KINDS = {
    "text and images": Wanted(max_tokens=6, forced_images=1, max_images=2),
    "beams": Wanted(max_tokens=6, decoding=RELEASE_BEAMS),
    "draws": Wanted(max_tokens=6, decoding=Sampling(seed=3, top_p=0.9)),
}


def answers(generator: Generator, wanted: Wanted) -> Any:
    found, _ = generator.answer(search_cases.prompts(), wanted)
    return [one.token_ids.tolist() for one in found], np.concatenate([one.embeddings.ravel() for one in found])


def choices(generator: Generator) -> np.ndarray:
    """Log-probabilities of one and of three tokens after each prompt."""
    prompts = search_cases.prompts()
    fitted = [
        [Elements(np.append(one.tokens, more).astype(np.int32), one.visuals) for more in ([5], [6, 7, 8])]
        for one in prompts
    ]
    return generator._weigh(fitted, [len(one) for one in prompts])


def main() -> None:
    assert len(jax.devices()) == 8, "set XLA_FLAGS"
    config, params = search_cases.model()
    one = Generator(config, params, search_cases.Ids(), context=64)
    expected = {kind: answers(one, wanted) for kind, wanted in KINDS.items()}
    weighed = choices(one)
    report: dict[str, Any] = {}
    for mesh in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8)):
        laid = sharding.make_mesh(mesh)
        generator = Generator(config, params, search_cases.Ids(), context=64, mesh=laid)
        up = generator._params["language_model"]["blocks"][0]["mlp"]["up"]
        found: dict[str, Any] = {"share of a weight on a device": up.addressable_shards[0].data.size / up.size}
        for kind, wanted in KINDS.items():
            ids, embeddings = answers(generator, wanted)
            found[kind] = {
                "same ids": ids == expected[kind][0],
                "embeddings": float(np.abs(embeddings - expected[kind][1]).max(initial=0.0)),
            }
        found["choices"] = float(np.abs(choices(generator) - weighed).max())
        report[f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}"] = found
    print(json.dumps(report))


if __name__ == "__main__":
    main()
