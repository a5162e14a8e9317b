"""Asks the released tokenizer (`release_tokenizer.py`, in an environment of its own) and writes its golden file.

EMU2_LLAMA_TOKENIZER=.../tokenizer.model .venv-parity/bin/python tests/parity/tokenizer_reference.py
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emu2_jax.tokenizer import SPECIAL_TOKENS, Picture, Video

FOLDER = Path(__file__).parent
PYTHON = FOLDER.parent.parent / ".venv-parity-tokenizer" / "bin" / "python"
GOLDEN = FOLDER.parent / "golden" / "tokenizer.json"

PICTURE, VIDEO = Picture(4).text, Video(2, 3).text
#: What the golden file holds: prompts as the release writes them, and what is easily got wrong.
TEXTS = (
    "",
    "a cat",
    " a cat",
    "  two  spaces ",
    "Hello, world! It's 42 \u00b0C.\n\nNew\tline",
    "\u65e5\u672c\u8a9e \U0001f600 \u00e9\u00e8 \u0152uvre",
    PICTURE,
    f"{PICTURE} based on the picture, what is this? short answer:",
    f"There are two dogs.{PICTURE} There are three dogs. {PICTURE}\n There are",
    f"[VIDEO]  {VIDEO.removeprefix('[VIDEO]')} what happens?",
    f"{VIDEO}[/VIDEO]",
    f"A photo of <grounding><phrase>a man</phrase><object>{PICTURE}</object>{PICTURE} and a dog[IMG]",
    "<phrase>a dog</phrase><object><patch_index_0012><patch_index_0256></object></delimiter_of_multi_objects/>",
    "[gIMG] [/gIMG] [EOC] <REC>",
    "word[IMG]word [/IMG] word",
    " \t[IMG] \u00a0 x",
    "[IMG][IMGx] [img] <images> <image > [[IMG]] <<image>>",
    "<patch_index_0257><patch_index_12>",
    "a <s> b </s> c <unk> d",
    "</s>x",
    "\u2581lower one eighth block \u2581[IMG]\u2581",
    "You are a helpful assistant. [USER]: Describe this. [ASSISTANT]: A bird.</s>[USER]: More?[ASSISTANT]:",
)


def tokenizer_file() -> str | None:
    """The SentencePiece file that the tests were given."""
    return os.environ.get("EMU2_LLAMA_TOKENIZER")


def ask(model: str, special_tokens: Sequence[str], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Any:
    """What the released tokenizer makes of texts and of ids (see `release_tokenizer.py`)."""
    cases = {"model": model, "special_tokens": list(special_tokens), "texts": list(texts), "ids": list(ids)}
    command = [str(PYTHON), str(FOLDER / "release_tokenizer.py")]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def golden(model: str) -> dict[str, Any]:
    """The ids of every text under both vocabularies, and what these ids decode to."""
    file: dict[str, Any] = {"sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest(), "texts": list(TEXTS)}
    for name, special_tokens in SPECIAL_TOKENS.items():
        encoded = ask(model, special_tokens, TEXTS, [])["encoded"]
        answers = ask(model, special_tokens, [], encoded)
        file[name] = {"vocab_size": answers["size"], "ids": encoded, "decoded": answers["decoded"]}
    return file


if __name__ == "__main__":
    given = tokenizer_file()
    if given is None:
        raise SystemExit("EMU2_LLAMA_TOKENIZER names no file: give the path of LLaMA's tokenizer.model")
    GOLDEN.write_text(json.dumps(golden(given)) + "\n")
    print(f"wrote {GOLDEN}")
