"""Released weights, in and out: names, lazy readers, placement on devices, export (docs/weights.md)."""

from emu2_jax.weights.names import FORMS, Form, official_shapes, table
from emu2_jax.weights.native import NativeModel, from_native

__all__ = ["FORMS", "Form", "NativeModel", "from_native", "official_shapes", "table"]
