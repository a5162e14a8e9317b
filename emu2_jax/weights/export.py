"""Export: parameters as safetensors files under official names, in shards with an index, a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from emu2_jax.config import LanguageConfig, ModelConfig
from emu2_jax.errors import WeightsError
from emu2_jax.weights.files import DTYPES, INDEX_SUFFIX
from emu2_jax.weights.layout import LAYERS, Layout
from emu2_jax.weights.names import Form
from emu2_jax.weights.parameters import Parameter, fill, read
from emu2_jax.weights.state_dict import listed
from emu2_jax.weights.stream import appearing_whole, check_room
from emu2_jax.weights.table import Row, Table

#: Bytes of a tensor that are in memory at once.
PIECE_BYTES = 32 << 20
#: Bytes of a shard, unless told otherwise. Source: `transformers`, which writes shards of at most 5 GB.
SHARD_BYTES = 5_000_000_000
#: Positions that LLaMA was trained on. Source: release `llama_config/config.json`.
MAX_POSITIONS = 2048
BOS_ID, EOS_ID, PAD_ID = 1, 2, 32000  # Source: release `emu/emu.py`

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _Item:
    """One tensor to write, and the parameters that it is made of."""

    name: str
    layer: int | None
    pieces: Sequence[tuple[Layout, Parameter]]
    dtype: np.dtype

    @property
    def layout(self) -> Layout:
        """Of the first piece: of the stored tensor, all say the same."""
        return self.pieces[0][0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.layout.stored_shape) * self.dtype.itemsize


def export(
    parameters: Mapping[str, Parameter],
    rows: Table,
    folder: Path,
    *,
    dtype: np.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Write the rows of a table into `folder`, which appears when all is in it. Returns the names of its files.

    `dtype`: of the files (None: as stored); `shard_bytes`: most bytes of a file, though a tensor is never cut;
    `config`: goes into config.json. Raises `WeightsError` when a parameter is missing or of another shape, when the
    disk is too full, or when there is something in `folder` already.
    """
    items = list(_items(parameters, rows, dtype))
    shards = _shards(items, shard_bytes)
    total = sum(item.nbytes for item in items)
    check_room(folder, total)
    stem = "diffusion_pytorch_model" if rows.form in ("unet", "vae") else "model"
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": total},
        "weight_map": {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard},
    }
    texts = {f"{stem}.safetensors{INDEX_SUFFIX}": index} | ({} if config is None else {"config.json": config})
    with appearing_whole(folder) as temporary:
        for name, shard in zip(names, shards, strict=True):
            with (temporary / name).open("wb") as file:
                _write_safetensors(file, shard, progress)
        for name, content in texts.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [*names, *texts]


def _items(parameters: Mapping[str, Parameter], rows: Table, dtype: np.dtype | None) -> Iterator[_Item]:
    """Every tensor in the order of the table, the tensors of one layer together."""
    lacking = [row.path for row in rows.rows if row.path not in parameters]
    if lacking:
        raise WeightsError(f"form {rows.form!r} needs parameters that are not there: {listed(lacking)}")
    for row in rows.rows:
        parameter = parameters[row.path]
        if tuple(parameter.shape) != row.layout.our_shape:
            raise WeightsError(f"{row.path}: is {parameter.shape}, the config has {row.layout.our_shape}")
    for count, group in groupby(rows.tensors, key=_layer_count):
        tensors = list(group)
        layers: Sequence[int | None] = (None,) if count is None else range(count)
        for layer in layers:
            for members in tensors:
                pieces = [(row.layout, parameters[row.path]) for row in members]
                own = np.result_type(*(parameter.dtype for _, parameter in pieces))
                yield _Item(members[0].names[layer or 0], layer, pieces, dtype or own)


def _layer_count(rows: Sequence[Row]) -> int | None:
    layout = rows[0].layout
    return layout.sizes[LAYERS] if layout.stacked else None


