"""`python -m benchmarks.pods CASE...`: what the TPU compiler says of the step on whole slices, without one.

`lm33b-*` is the language model alone, in the shapes in which MaxText's LLaMA-33B was compiled beside it: 60 layers,
width 6656, 52 heads, MLP 17920, vocabulary 32256 (Emu2's own is 32272), rows of 2048, AdamW with float32 parameters and
moments. It is stage 2's step on rows of text: the encoder is left at one layer, frozen, and never runs.
`stage*` are the stages of the paper whole, on rows of 2048 positions with 24 image slots or as many as the name says.

The figures are deterministic for a release of jax and libtpu; nothing is timed but the compiler.
"""

from __future__ import annotations

from emu2_jax.pods import topologies

# Before jax is imported, and with it most of what follows.
if __name__ == "__main__":
    import sys

    from emu2_jax.errors import UserError

    try:
        topologies.compile_only()
    except UserError as missing:
        sys.exit(f"benchmarks.pods: {missing}")

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emu2_jax import overrides
from emu2_jax.config import (
    DataConfig,
    ExperimentConfig,
    LanguageConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    Remat,
    SourceConfig,
    VisionConfig,
    validate,
)
from experiments import plan as plan_lib
from experiments import pretrain


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step on a slice: what is trained, and how."""

    config: ExperimentConfig
    topology: str
    rows_per_chip: int
    remat: Remat
    vision_remat: Remat | None = None
    data: int = 1  #: copies of the parameters


def _language_model() -> ExperimentConfig:
    base = pretrain.stage2()
    vision = VisionConfig(image_size=28, width=512, num_layers=1, num_heads=8, mlp_width=512)
    return dataclasses.replace(
        base,
        name="lm33b",
        model=ModelConfig(vision=vision, language=LanguageConfig(vocab_size=32256), num_visual_tokens=1),
        objective=ObjectiveConfig(regression_loss_weight=0.0),
        data=_rows_of(base.data, "text", 0),
        optimizer=dataclasses.replace(base.optimizer, frozen=("visual_encoder", "project_down")),
    )


def _rows_of(data: DataConfig, kind: str, image_slots: int) -> DataConfig:
    source = SourceConfig(name=kind, kind="text" if kind == "text" else "interleaved", shards="none")
    return dataclasses.replace(data, sources=(source,), mixing="mixed", image_slots=image_slots)


def _stage(base: ExperimentConfig, image_slots: int) -> ExperimentConfig:
    return dataclasses.replace(base, data=_rows_of(base.data, "interleaved", image_slots))


CASES: Mapping[str, Case] = {
    "lm33b-v5p-64": Case(
        config=_language_model(), topology="v5p-128", rows_per_chip=4, remat="dots_with_context", data=2
    ),
    "lm33b-v5p-256": Case(
        config=_language_model(), topology="v5p-512", rows_per_chip=4, remat="dots_with_context", data=8
    ),
    "lm33b-v6e-256": Case(
        config=_language_model(), topology="v6e-256", rows_per_chip=2, remat="context", data=4
    ),
    "lm33b-v5e-256": Case(config=_language_model(), topology="v5e-256", rows_per_chip=4, remat="full", data=2),
    "stage1a-v5p-64": Case(
        config=_stage(pretrain.stage1a(), 24), topology="v5p-128", rows_per_chip=2, remat="dots_with_context",
        vision_remat="context", data=2,
    ),
    "stage1b-v5p-64": Case(
        config=_stage(pretrain.stage1b(), 24), topology="v5p-128", rows_per_chip=1, remat="dots_with_context",
        vision_remat="context", data=2,
    ),
    "stage2-v5p-64-12slots": Case(
        config=_stage(pretrain.stage2(), 12), topology="v5p-128", rows_per_chip=2, remat="dots_with_context", data=2
    ),
    "stage2-v5p-64-20slots": Case(
        config=_stage(pretrain.stage2(), 20), topology="v5p-128", rows_per_chip=2, remat="dots_with_context", data=2
    ),
}  # fmt: skip


def run(name: str, flags: list[str], hlo_dir: Path | None) -> dict[str, object]:
    """Compile one case and return its line."""
    case = CASES[name]
    topology = topologies.find(case.topology)
    config = dataclasses.replace(
        case.config,
        model=dataclasses.replace(case.config.model, remat=case.remat, vision_remat=case.vision_remat),
        data=dataclasses.replace(case.config.data, global_batch_rows=case.rows_per_chip * topology.chips),
        mesh=MeshConfig(data=case.data),
    )
    config = validate(overrides.apply(config, overrides.read_sources([], flags))[0])
    try:
        result = plan_lib.plan(config, topology, hlo_dir=None if hlo_dir is None else hlo_dir / name)
    except plan_lib.PlanDoesNotFit as error:
        return {"case": name, "fits": False, "reason": str(error)}
    found = plan_lib.as_dict(result)
    kept = (
        "fits", "us_per_token_chip", "peak_hbm_gib", "compiled_over_model_flops", "matmul_efficiency", "sync_wire_gb",
        "async_wire_gb", "compile_s", "compile_cpu_s", "lower_s", "mesh", "remat", "accumulation_steps", "rows",
    )  # fmt: skip
    seconds = {key: round(value, 4) for key, value in found["estimate"].items() if key.endswith("_s")}
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    line = {"case": name, **{key: rounded[key] for key in kept}, **seconds, "mfu": round(result.estimate.mfu, 4)}
    return {**line, "flags": flags, "jax": found["jax"], "libtpu": found["libtpu"]}


def main() -> None:
    """Print a JSON line per case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (all)")
    parser.add_argument("--hlo", type=Path, metavar="DIR", help="keep the compiled text of each case in DIR/CASE/")
    arguments, flags = parser.parse_known_args()
    for name in arguments.cases:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are: {', '.join(CASES)}")
    for name in arguments.cases or CASES:
        print(json.dumps(run(name, flags, arguments.hlo)), flush=True)


if __name__ == "__main__":
    main()
