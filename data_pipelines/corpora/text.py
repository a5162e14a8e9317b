"""Language alone (the Pile, C4, any list of texts): documents as JSON lines or parquet.

How it is distributed: `.jsonl`, `.jsonl.zst` (the Pile), `.jsonl.gz` (C4) or `.parquet`, the document in one field,

    {"text": "A document of any length.", "meta": {"pile_set_name": "Wikipedia (en)"}}

What it becomes: shards of kind `text`, `{key}.txt`. Training cuts a document at the length of its row. With a
tokenizer, a longer one is split instead, at white space, into samples of at most `max_tokens` tokens, so that nothing
of it is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.corpora.converted import new_corpus
from data_pipelines.corpora.records import read_records
from data_pipelines.kinds import Kind
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

KIND: Kind = "text"

#: A row of 2048 positions less `<s>` and `</s>`.
MAX_TOKENS = 2046


def convert(
    documents: Sequence[Path],
    out_dir: Path,
    *,
    field: str = "text",
    tokenizer: Tokenizer | None = None,
    max_tokens: int = MAX_TOKENS,
    samples_per_shard: int = 10_000,
) -> Counter[str]:
    """Writes the texts of the files into shards in the new directory `out_dir`.

    Returns how many samples were written, how many documents were split and what was left out, by cause. Raises
    `DataError` for files that cannot be read, and when no record has the field.
    """
    if max_tokens < 8:  # one character may take five
        raise DataError(f"--max_tokens: got {max_tokens}, wanted at least 8")
    settings = {"documents": [str(path) for path in documents], "field": field}
    if tokenizer is not None:
        settings |= {"tokenizer": tokenizer.fingerprint, "max_tokens": str(max_tokens)}
    with new_corpus(out_dir, "text", samples_per_shard, settings) as corpus:
        for record in read_records(documents, corpus.counts, columns=(field,)):
            text = record.fields.get(field)
            if not isinstance(text, str):
                corpus.counts["missing_text"] += 1
                continue
            text = text.encode("utf-8", "replace").decode().strip()  # JSON may hold halves of surrogate pairs
            if not text:
                corpus.counts["empty_text"] += 1
                continue
            pieces = [text] if tokenizer is None else tokenizer.split(text, max_tokens)
            corpus.counts["split_documents"] += len(pieces) > 1
            for piece in pieces:
                corpus.write({"txt": piece.encode()})
    return corpus.counts
