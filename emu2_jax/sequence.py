"""The packed-row contract: the only thing that the data side and the model share.

A *row* holds several documents, one after the other, on L positions; its images lie apart, in M slots. An image takes
N positions of the row, between `[IMG]` and `[/IMG]`; there the model reads the image's visual embeddings in place of a
token embedding. With N = 2, L = 12, M = 2 the documents "<s> [IMG] v v [/IMG] cat </s>" and "<s> dog </s>" give

    position in row   0    1     2  3  4      5    6     7    8    9    10 11
    element           <s>  [IMG] v  v  [/IMG] cat  </s>  <s>  dog  </s> -  -
    segment_ids       1    1     1  1  1      1    1     2    2    2    0  0
    positions         0    1     2  3  4      5    6     0    1    2    0  0
    is_visual         0    0     1  1  0      0    0     0    0    0    0  0
    visual_index      0    0     0  1  0      0    0     0    0    0    0  0
    loss_weights      1    1     1  1  1      1    1     1    1    1    0  0
    image_mask        1 0                                     (one image in slot 0, slot 1 empty)

`loss_weights[t]` belongs to the element *at* t as a target, predicted from t - 1; the first element of a document is
never a target because its predecessor has another segment id. Position t sees position s when s <= t and both have the
same segment id; padding has segment id 0 and carries no loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static sizes of a packed row."""

    length: int  #: L, positions
    image_slots: int  #: M, images
    visual_tokens: int  #: N, positions that an image takes
    image_size: int  #: pixels, side of a slot's square image
    embedding_width: int | None = None  #: E, where slots hold embeddings worked out beforehand in place of images


#: The fields of a batch of B packed rows: name -> (dtype, shape in the letters B L M S; S = image_size).
FIELDS: Mapping[str, tuple[type, str]] = {
    "tokens": (np.int32, "B L"),  # id; `<image>` (in a video `[gIMG]`) on visual positions, `[PAD]` on padding
    "segment_ids": (np.int32, "B L"),  # 0 = padding, documents count from 1 within the row
    "positions": (np.int32, "B L"),  # rotary positions, restart at 0 in each document
    "is_visual": (np.bool_, "B L"),  # the element is a visual embedding
    "visual_index": (np.int32, "B L"),  # slot * N + k where is_visual, else 0
    "loss_weights": (np.float32, "B L"),  # weight of this element as a target
    "images": (np.uint8, "B M S S 3"),  # RGB, not yet normalised; zeros in empty slots
    "image_mask": (np.bool_, "B M"),  # the slot holds an image
}

#: In place of `images` where they were encoded beforehand (`RowShape.embedding_width`).
EMBEDDINGS: tuple[type, str] = (ml_dtypes.bfloat16, "B M N E")  # what the encoder gives, pooled; zeros in empty slots

SLOT_FIELDS = frozenset({"images", "embeddings"})  #: what is in the slots

Batch = Mapping[str, Any]  # FIELDS as numpy or jax arrays


def batch_shapes(rows: int, shape: RowShape) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and dtype of every field of a batch of `rows` packed rows."""
    sizes = {"B": rows, "L": shape.length, "M": shape.image_slots, "S": shape.image_size, "3": 3}
    fields = dict(FIELDS)
    if shape.embedding_width is not None:
        del fields["images"]
        fields["embeddings"] = EMBEDDINGS
        sizes |= {"N": shape.visual_tokens, "E": shape.embedding_width}
    return {name: (tuple(sizes[axis] for axis in axes.split()), dtype) for name, (dtype, axes) in fields.items()}


def empty_batch(rows: int, shape: RowShape, pad_id: int, *, clear_slots: bool = True) -> dict[str, np.ndarray]:
    """A batch of padding only, to be filled in place.

    Without `clear_slots` the slots hold anything until they are filled or `clear_empty_slots` is called: most of a
    batch's bytes are images, and need not be written twice.
    """
    batch: dict[str, np.ndarray] = {}
    for name, (dims, dtype) in batch_shapes(rows, shape).items():
        batch[name] = np.zeros(dims, dtype) if clear_slots or name not in SLOT_FIELDS else np.empty(dims, dtype)
    batch["tokens"][:] = pad_id
    return batch


def clear_empty_slots(batch: Mapping[str, np.ndarray]) -> None:
    """Zeros in the slots that hold no image."""
    for name in SLOT_FIELDS & batch.keys():
        batch[name][~batch["image_mask"]] = 0
