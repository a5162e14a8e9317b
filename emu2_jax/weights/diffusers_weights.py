"""State dicts of diffusers' U-Net and VAE to parameter trees, also of a U-Net that was made for another condition.

SDXL-base becomes Emu2's decoder so: it reads text 2048 wide and a pooled text 1280 wide, Emu2 embeddings 1792 wide and
their mean. What multiplies these has other inputs and is drawn anew; everything else is taken as it is.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from emu2_jax.config import UNetConfig, VAEConfig
from emu2_jax.diffusion.unet import NUM_TIME_IDS
from emu2_jax.errors import WeightsError
from emu2_jax.models import layers
from emu2_jax.task import Params
from emu2_jax.weights.diffusers_names import unet_rows, vae_rows
from emu2_jax.weights.files import StoredTensor, check_dtypes, open_weights
from emu2_jax.weights.state_dict import to_params
from emu2_jax.weights.table import Table

StateDict = Mapping[str, Any]  #: official name -> array, NumPy's or anything that becomes one
T = TypeVar("T", bound="_HasShape")  #: an array or a `StoredTensor`


class _HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


#: What multiplies the condition, and what multiplies the pooled condition together with the micro-conditions.
CONDITION = r".*\.attn2\.to_[kv]\.weight"
POOLED = "add_embedding.linear_1.weight"


@dataclass(frozen=True)
class Fitted(Generic[T]):
    """Tensors that have the shapes of a U-Net, and what was done for that."""

    tensors: Mapping[str, T]
    notes: tuple[str, ...]  #: for the log; empty when everything was taken as it is
    redrawn: tuple[str, ...]  #: names of tensors with random numbers in them


def unet_table(config: UNetConfig) -> Table:
    """Names and layouts of a U-Net of this size."""
    return Table("unet", tuple(unet_rows(config)), ())


def vae_table(config: VAEConfig) -> Table:
    """Names and layouts of a VAE of this size."""
    return Table("vae", tuple(vae_rows(config)), ())


def load_unet(tensors: StateDict | str | Path, config: UNetConfig, *, source: str = "unet") -> Params:
    """The parameters that a state dict holds, or files do, float32.

    Raises `WeightsError` for any tensor that is missing, not known, of another shape or not finite.
    """
    return _load(tensors, unet_table(config), source)["unet"]


def load_vae(tensors: StateDict | str | Path, config: VAEConfig, *, source: str = "vae") -> Params:
    """The same of a VAE."""
    return _load(tensors, vae_table(config), source)["vae"]


def _load(tensors: StateDict | str | Path, table: Table, source: str) -> Params:
    if isinstance(tensors, str | Path):
        source, stored = str(tensors), open_weights(str(tensors))
        check_dtypes(stored.values())
        tensors = {name: tensor.array() for name, tensor in stored.items()}
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise WeightsError(f"{source}: {name} holds numbers that are not finite; get the file again")
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), to_params(arrays, table, source=source))


def fit_condition(
    tensors: Mapping[str, T], config: UNetConfig, key: PRNGKeyArray, *, source: str = "unet"
) -> Fitted[T]:
    """A U-Net made for a condition of another width, fitted to the one of `config`; arrays, or tensors of files.

    Drawn anew with `key`: the keys' and values' products of every cross-attention, whole; of the first product of
    `add_embedding` the inputs that are the pooled condition, while those that are micro-conditions stay. Whatever else
    does not fit is left for the caller to refuse.
    """
    wanted = {name: row.layout.stored_shape for row in unet_table(config).rows for name in row.names}
    kept = NUM_TIME_IDS * config.time_id_width
    fitted, redrawn, widths, notes = dict(tensors), [], set(), []
    for name, tensor in tensors.items():
        new, old = wanted.get(name, ()), tuple(tensor.shape)
        if new == old or len(new) != 2 or len(old) != 2 or new[0] != old[0]:
            continue
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if re.fullmatch(CONDITION, name):
            widths.add(old[1])
            fitted[name] = _redrawn(tensor, own_key, new, kept=0)
        elif name == POOLED and old[1] > kept:
            notes.append(
                f"{source}: {POOLED} reads a pooled condition {old[1] - kept} wide, this U-Net's is {new[1] - kept}: "
                f"these inputs are drawn anew, the {kept} of the micro-conditions kept"
            )
            fitted[name] = _redrawn(tensor, own_key, new, kept=kept)
        else:
            continue
        redrawn.append(name)
    if widths:
        count = sum(name != POOLED for name in redrawn)
        notes.append(
            f"{source}: its cross-attention reads a condition {' and '.join(map(str, sorted(widths)))} wide, this "
            f"U-Net's {config.cross_attention_width}: {count} tensors (*.attn2.to_k, *.attn2.to_v) are drawn anew"
        )
    if notes:
        notes.append(f"{source}: the other {len(fitted) - len(redrawn)} tensors are taken as they are")
    return Fitted(fitted, tuple(notes), tuple(redrawn))


def _redrawn(tensor: Any, key: PRNGKeyArray, shape: tuple[int, int], *, kept: int) -> Any:
    """A random matrix in place of an array or of a file's tensor, whose last `kept` inputs it keeps."""

    def draw(old: np.ndarray) -> np.ndarray:
        outputs, inputs = shape
        new = np.array(layers.kernel_init(key, (inputs, outputs), jnp.float32)).T.astype(old.dtype)
        if kept:
            new[:, -kept:] = old[:, -kept:]
        return new

    if not isinstance(tensor, StoredTensor):
        return draw(np.asarray(tensor))

    def read(start: int, stop: int) -> np.ndarray:
        return draw(tensor.array()).reshape(-1)[start:stop]

    return dataclasses.replace(tensor, shape=shape, read=read)