def _shards(items: Sequence[_Item], shard_bytes: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _write_safetensors(file: BinaryIO, items: Sequence[_Item], progress: Callable[[int], None]) -> None:
    """The format: 8 bytes of header length, the header as JSON, the tensors' bytes without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # `transformers` refuses files that do not say it
    at = 0
    for item in items:
        header[item.name] = {
            "dtype": _DTYPE_NAMES[item.dtype],
            "shape": list(item.layout.stored_shape),
            "data_offsets": [at, at + item.nbytes],
        }
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for item in items:
        for block in _blocks(item):
            file.write(block.reshape(-1).view(np.uint8).data)
            progress(block.nbytes)


def _blocks(item: _Item) -> Iterator[Shaped[np.ndarray, "..."]]:
    """The tensor's elements in the order of the file, in runs of its first axis where it is large."""
    first, size, rest = item.layout.stored_letters[0], item.layout.lengths[0], item.layout.lengths[1:]
    can_cut = all(layout.can_cut(first) for layout, _ in item.pieces)
    step = -(-size // max(1, -(-item.nbytes // PIECE_BYTES))) if can_cut else size
    before = () if item.layer is None else (slice(item.layer, item.layer + 1),)
    for start in range(0, size, step):
        stop = min(start + step, size)
        block = np.empty((stop - start, *rest), item.dtype)
        for layout, parameter in item.pieces:
            part = layout.cut(first, start, stop) if can_cut else layout.our_part
            if part is None:
                continue
            array = read(parameter, (*before, *part))
            run, *inner = layout.stored_index(part)
            own = (slice(run.start - start, run.stop - start), *inner)
            fill(block[own], layout.in_stored_order(array[0] if before else array))
        yield block


def hugging_face_config(form: Form, model: ModelConfig, dtype: np.dtype) -> dict[str, Any] | None:
    """The config.json that belongs to an exported form; None where there is none.

    Source: release `llama_config/config.json` and `emu_conf.py`; the Hugging Face class reads the same fields.
    """
    torch_dtype = _TORCH_NAMES[_DTYPE_NAMES[dtype]]
    if form == "llama_hf":
        # `transformers` calls a LLaMA with biases on q, k and v, and none on the output product, Qwen2.
        name = "Qwen2ForCausalLM" if model.language.qkv_bias else "LlamaForCausalLM"
        return {"architectures": [name], **_llama_config(model.language), "torch_dtype": torch_dtype}
    vision = model.vision
    if form == "clip_hf":
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.layer_norm_epsilon,
            "torch_dtype": torch_dtype,
        }
    if form != "emu2_hf":
        return None
    return {
        "architectures": ["EmuForCausalLM"],
        **_llama_config(model.language),
        "torch_dtype": torch_dtype,
        "d_model": vision.width,
        "vision_config": {
            "eva_model_name": "eva-clip-4b-14-x",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.num_layers,
            "head_width": vision.width // vision.num_heads,
            "mlp_ratio": _mlp_ratio(vision.width, vision.mlp_width),
            "qkv_bias": True,
            "drop_path_rate": 0.0,
            "xattn": False,
            "postnorm": True,
            "layer_norm_eps": vision.layer_norm_epsilon,
            "n_query": model.num_visual_tokens,
            "v_query": 64,
        },
    }


def _llama_config(language: LanguageConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen2" if language.qkv_bias else "llama",
        "vocab_size": language.vocab_size,
        "hidden_size": language.width,
        "intermediate_size": language.mlp_width,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_width,
        "rms_norm_eps": language.rms_norm_epsilon,
        "rope_theta": language.rope_base,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": language.tied_head,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID if language.vocab_size > PAD_ID else None,  # `transformers` wants it in the vocabulary
        "use_cache": True,
    }


def _mlp_ratio(width: int, mlp_width: int) -> float:
    """A ratio with int(width x ratio) = mlp_width, as the release computes it."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)
