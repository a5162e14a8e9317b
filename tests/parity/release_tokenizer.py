"""The released tokenizer, for comparison: `transformers` 4.31's slow LlamaTokenizer in legacy mode, set up by the calls
that the release makes (`emu2/lm.py`). Runs in an environment of its own, which has that old version:

    .venv-parity-tokenizer/bin/python tests/parity/release_tokenizer.py < cases.json > answers.json

cases.json: {"model": path of the SentencePiece file, "special_tokens": [...], "texts": [...], "ids": [[...], ...]};
answers.json: {"size": vocabulary, "encoded": [[ids], ...], "decoded": [text, special tokens skipped, ...]}
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from transformers import LlamaTokenizer


def build(model: str, special_tokens: list[str]) -> LlamaTokenizer:
    """`[PAD]` is the first of the special tokens."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    pad, *others = special_tokens
    names = {"pad_token": pad, "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": others}
    tokenizer.add_special_tokens(names)
    return tokenizer


def main() -> None:
    cases = json.load(sys.stdin)
    tokenizer = build(cases["model"], cases["special_tokens"])
    answers = {
        "size": len(tokenizer),
        "encoded": [tokenizer(text).input_ids for text in cases["texts"]],
        "decoded": tokenizer.batch_decode(cases["ids"], skip_special_tokens=True),
    }
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
