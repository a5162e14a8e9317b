"""Shards that can only be read once, from front to back: the output of a command.

Without an index nothing can be promised that needs one. Samples are packed as they come, from a pool like that of the
planner. A run that goes on begins its streams anew, in another order; what is read depends on the number of hosts; a
host that is slow to read holds up the others.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import subprocess
import tarfile
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from data_pipelines.batches import PackedBatch
from data_pipelines.embedding_store import EmbeddingStore
from data_pipelines.index import BadSample, SampleIndex, index_members, split_name
from data_pipelines.interleave import DocumentRules, measure, outline, read_document
from data_pipelines.order import shuffled, stream_seed
from data_pipelines.packing import plan_rows, write_document
from data_pipelines.samples import SampleCounts
from data_pipelines.shards import GatheredReader, ShardReader, expand_braces
from data_pipelines.tar import BLOCK, Damage, ForwardReader, Members
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.sequence import RowShape, empty_batch
from emu2_jax.tokenizer import Tokenizer

PIPE = "pipe:"

_SHUFFLED_SAMPLES = 1024  # that change places with each other, unless data.shuffle_window says how many


def is_stream(shards: str) -> bool:
    """Whether a source's shards are the output of commands."""
    return shards.startswith(PIPE)


def stream_members(file: IO[bytes], samples: int) -> Iterator[Members]:
    """The members of a tar stream with their data, so many samples at a time; parts of a sample follow each other.

    A stream that is cut or damaged ends with `Members.damage`.
    """
    members = Members()
    key, num_samples = "", 0
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                found = (split_name(member.name) or (member.name, ""))[0]
                if found != key:
                    if num_samples == samples:
                        yield members
                        members, num_samples = Members(), 0
                    key, num_samples = found, num_samples + 1
                part = tar.extractfile(member)
                data = part.read() if part is not None else b""
                members.names.append(member.name)
                members.headers.append(member.offset_data - BLOCK)
                members.sizes.append(member.size)
                members.data.append(data)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        last = members.names[-1] if members.names else ""
        offset = members.headers[-1] if members.headers else 0
        detail = f"the stream breaks off after member {last!r}: {error}"
        members.damage.append(Damage("cut_shard", offset, detail, last))
    # To the end, whatever comes: a command whose output is not taken fails.
    if any(piece.strip(b"\0") for piece in iter(lambda: file.read(1 << 20), b"")) and not members.damage:
        detail = "data after the end mark; wanted one tar a command"
        members.damage.append(Damage("data_after_end", 0, detail, members.names[-1] if members.names else ""))
    if members.names or members.damage:
        yield members


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample of which all parts are in memory."""

    index: SampleIndex
    reader: ShardReader
    number: int  # in the index
    order_seed: int
    epoch: int  # how often the streams had been read to their end before


class StreamPipeline:
    """Packed batches from one source that is a stream; made by `open_stream`."""

    def __init__(
        self,
        config: DataConfig,
        source: SourceConfig,
        commands: Sequence[str],
        tokenizer: Tokenizer,
        shape: RowShape,
        rows: int,
    ) -> None:
        self._config = config
        self._source = source
        self._commands = commands  # of this host
        self._tokenizer = tokenizer
        self._shape = shape
        self._rows = rows  # of this host
        self._rules = DocumentRules.of(config, source, shape)
        self._next_step = 0
        #: Samples handed out so far and the bad ones among them, on this host, by source.
        self.counts: collections.defaultdict[str, SampleCounts] = collections.defaultdict(SampleCounts)
        self.read_retries = 0  # a pipe cannot be read again
        self.queue_depth = 0  # nothing is read ahead
        self.stores: dict[str, Sequence[EmbeddingStore]] = {}

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """Commands of this host; how many samples they give is not known."""
        return {self._source.name: {"streams": len(self._commands)}}

    @property
    def warning(self) -> str:
        """What a stream cannot promise."""
        return (
            f"data.sources.{self._source.name}: is a stream: after a restart it begins anew, in another order, so that "
            "samples may come again or not at all; what is read depends on the number of hosts; failed reads are lost"
        )

    def state(self, step: int | None = None) -> dict[str, Any]:
        """The step, which is not a position in the data (JSON)."""
        return {"version": "stream", "step": self._next_step if step is None else step, "sources": {}}

    def restore(self, state: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
        """Begins the streams anew."""
        self._next_step = int(state["step"])
        return [self.warning]

    def iterate(self, start_step: int = 0) -> Iterator[PackedBatch]:
        """Batches without end; one thread reads ahead. Raises `DataError` as `Pipeline.iterate` does."""
        batches = self._batches(start_step)
        ahead: collections.deque[Future[PackedBatch]] = collections.deque()
        with contextlib.closing(batches), ThreadPoolExecutor(1) as pool:
            while True:
                while len(ahead) <= self._config.prefetch_batches:
                    ahead.append(pool.submit(next, batches))
                batch = ahead.popleft().result()
                counts = self.counts[self._source.name]
                counts.add(batch.num_samples, batch.bad)
                if batch.bad:
                    where = f"data.sources.{self._source.name}"
                    counts.check(self._config.max_bad_share, batch.bad[0], where)
                self._next_step = batch.step + 1
                yield batch

    def _batches(self, step: int) -> Generator[PackedBatch]:
        name = self._source.name
        waiting: dict[int, _Sample] = {}  # by their number in the stream
        left_out: list[BadSample] = []  # samples that did not come so far
        rows = plan_rows(
            self._measured(step, waiting, left_out),
            length=self._shape.length,
            image_slots=self._shape.image_slots,
            pool=self._config.packing_pool,
        )
        while True:
            fields = empty_batch(self._rows, self._shape, self._tokenizer.pad_id)
            num_samples = num_documents = num_cut = epoch = 0
            bad: list[BadSample] = []
            for row in range(self._rows):
                samples = [waiting.pop(number) for number in next(rows)]
                documents, cut = self._fill_row(fields, row, samples, bad)
                num_samples += len(samples)
                num_documents += documents
                num_cut += cut
                epoch = max(epoch, *(sample.epoch for sample in samples))
            num_samples += len(left_out)
            found = tuple(dataclasses.replace(one, source=name) for one in (*left_out, *bad))
            left_out.clear()
            yield PackedBatch(
                step, fields, (name,) * self._rows, {name: epoch}, {name: num_samples}, num_documents, num_cut, found
            )
            step += 1

    def _measured(
        self, step: int, waiting: dict[int, _Sample], left_out: list[BadSample]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and images of the samples of the streams, for ever; puts the samples themselves into `waiting`."""
        count = 0
        for epoch in itertools.count():
            before = count
            seed = stream_seed(self._config.seed, self._source.name, "stream", step, epoch)
            for command in shuffled(seed, len(self._commands), np.arange(len(self._commands))).tolist():
                for number, index, reader in self._pieces(self._commands[command]):
                    left_out += index.bad
                    order = shuffled(stream_seed(seed, command, number), len(index), np.arange(len(index)))
                    waiting |= {count + i: _Sample(index, reader, s, seed, epoch) for i, s in enumerate(order.tolist())}
                    count += len(index)
                    yield measure(index, order, self._rules, seed)
            if count == before:
                example = f"; for example {left_out[0]}" if left_out else ""
                raise DataError(
                    f"data.sources.{self._source.name}: its streams hold no sample that can be used{example}"
                )

    def _pieces(self, command: str) -> Iterator[tuple[int, SampleIndex, ShardReader]]:
        """What a command writes, some samples at a time: number, index, and a reader that has their bytes."""
        samples = self._config.shuffle_window or _SHUFFLED_SAMPLES
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for number, members in enumerate(stream_members(process.stdout, samples)):
                yield number, *self._index(command, members)
        if process.returncode:
            failed = Damage("failed_command", 0, f"the command ended with code {process.returncode}", "")
            yield -1, *self._index(command, Members(damage=[failed]))

    def _index(self, command: str, members: Members) -> tuple[SampleIndex, ShardReader]:
        nothing_more = ForwardReader(lambda count, offset: b"", 0, BLOCK)
        index = index_members(command, self._source.kind, self._tokenizer, self._source.caption, members, nothing_more)
        places = zip(members.headers, members.sizes, members.data, strict=True)
        at_hand = {(0, header + BLOCK, size): data for header, size, data in places}
        return index, GatheredReader(ShardReader((command,)), at_hand)

    def _fill_row(
        self, fields: Mapping[str, np.ndarray], row: int, samples: Sequence[_Sample], bad: list[BadSample]
    ) -> tuple[int, int]:
        start = slot = num_documents = num_cut = 0
        for sample in samples:
            index, number = sample.index, sample.number
            plan = outline(index, number, self._rules, sample.order_seed)
            document, unusable = read_document(index, sample.reader, self._tokenizer, number, plan, self._rules)
            bad += unusable
            if document is not None:
                num_documents += 1
                num_cut += plan.is_cut
                write_document(fields, self._shape, document, row=row, start=start, segment=num_documents, slot=slot)
            start, slot = start + plan.length, slot + plan.num_images
        return num_documents, num_cut


