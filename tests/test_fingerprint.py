from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from emu2_jax.fingerprint import fingerprint


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"a": {"kernel": rng.normal(size=(5, 7)).astype(np.float32)}, "b": np.zeros(3, np.float32)}


def test_equal_parameters_have_equal_fingerprints() -> None:
    assert fingerprint(params()) == fingerprint(params())
    assert len(fingerprint(params())) == 16


def _bit(tree: dict[str, Any]) -> None:
    tree["a"]["kernel"].view(np.uint32)[4, 6] ^= 1


def _swapped(tree: dict[str, Any]) -> None:
    kernel = tree["a"]["kernel"]
    kernel[0, 0], kernel[0, 1] = kernel[0, 1], kernel[0, 0]


def _negative_zero(tree: dict[str, Any]) -> None:
    tree["b"][1] = -0.0


def _reshaped(tree: dict[str, Any]) -> None:
    tree["a"]["kernel"] = tree["a"]["kernel"].reshape(7, 5)


def _renamed(tree: dict[str, Any]) -> None:
    tree["c"] = tree.pop("b")


def _rounded(tree: dict[str, Any]) -> None:
    tree["a"]["kernel"] = jnp.asarray(tree["a"]["kernel"], jnp.bfloat16)


@pytest.mark.parametrize("change", [_bit, _swapped, _negative_zero, _reshaped, _renamed, _rounded])
def test_any_change_shows(change: Any) -> None:
    tree = params()
    change(tree)
    assert fingerprint(tree) != fingerprint(params())
