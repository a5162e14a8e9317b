"""How far this package is from diffusers: one JSON line per case.

.venv-parity/bin/python tests/parity/measure_diffusers.py              # print the figures of docs/decoder.md
.venv-parity/bin/python tests/parity/measure_diffusers.py --write      # and write their files in tests/golden
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import json

import diffusers_goldens
import goldens
import numpy as np
from diffusers_references import golden


def main() -> None:
    for case in diffusers_goldens.CASES.values():
        print(json.dumps(figures(case)), flush=True)


def figures(case: diffusers_goldens.Case) -> dict[str, object]:
    """Largest differences of a case, and where the largest gradient difference is."""
    reference = golden(case)
    outputs, gradients = diffusers_goldens.run(case, diffusers_goldens.params(case), reference.inputs)
    differences = {name: float(np.abs(outputs[name] - x).max()) for name, x in reference.forward.items()}
    found: dict[str, object] = {"case": case.name, "max_forward_difference": max(differences.values())}
    if case.kind == "sample":
        found |= {"num_steps": case.num_steps, "largest": float(np.abs(reference.forward["sample"]).max())}
    else:
        found["share_of_forward_tolerance"] = max(goldens.forward_differences(reference.forward, outputs).values())
    if case.gradients:
        gradient = goldens.gradient_differences(reference.gradients, gradients)
        worst = max(gradient, key=gradient.__getitem__)
        found |= {"max_gradient_difference": gradient[worst], "of_tensor": worst, "tensors": len(gradient)}
    if "--write" in sys.argv:
        diffusers_goldens.save(case, reference)
    return found


if __name__ == "__main__":
    main()
