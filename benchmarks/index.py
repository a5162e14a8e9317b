"""`python -m benchmarks.index`: samples that one core indexes in a second, from headers alone and with their contents.

The shards are made for the purpose: a caption and a JPEG of 100 kB a sample, of which the first 4 kB are on the disk.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.index import scan_shard

IMAGE_BYTES = 100_000
TEXT = b"a photo of a cat that lies on a mat in front of the fire"


def write_shard(path: Path, samples: int) -> None:
    """A shard whose images are holes after their first bytes; most file systems keep no blocks for those."""
    picture = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture, "JPEG")
    head = picture.getvalue()[:4096]
    with path.open("wb") as file:
        position = 0
        for sample in range(samples):
            for name, data, size in ((f"{sample:09d}.jpg", head, IMAGE_BYTES), (f"{sample:09d}.txt", TEXT, len(TEXT))):
                member = tarfile.TarInfo(name)
                member.size = size
                file.seek(position)
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + data)
                position += 512 + -(-size // 512) * 512
        file.truncate(position + 1024)


def measure(path: Path, samples: int, repeats: int, *, contents: bool) -> dict[str, float | str]:
    """Samples per second of processor time, the median of some scans of one shard."""
    rates = []
    for _ in range(repeats):
        began = time.process_time()
        index = scan_shard(str(path), "image_text", None, contents=contents)
        rates.append(samples / (time.process_time() - began))
        assert len(index) == samples
        assert not contents or (index.widths[1::2] == 640).all()
    name = "index-contents" if contents else "index-headers"
    return {"case": name, "samples_per_s": round(statistics.median(rates)), "slowest": round(min(rates))}


def main() -> None:
    """Prints one line for headers alone, one with texts checked and images measured (but no text tokenised)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="of the shard")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        write_shard(path, arguments.samples)
        for contents in (False, True):
            print(json.dumps(measure(path, arguments.samples, arguments.repeats, contents=contents)), flush=True)


if __name__ == "__main__":
    main()
