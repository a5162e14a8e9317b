"""Released weights, in and out: names, lazy readers, placement on devices, export (docs/weights.md)."""
