"""`emu2 encode`: what a frozen encoder makes of the images of some shards, worked out once and stored.

Each shard is encoded by itself and written whole, so a run that was stopped goes on with the first shard that is
missing, and several processes may share the work (`--part`). Hosts need not know of each other: every process uses
the devices it has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, UInt8
from tqdm import tqdm

from data_pipelines.crops import open_image_pipeline
from data_pipelines.embedding_store import (
    EMBEDDINGS,
    LATENT,
    TIME_IDS,
    Settings,
    StoreHeader,
    check_names,
    epoch_directory,
    members_of,
    shard_size,
    stem,
    store_path,
    write_store_shard,
)
from data_pipelines.images import ImageRules, decode_image
from data_pipelines.index import SampleIndex
from data_pipelines.kinds import TEXT_SUFFIX, Kind, SampleError
from data_pipelines.samples import read_part
from data_pipelines.shards import ShardReader
from data_pipelines.sources import open_source
from emu2_jax import sharding
from emu2_jax.checkpoint import load_parts, saved_parts
from emu2_jax.config import ExperimentConfig, OptimizerConfig, SourceConfig
from emu2_jax.diffusion.vae import init_vae, open_codec, stored_latent
from emu2_jax.errors import CheckpointError, ConfigError, DataError, NotFiniteError, UserError
from emu2_jax.fingerprint import fingerprint
from emu2_jax.models.emu2 import encode_images, init_visual_encoder
from emu2_jax.optimizer import cast_frozen
from emu2_jax.task import Params
from emu2_jax.train import fit_parameter
from experiments.inputs import store_settings
from experiments.runs import CONFIG

#: One image as it is read: pixels and, of a crop, the sizes that go along.
_Read = Callable[[int, int], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Part:
    """The share of the shards that one of several processes does: number `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """From "3/16". Raises `UserError`."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--part: got {text!r}; wanted NUMBER/COUNT, such as 3/16")
        return cls(int(number), int(count))


@dataclasses.dataclass(frozen=True)
class Pass:
    """One way through all images: whole pictures, or the crops of an epoch."""

    out: Path
    settings: Settings
    read: _Read


def encoder_workdir(run: Path) -> Path:
    """The work directory whose encoder is meant: `run` itself, or the first stage in it."""
    return run if (run / CONFIG).exists() else run / "stage1"


def encode_pictures(
    config: ExperimentConfig,
    workdir: Path,
    shards: str,
    kind: Kind,
    out: Path,
    *,
    batch: int,
    part: Part,
    caption: str = TEXT_SUFFIX,
) -> None:
    """Embeddings of the whole pictures of `shards`, for pretraining with a frozen encoder.

    `config` says how pictures become pixels, the size of the encoder and N; `workdir` holds its parameters. `kind` and
    `caption` are as in `SourceConfig`.
    """
    source = SourceConfig(name="encoded", kind=kind, shards=shards, caption=caption)
    index = open_source(dataclasses.replace(config.data, max_bad_share=1.0), source, tokenizer=None)
    reader, rules = ShardReader(index.paths), ImageRules.of(config.data)
    size = config.model.vision.image_size

    def read(sample: int, image: int) -> tuple[np.ndarray, None]:
        return decode_image(read_part(reader, index, sample, image), size, rules), None

    pretraining = dataclasses.replace(config, train=dataclasses.replace(config.train, task="pretrain"))
    _encode(config, workdir, index, [Pass(out, store_settings(pretraining), read)], batch=batch, part=part)


def encode_crops(
    config: ExperimentConfig, workdir: Path, source: str, out: Path, *, epochs: int, batch: int, part: Part
) -> None:
    """Embeddings and latents of the crops of the first `epochs` epochs of a source of a decoder recipe.

    A run that trains from them sees the crops of its epoch and, past the last stored one, those of the first again.
    More epochs can be added to a store later.
    """
    if config.train.task != "decoder":
        raise ConfigError(f"--crops: {config.name} trains no visual decoder; leave it out for pretraining")
    if epochs < 1:
        raise ConfigError(f"--epochs: got {epochs}; wanted 1 or more")
    own = [one for one in config.data.sources if one.name == source and one.kind == "image_text"]
    if not own:
        raise ConfigError(f"--source: {config.name} has no source {source!r} of image-text pairs")
    alone = dataclasses.replace(own[0], weight=1.0, embeddings=None)
    pipeline = open_image_pipeline(
        dataclasses.replace(config.data, sources=(alone,)),
        image_size=config.decoder.image_size,
        batch_images=1,
        random_scale_max=config.decoder.random_scale_max,
    )

    def read(epoch: int, sample: int, image: int) -> tuple[np.ndarray, np.ndarray]:
        crop = pipeline.crop(source, epoch, sample)
        return crop.image, crop.time_ids

    settings = {**store_settings(config), "source": source}
    passes = [
        Pass(epoch_directory(out, epoch), {**settings, "epoch": epoch}, functools.partial(read, epoch))
        for epoch in range(epochs)
    ]
    _encode(config, workdir, pipeline.indexes[source], passes, batch=batch, part=part, crops=True)


def _encode(
    config: ExperimentConfig,
    workdir: Path,
    index: SampleIndex,
    passes: Sequence[Pass],
    *,
    batch: int,
    part: Part,
    crops: bool = False,
) -> None:
    check_names(index.paths)
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    sharding.check_batch(batch, OptimizerConfig(), mesh, "--batch")
    todo = [(one, shard) for one in passes for shard in range(part.number - 1, len(index.paths), part.count)]
    with_vae = crops and config.decoder.latent == "autoencoder_kl"
    params = load_encoders(config, workdir, mesh, with_vae=with_vae)
    encoder = fingerprint(params["visual_encoder"])
    vae = fingerprint(params["vae"]) if with_vae else None
    latent = stored_latent(config.decoder)
    latents = (latent.shape, str(latent.dtype)) if crops else None
    members = members_of(config.model.num_visual_tokens, config.model.vision.width, latents)
    run = compiled(config, mesh, crops)
    num_done = num_bad = 0
    with ThreadPoolExecutor(max(1, config.data.read_threads)) as pool:
        for one, shard in tqdm(todo, "encode", unit="shard", disable=None):
            images = _images_of(index, shard)
            header = StoreHeader(encoder, one.settings, members, len(images), shard_size(index.paths[shard]), vae)
            path = store_path(one.out, index.paths[shard])
            if path.exists():
                _check_done(path, header)
                continue
            stems = [stem(index, *image) for image in images]
            records = _records(images, one.read, run, params, mesh, batch, pool, crops)
            checked = _Checked(records, stems, index.paths[shard])
            write_store_shard(path, header, stems, checked)
            num_done += len(images)
            num_bad += checked.num_bad
    made_by = f"encoder {encoder}" + (f", VAE {vae}" if vae else "")
    where = passes[0].out.parent if crops else passes[0].out
    print(f"{where}: {made_by}, {num_done:,} images encoded now, of which {num_bad:,} could not be used")


def load_encoders(config: ExperimentConfig, workdir: Path, mesh: jax.sharding.Mesh, *, with_vae: bool) -> Params:
    """The visual encoder (and the VAE) of a work directory as a run that freezes them would hold them."""

    def init() -> Params:
        params = {"visual_encoder": init_visual_encoder(config.model, jax.random.key(0))}
        return params | ({"vae": init_vae(config.decoder.vae, jax.random.key(0))} if with_vae else {})

    if with_vae and "vae" not in saved_parts(workdir):
        raise CheckpointError(
            f"{workdir}: holds no VAE, whose latents decoder.latent = autoencoder_kl asks for; "
            "`emu2 convert --from vae=... --from Emu2` makes a work directory that holds both"
        )
    shapes = jax.eval_shape(init)
    shardings = sharding.parameter_shardings(shapes, mesh)
    stored = jax.eval_shape(functools.partial(cast_frozen, config.model.frozen_dtype), shapes)
    wanted = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), stored, shardings)
    return load_parts(workdir, wanted, fit_parameter)


def compiled(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, crops: bool
) -> Callable[[Params, UInt8[Array, "B S S 3"]], Mapping[str, Array]]:
    """What is stored of a batch of images, as a compiled function of the encoders' parameters and pixels."""

    def run(params: Params, images: UInt8[Array, "B S S 3"]) -> Mapping[str, Array]:
        arrays = {EMBEDDINGS: encode_images(config.model, params["visual_encoder"], images).astype(jnp.bfloat16)}
        if crops:
            pixels = images.astype(jnp.float32) / 127.5 - 1.0
            summary = open_codec(config.decoder, params).summary(pixels)
            arrays[LATENT] = summary.astype(stored_latent(config.decoder).dtype)
        return arrays

    return jax.jit(run, out_shardings=sharding.batch_sharding(mesh))


def _images_of(index: SampleIndex, shard: int) -> list[tuple[int, int]]:
    """(sample, part) of every image of a shard, in the order of the index."""
    samples = np.flatnonzero(index.shards == shard).tolist()
    return [
        (sample, part)
        for sample in samples
        for part in range(int(index.starts[sample]), int(index.starts[sample + 1]))
        if index.is_image[part]
    ]


def _check_done(path: Path, header: StoreHeader) -> None:
    """A shard that is there already must be one that this command would write."""
    with path.open("rb") as file:
        there = StoreHeader.from_json(file.read(512 + 4096)[512:], str(path))
    if there != header:
        differs = next(
            name
            for name in ("encoder", "vae", "settings", "members", "num_records", "shard_bytes")
            if getattr(there, name) != getattr(header, name)
        )
        raise DataError(
            f"{path}: is there already, with another {differs} ({getattr(there, differs)}, here "
            f"{getattr(header, differs)}); give another --out"
        )


class _Checked:
    """Records as they pass: how many are bad, and whether the networks gave numbers."""

    def __init__(
        self, records: Iterator[Mapping[str, np.ndarray] | SampleError], stems: Sequence[str], shard: str
    ) -> None:
        self._records = records
        self._stems = stems
        self._shard = shard
        self.num_bad = 0

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray] | SampleError]:
        for name, record in zip(self._stems, self._records, strict=True):
            if isinstance(record, SampleError):
                self.num_bad += 1
            else:
                self._check_finite(name, record)
            yield record

    def _check_finite(self, name: str, record: Mapping[str, np.ndarray]) -> None:
        for member, network in ((EMBEDDINGS, "visual_encoder"), (LATENT, "vae")):
            if member in record and not np.isfinite(record[member]).all():
                dtype = record[member].dtype
                raise NotFiniteError(
                    f"{network}: not finite in {dtype} (largest {float(ml_dtypes.finfo(dtype).max):.5g}) for image "
                    f"{name!r} of {self._shard}; are the parameters sound?"
                )


def _records(
    images: Sequence[tuple[int, int]],
    read: _Read,
    run: Callable[..., Mapping[str, Array]],
    params: Params,
    mesh: jax.sharding.Mesh,
    batch: int,
    pool: ThreadPoolExecutor,
    crops: bool,
) -> Iterator[Mapping[str, np.ndarray] | SampleError]:
    """What is stored of each image, in order. The next batch is read while the devices work on the last."""

    def attempt(image: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None] | SampleError:
        try:
            return read(*image)
        except SampleError as error:
            return error

    groups = [images[start : start + batch] for start in range(0, len(images), batch)]
    reading = [pool.submit(attempt, image) for image in groups[0]] if groups else []
    for number in range(len(groups)):
        found = [future.result() for future in reading]
        following = groups[number + 1] if number + 1 < len(groups) else []
        reading = [pool.submit(attempt, image) for image in following]
        good = [one for one in found if not isinstance(one, SampleError)]
        arrays = _on_devices(run, params, [pixels for pixels, _ in good], batch, mesh)
        at = 0
        for one in found:
            if isinstance(one, SampleError):
                yield one
                continue
            record = {name: values[at] for name, values in arrays.items()}
            yield record | ({TIME_IDS: one[1]} if crops and one[1] is not None else {})
            at += 1


def _on_devices(
    run: Callable[..., Mapping[str, Array]],
    params: Params,
    pixels: Sequence[np.ndarray],
    batch: int,
    mesh: jax.sharding.Mesh,
) -> Mapping[str, Any]:
    if not pixels:
        return {}
    whole = np.zeros((batch, *pixels[0].shape), np.uint8)  # always of one shape, for one compilation
    whole[: len(pixels)] = np.stack(pixels)
    return jax.device_get(run(params, jax.device_put(whole, sharding.batch_sharding(mesh))))
