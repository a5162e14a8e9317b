"""What an image costs from the shard to the batch, beside webdataset + Pillow, in processor time.

    python -m benchmarks.loader --make DIR PHOTO_OR_DIR...     # shards to measure on, cut out of photographs
    python -m benchmarks.loader --shards DIR [--tokenizer MODEL]

Every case runs in a process of its own, one at a time, in rounds that are interleaved; what is printed are medians over
rounds. Processor time counts the whole family of a case's processes, so other work on the machine hardly moves it.
"Ours" is the project's own pipeline: index, shuffle, packing, tokens, uint8 pixels in rows of 2048 positions. The peer
is webdataset + Pillow as its users write it: a shuffle buffer, bicubic squeeze, float32, normalised, batches of 32.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from PIL import Image

from benchmarks.photo_shards import make_shards
from data_pipelines.images import ImageRules, decode_image
from data_pipelines.index import scan_shard
from data_pipelines.pipeline import open_pipeline
from data_pipelines.samples import read_part, read_text
from data_pipelines.shards import ShardReader
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import DataError, UserError
from emu2_jax.tokenizer import Tokenizer

PEER_BATCH = 32
PEER_SHUFFLE_BUFFER = 1000
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
NUM_WARM_UP_BATCHES = 2
NUM_COMPARED = 200  # pictures whose pixels are compared

Loader = Callable[[Sequence[str], int, int, str], Iterator[int]]  # shards, size, workers, tokenizer -> images a batch


def main(argv: Sequence[str] | None = None) -> None:
    """Make shards, or measure, or (in a child) run one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, help="with --make: photographs, or directories of them")
    parser.add_argument("--shards", type=Path, help="directory of image-text tars to measure on")
    parser.add_argument("--make", type=Path, metavar="DIR", help="write such shards to DIR and end")
    parser.add_argument("--count", type=int, default=4000, help="with --make: pairs (4000)")
    parser.add_argument("--tokenizer", default="", help="SentencePiece model; by default one is made of the captions")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], help="pixels (224 448)")
    parser.add_argument("--workers", type=int, default=0, help="our threads, the peer's processes; 0 = inline (0)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time of a case, each round (4)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        if arguments.one:
            print(json.dumps(_measure(**json.loads(arguments.one))))
        elif arguments.make:
            make_shards(arguments.make, arguments.photos, arguments.count, processes=os.cpu_count() or 1)
        elif arguments.shards:
            _compare(arguments)
        else:
            parser.error("one of --shards and --make is needed")
    except UserError as error:
        print(f"benchmarks.loader: {error}", file=sys.stderr)
        sys.exit(2)


def _compare(arguments: argparse.Namespace) -> None:
    shards = sorted(str(path) for path in arguments.shards.glob("*.tar"))
    if not shards:
        raise DataError(f"{arguments.shards}: holds no .tar")
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = arguments.tokenizer or _train_tokenizer(shards[0], Path(temporary))
        for size in arguments.sizes:
            _fidelity_at(size, shards[0])
            _compare_at(size, shards, tokenizer, arguments)


def _fidelity_at(size: int, shard: str) -> None:
    """How close both readings come to Pillow's, which most pretrained encoders saw."""
    index = scan_shard(shard, "image_text", tokenizer=None)
    reader = ShardReader(index.paths)
    parts = [(sample, int(index.starts[sample]) + 1) for sample in range(min(len(index), NUM_COMPARED))]
    files = [read_part(reader, index, *part) for part in parts]
    decodings: tuple[Literal["fast", "faithful"], ...] = ("fast", "faithful")
    for decoding in decodings:
        found = [_psnr_db(decode_image(data, size, ImageRules(decoding)), _by_pillow(data, size)) for data in files]
        median, low = np.percentile(found, [50, 5]).round(1).tolist()
        print(json.dumps({"case": f"fidelity-{size}-{decoding}", "psnr_db": median, "psnr_db_5th_percentile": low}))


def _by_pillow(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean(np.square(one.astype(np.float32) - other.astype(np.float32))))
    return 10 * math.log10(255**2 / max(error, 1e-3))


def _compare_at(size: int, shards: Sequence[str], tokenizer: str, arguments: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in LOADERS}
    for turn in range(arguments.rounds):
        order = list(LOADERS)
        for case in order[turn % len(order) :] + order[: turn % len(order)]:
            found[case].append(
                _in_child(
                    case=case,
                    shards=shards,
                    size=size,
                    workers=arguments.workers,
                    tokenizer=tokenizer,
                    seconds=arguments.seconds,
                )
            )
    peer = statistics.median(result["cpu_ms_per_image"] for result in found["webdataset-pillow"])
    for case, results in found.items():
        line: dict[str, Any] = {
            "case": case.replace("SIZE", str(size)) if "SIZE" in case else f"{case}-{size}",
            "workers": arguments.workers,
            **{name: round(statistics.median(r[name] for r in results), 3) for name in results[0] if name != "note"},
        }
        if case == "webdataset-pillow":
            line["normalised_by"] = results[0]["note"]
        else:
            line["peer_over_ours_cpu"] = round(peer / line["cpu_ms_per_image"], 2)
        print(json.dumps(line), flush=True)


def _in_child(**settings: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.loader", "--one", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300 + 10 * settings["seconds"])
    if done.returncode:
        raise UserError(f"case {settings['case']} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(
    case: str, shards: Sequence[str], size: int, workers: int, tokenizer: str, seconds: float
) -> dict[str, Any]:
    began = time.perf_counter()
    batches = LOADERS[case](shards, size, workers, tokenizer)
    next(batches)
    first_batch_s = time.perf_counter() - began
    for _ in range(NUM_WARM_UP_BATCHES):
        next(batches)
    images, began, cpu = 0, time.perf_counter(), _family_cpu_s(os.getpid())
    while time.perf_counter() - began < seconds:
        images += next(batches)
    cpu, wall = _family_cpu_s(os.getpid()) - cpu, time.perf_counter() - began
    return {
        "cpu_ms_per_image": cpu / images * 1e3,
        "images_per_s": images / wall,
        "first_batch_s": first_batch_s,
        "note": "torch" if "torch" in sys.modules else "numpy",
    }


def _family_cpu_s(process: int) -> float:
    """Processor seconds of a process and of its living descendants."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    children = [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text(encoding="utf-8").split()
    ]
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_family_cpu_s(child) for child in children)


def _train_tokenizer(shard: str, directory: Path) -> str:
    index = scan_shard(shard, "image_text", tokenizer=None)
    reader = ShardReader(index.paths)
    captions = [read_text(reader, index, sample, int(index.starts[sample])) for sample in range(len(index))]
    prefix = directory / "captions"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(captions),
        model_prefix=str(prefix),
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return f"{prefix}.model"


# --- loaders ----------------------------------------------------------------------------------------------------------


def our_pipeline(
    shards: Sequence[str], size: int, workers: int, tokenizer: str, decoding: Literal["faithful", "fast"]
) -> Iterator[int]:
    """The pipeline that training reads; yields how many images a batch holds."""
    names = [shards[0]] if len(shards) == 1 else [f"{{{','.join(shards)}}}"]
    config = DataConfig(
        sources=(SourceConfig(name="photos", kind="image_text", shards=names[0]),),
        tokenizer=tokenizer,
        image_slots=23,
        global_batch_rows=2,
        read_threads=workers,
        prefetch_batches=max(2, workers),
        image_decoding=decoding,
    )
    pipeline = open_pipeline(config, visual_tokens=64, image_size=size, tokenizer=Tokenizer(tokenizer))
    for batch in pipeline.iterate():
        yield int(batch.fields["image_mask"].sum())


def _fast(shards: Sequence[str], size: int, workers: int, tokenizer: str) -> Iterator[int]:
    return our_pipeline(shards, size, workers, tokenizer, "fast")


def _faithful(shards: Sequence[str], size: int, workers: int, tokenizer: str) -> Iterator[int]:
    return our_pipeline(shards, size, workers, tokenizer, "faithful")


def _webdataset_pillow(shards: Sequence[str], size: int, workers: int, tokenizer: str) -> Iterator[int]:
    import webdataset

    normalise = _normaliser()

    def squeeze(image: Image.Image) -> Any:
        return normalise(image.resize((size, size), Image.Resampling.BICUBIC))

    stream = webdataset.WebDataset(list(shards), shardshuffle=100, empty_check=False, seed=0)
    stream = stream.repeat().shuffle(PEER_SHUFFLE_BUFFER).decode("pilrgb").to_tuple("jpg", "txt")
    stream = stream.map_tuple(squeeze, str).batched(PEER_BATCH, partial=False)
    if workers:
        stream = webdataset.WebLoader(stream, batch_size=None, num_workers=workers)
    for images, _ in stream:
        yield len(images)


def _normaliser() -> Callable[[Image.Image], Any]:
    """What torchvision's ToTensor and Normalize compute, with torch where it is installed: it is quicker there."""
    try:
        import torch
    except ImportError:
        mean, scale = (255 * np.array(MEAN, np.float32)), 1 / (255 * np.array(STD, np.float32))

        def with_numpy(image: Image.Image) -> np.ndarray:
            pixels = np.asarray(image, np.float32)
            return np.ascontiguousarray(((pixels - mean) * scale).transpose(2, 0, 1))

        return with_numpy
    torch.set_num_threads(1)
    means, stds = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def with_torch(image: Image.Image) -> Any:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return pixels.sub_(means).div_(stds)

    return with_torch


LOADERS: dict[str, Loader] = {
    "webdataset-pillow": _webdataset_pillow,
    "loader-SIZE-fast": _fast,
    "loader-SIZE-faithful": _faithful,
}

if __name__ == "__main__":
    main()
