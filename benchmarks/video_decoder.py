"""Whether a trained video decoder's drawings move: measures of held-out clips, as JSON lines.

    python -m benchmarks.video_decoder --run runs/demo/video

Trains nothing. One line for each split and each who draws: the video decoder, the image decoder that it started from,
and the true first frame repeated, which does not move: its displacement error is the mean true displacement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from emu2_jax.errors import UserError
from experiments.evaluate_clips import evaluate_clips


def main() -> None:
    """Print one JSON line per case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="work directory of a video decoder")
    parser.add_argument("--clips", type=int, help="held-out clips of each split (the run's evaluation.num_samples)")
    arguments = parser.parse_args()
    try:
        for split, rows in evaluate_clips(arguments.run, num_clips=arguments.clips).items():
            for who, row in rows.items():
                print(json.dumps({"case": "video-motion", "split": split, "drawn_by": who, **row}), flush=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
