"""Run llama.cpp's converter, and tell it of a tokenizer what the converter does not find out by itself.

    python -m optimum_fista.folder.gguf_converter CONVERTER TOKENIZER [arguments of the converter]

CONVERTER is its file, convert_hf_to_gguf.py. TOKENIZER is JSON, made by `gguf_file`: null, or the ids that the
tokenizer gave to the converter's check text, or the name of a model that has it. The converter's own function looks the
pre-tokenizer up; only the tokenizer that it is called with is another.

llama.cpp cuts a text with a SentencePiece tokenizer by *scores*: of all adjacent tokens whose union is a token, it
merges those whose union has the highest score. The scores are in `tokenizer.model`. If only `tokenizer.json` is there,
the converter gives all tokens the same score, and llama.cpp cuts texts otherwise than Transformers. So the tokens get
scores from the order of the merges in `tokenizer.json`. No file of the converter is changed.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class SavedTokenizer:
    """Stands for a tokenizer of which only the ids of one text are known."""

    def __init__(self, text: str, ids: list[int]) -> None:
        """Keep a text and the ids that the tokenizer gave to it."""
        self._text = text
        self._ids = ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text. SystemExit if it is another text than the one whose ids are known."""
        if text != self._text:
            raise SystemExit(
                "this converter tells tokenizers apart by another text: pass --tokenizer with the model whose tokens "
                "were removed."
            )
        return self._ids


def load_converter(script: Path) -> ModuleType:
    """Import llama.cpp's converter from its file, as if Python ran that file.

    Its folder takes the first place of `sys.path`, because the file imports other modules from there.
    """
    sys.path[0] = str(script.parent)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def look_up_another(converter: ModuleType, tokenizer: Any) -> None:
    """Make the converter look up the pre-tokenizer of `tokenizer` in the place of that of the model's own tokenizer.

    Changes its class `TextModel`, in memory.
    """
    # In versions of 2025, the converter is one file, which has the class.
    text_model = getattr(converter, "TextModel", None)
    if text_model is None:
        text_model = importlib.import_module("conversion.base").TextModel
    look_up = text_model.get_vocab_base_pre

    def name_of_pretokenizer(model: Any, _smaller_tokenizer: Any) -> str:
        """Return the converter's name of the pre-tokenizer, such as "qwen2", for a model that is converted."""
        name: str = look_up(model, tokenizer)
        return name

    text_model.get_vocab_base_pre = name_of_pretokenizer


def scores_by_merges(tokenizer_file: Path) -> dict[int, float]:
    """Score the tokens of a BPE tokenizer with bytes, by their ids: the earlier its merge, the higher the score.

    A token that several merges make has the score of the first one. A token that no merge makes has the lowest score.
    `tokenizer_file` is a `tokenizer.json`. The result is empty for every other tokenizer: it has no such scores.
    """
    from tokenizers import Tokenizer

    # The library writes merges of old and new files in the same form, as pairs.
    model = json.loads(Tokenizer.from_file(str(tokenizer_file)).to_str())["model"]
    if model["type"] != "BPE" or not model["byte_fallback"]:
        return {}

    vocabulary: dict[str, int] = model["vocab"]
    merges = model["merges"]
    scores = dict.fromkeys(vocabulary.values(), -float(len(merges)))
    for rank in reversed(range(len(merges))):
        left, right = merges[rank]
        scores[vocabulary[left + right]] = -float(rank)
    return scores


def score_tokens(vocabulary_class: Any, scores: dict[int, float]) -> None:
    """Make the converter's class of a tokenizer without `tokenizer.model` score tokens by `scores`.

    Changes the class, `gguf.LlamaHfVocab`, in memory.
    """
    lowest = min(scores.values())

    def score_of(_vocabulary: Any, token: int) -> float:
        """Return the score of the token with this id."""
        return scores.get(token, lowest)

    vocabulary_class.get_token_score = score_of


def main() -> None:
    """Run the converter with the words of the command line, of which the first is the model's folder."""
    script, tokenizer_words, *words = sys.argv[1:]
    known_tokenizer = json.loads(tokenizer_words)
    converter = load_converter(Path(script))
    if known_tokenizer is not None:
        tokenizer: Any
        if "name" in known_tokenizer:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                known_tokenizer["name"], trust_remote_code=False
            )
        else:
            tokenizer = SavedTokenizer(known_tokenizer["text"], known_tokenizer["ids"])
        look_up_another(converter, tokenizer)

    tokenizer_file = Path(words[0]) / "tokenizer.json"
    if tokenizer_file.is_file():
        scores = scores_by_merges(tokenizer_file)
        if scores:
            # The converter has imported this package, which may be its own.
            score_tokens(sys.modules["gguf"].LlamaHfVocab, scores)
    sys.argv = [script, *words]
    converter.main()


if __name__ == "__main__":
    main()
