"""`emu2 data check`: what a recipe's data would give its training run, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from data_pipelines.check import MAX_PLANNED, Causes, SourceCheck, check_clips, check_images, check_packed
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import DataError
from experiments.describe import image_reading
from experiments.inputs import open_tokenizer, timing


def check(config: ExperimentConfig, num_read: int) -> tuple[str, list[SourceCheck]]:
    """The text that is printed, and what it says of each source.

    Reads about `num_read` samples of each. Raises `ConfigError` for settings that do not go together.
    """
    if config.train.task == "decoder":
        checks = check_images(
            config.data,
            image_size=config.decoder.image_size,
            batch_images=config.decoder.batch_images,
            random_scale_max=config.decoder.random_scale_max,
            num_read=num_read,
        )
    elif config.train.task == "video_decoder":
        checks = check_clips(
            config.data,
            image_size=config.decoder.image_size,
            batch_clips=config.decoder.video.batch_clips,
            timing=timing(config),
            random_scale_max=config.decoder.random_scale_max,
            num_read=num_read,
        )
    else:
        checks = check_packed(
            config.data,
            visual_tokens=config.model.num_visual_tokens,
            image_size=config.model.vision.image_size,
            tokenizer=open_tokenizer(config),
            num_read=num_read,
        )
    lines = [_head(config), "", *_table(config, checks), "", *_causes(checks)]
    return "\n".join(lines).rstrip(), checks


def refuse_unusable(config: ExperimentConfig, checks: Sequence[SourceCheck]) -> None:
    """Raises `DataError` when training on these sources would stop."""
    broken = [one.source.name for one in checks if one.error is not None]
    rotten = [one.source.name for one in checks if one.error is None and one.bad_share > config.data.max_bad_share]
    faults = [f"cannot be opened: {', '.join(broken)}"] * bool(broken)
    faults += [f"more bad samples than data.max_bad_share allows: {', '.join(rotten)}"] * bool(rotten)
    if faults:
        raise DataError("the data would stop a run: " + "; ".join(faults))


def _head(config: ExperimentConfig) -> str:
    data = config.data
    if config.train.task == "decoder":
        what = f"{config.decoder.batch_images:,} images a step"
    elif config.train.task == "video_decoder":
        video = config.decoder.video
        what = f"{video.batch_clips:,} clips of {video.num_frames} frames a step"
    else:
        rows = f"{data.row_length} positions and {data.image_slots} image slots, {data.global_batch_rows} rows a step"
        what = f"rows of {rows}, mixing {data.mixing}"
    return f"recipe {config.name}: {what}; {config.train.num_steps:,} steps\n{image_reading(config)}"


def _table(config: ExperimentConfig, checks: Sequence[SourceCheck]) -> list[str]:
    rows = [_row(config, one) for one in checks] + _total(checks)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([row.get(name, "-") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(_aligned(line, widths)).rstrip() for line in cells]
    if any(one.rows is not None and one.num_samples > MAX_PLANNED for one in checks):
        lines.append(f"(rows and shares of a source from {MAX_PLANNED:,} of its samples)")
    return lines


def _row(config: ExperimentConfig, check: SourceCheck) -> Mapping[str, str]:
    named = {"source": check.source.name, "kind": check.source.kind}
    if check.error is not None:
        return named
    row = named | {"shards": f"{check.num_shards:,}", "samples": f"{check.num_samples:,}"}
    row["left out"] = f"{check.left_out.counts.total():,}"
    if check.rows is not None:
        row |= {
            "rows/epoch": f"{check.rows.per_epoch:,.0f}",
            "samples/row": f"{check.rows.samples_per_row:.1f}",
            "padding": f"{100 * check.rows.padding_share:.1f} %",
            "empty slots": f"{100 * check.rows.empty_slot_share:.1f} %" if check.rows.image_slots else "-",
        }
    return row | {
        "of steps": f"{100 * check.share_of_steps:.1f} %",
        "steps/epoch": f"{check.steps_per_epoch:,.{0 if check.steps_per_epoch >= 10 else 1}f}",
        "epochs": f"{config.train.num_steps / check.steps_per_epoch:.2f}",
        "read": f"{check.num_read:,}",
        "bad": f"{check.unreadable.counts.total():,}",
        **({"cut": f"{check.num_cut:,}"} if check.rows is not None else {}),
    }


def _total(checks: Sequence[SourceCheck]) -> list[Mapping[str, str]]:
    """What the run's rows hold on average, each source by its share of them."""
    packed = [(one.rows, one.share_of_rows) for one in checks if one.rows is not None]
    total = sum(share for _, share in packed)
    slots = sum(share * rows.image_slots for rows, share in packed)
    if len(packed) < 2:
        return []
    padding = sum(share * rows.padding_share for rows, share in packed) / total
    empty = sum(share * rows.image_slots * rows.empty_slot_share for rows, share in packed) / max(slots, 1e-9)
    return [{"source": "all rows", "padding": f"{100 * padding:.1f} %", "empty slots": f"{100 * empty:.1f} %"}]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
        yield cell.ljust(width) if i < 2 else cell.rjust(width)


def _causes(checks: Sequence[SourceCheck]) -> list[str]:
    lines = []
    for one in checks:
        if one.error is not None:
            lines.append(f"{one.source.name}: {one.error}")
        lines += _list(one.source.name, "left out when the index was built", one.left_out, one.num_samples)
        lines += _list(one.source.name, f"of {one.num_read:,} samples read", one.unreadable, one.num_read)
    return lines or ["no sample is bad"]


def _list(source: str, when: str, causes: Causes, total: int) -> list[str]:
    lines = []
    for cause, count in causes.counts.most_common():
        lines.append(f"{source}: {cause} {count:,} ({100 * count / max(1, total):.2g} %), {when}; for example")
        lines += [
            f"    {bad.shard}, sample {bad.key!r}, byte {bad.offset}: {bad.detail}" for bad in causes.examples[cause]
        ]
    return lines