def open_stream(
    config: DataConfig, *, visual_tokens: int, image_size: int, tokenizer: Tokenizer, hosts: int = 1, host: int = 0
) -> StreamPipeline:
    """Opens the one source of `config`, whose shards are the output of commands: "pipe:COMMAND", braces allowed.

    Each host runs its share of the commands. Raises `ConfigError` where a stream cannot do what is asked for.
    """
    used = [source for source in config.sources if source.weight > 0]
    if len(used) > 1:
        names = ", ".join(source.name for source in used if is_stream(source.shards))
        raise ConfigError(
            f"data.sources: a stream ({names}) cannot be mixed with other sources; copy or index its shards"
        )
    source = used[0]
    path = f"data.sources.{source.name}.shards"
    if source.embeddings is not None:
        raise ConfigError(f"data.sources.{source.name}.embeddings: is for shards that are indexed, not for a stream")
    commands = expand_braces(source.shards.removeprefix(PIPE))[host::hosts]
    if not commands:
        raise ConfigError(f"{path}: has fewer streams than there are hosts, {hosts}")
    rows = source.batch_rows if source.batch_rows is not None else config.global_batch_rows
    if rows % hosts:
        raise ConfigError(f"data.global_batch_rows: got {rows}; wanted a multiple of the number of hosts, {hosts}")
    slots = config.image_slots if source.image_slots is None else source.image_slots
    shape = RowShape(config.row_length, slots, visual_tokens, image_size)
    return StreamPipeline(config, source, commands, tokenizer, shape, rows // hosts)
