"""PyTorch weights, by their official names, in this package's parameter tree. Gradients go the same way.

By the package's own tables (`emu2_jax.weights`), which these tests so put to the proof.
"""

from __future__ import annotations

from typing import Any

from goldens import Arrays, Case

from emu2_jax.weights.convert import recognise
from emu2_jax.weights.names import table
from emu2_jax.weights.state_dict import to_params


def to_tree(tensors: Arrays, case: Case) -> Any:
    """Arrays by official name as the parameter tree of the case. Raises when a name or a place is left over."""
    if case.kind == "emu2":
        return to_params(tensors, table("emu2", case.model))
    part = {"language": "language_model", "vision": "visual_encoder"}[case.kind]
    form = recognise(list(tensors), case.name)
    return to_params(tensors, table(form, case.model).only([part]))[part]
