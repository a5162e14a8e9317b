"""How far this package is from the reference implementations: one JSON line per case.

.venv-parity/bin/python tests/parity/measure.py              # print the figures of docs/parity.md
.venv-parity/bin/python tests/parity/measure.py --write      # and write tests/golden/*.npz
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import json

import goldens
import numpy as np
from references import LARGER, golden


def main() -> None:
    for case in (*goldens.CASES.values(), *LARGER.values()):
        print(json.dumps(figures(case)), flush=True)


def figures(case: goldens.Case) -> dict[str, object]:
    """Largest differences of a case, and where the largest gradient difference is."""
    reference = golden(case)
    got, gradients = goldens.forward_and_gradients(case, reference.params, reference.inputs)
    forward = goldens.forward_differences(reference.forward, got)
    gradient = goldens.gradient_differences(reference.gradients, gradients)
    worst = max(gradient, key=gradient.__getitem__)
    if "--write" in sys.argv and case.name in goldens.CASES:
        goldens.save(case, reference)
    return {
        "case": case.name,
        "max_forward_difference": float(max(np.abs(got[name] - x).max() for name, x in reference.forward.items())),
        "share_of_forward_tolerance": max(forward.values()),
        "max_gradient_difference": gradient[worst],
        "of_tensor": worst,
        "tensors": len(gradient),
    }


if __name__ == "__main__":
    main()
