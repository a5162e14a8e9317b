"""What `transformers` answers in the searches of `tests/generation/search_cases.py`.

    PYTHON tests/parity/measure_searches.py --write tests/golden/searches_release.json

in an environment with PyTorch and `transformers` 4.31, which the release ran (its beam search has changed since). The
parity job asks the version that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "generation"), str(TESTS.parent)]
# Not needed, and often of another build than PyTorch: `transformers` does without.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]

import numpy as np
import search_cases
import tiny
import torch
import transformers

from emu2_jax import weights
from emu2_jax.weights.state_dict import to_state_dict


def build(config: Any, params: Any) -> Any:
    """The language model in PyTorch, with our weights."""
    language = config.language
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=language.vocab_size,
            hidden_size=language.width,
            intermediate_size=language.mlp_width,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_heads,
            num_key_value_heads=language.num_kv_heads,
            rms_norm_eps=language.rms_norm_epsilon,
            bos_token_id=tiny.BOS,
            eos_token_id=tiny.EOS,
            pad_token_id=tiny.PAD,
        )
    ).eval()
    state = to_state_dict({"language_model": params["language_model"]}, weights.table("llama_hf", config))
    missing = theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()}, strict=False)
    assert not missing.unexpected_keys and all("inv_freq" in key for key in missing.missing_keys), missing
    return theirs


def theirs() -> list[list[list[int]]]:
    """The ids of each prompt's answer, for each search, without `<s>`, `</s>` and padding."""
    config, params = search_cases.model()
    model = build(config, params)
    prompts = search_cases.prompts()
    table = params["language_model"]["token_embedding"]
    longest = max(map(len, prompts))
    inputs = np.zeros((len(prompts), longest, table.shape[1]), np.float32)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):  # padding on the left, as in the release
        x = table[prompt.tokens].copy()
        for visual in prompt.visuals:
            x[visual.start : visual.start + visual.length] = visual.source @ params["project_up"]["kernel"]
        inputs[row, longest - len(x) :], mask[row, longest - len(x) :] = x, 1
    old = int(transformers.__version__.split(".")[0]) < 5
    found = []
    for search in search_cases.SEARCHES:
        with torch.inference_mode():
            ids = model.generate(
                inputs_embeds=torch.tensor(inputs),
                attention_mask=torch.tensor(mask),
                do_sample=False,
                num_beams=search.num_beams,
                length_penalty=search.length_penalty,
                early_stopping=search.early_stopping,
                max_new_tokens=search_cases.MAX_TOKENS,
                # The release sets min_length, which there counts <s>.
                **({"min_length": search.min_new_tokens + 1} if old else {"min_new_tokens": search.min_new_tokens}),
            )
        found.append([_answer(row, starts=old) for row in ids.tolist()])
    return found


def _answer(ids: list[int], *, starts: bool) -> list[int]:
    if starts:
        assert ids[0] == tiny.BOS
        ids = ids[1:]
    ends = [i for i, token in enumerate(ids) if token == tiny.EOS]
    return ids[: ends[0]] if ends else ids


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, required=True)
    path = parser.parse_args().write
    found = {"transformers": transformers.__version__, "answers": theirs()}
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
