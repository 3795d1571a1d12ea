"""Models that lose tokens: rows of the embedding and the head, the tokenizer, and every id in the files."""

import json
import shutil
import string
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from folder_files import tensors_of
from media_models import media_batch, media_model
from quantized_models import compressed_qwen3_moe, fp8_deepseek
from rare_tokens import COMMON, RARE, TEXT, bpe_tokenizer, save, text_of
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.folder.checkpoint import VOCABULARY_FILE, kept_tokens, read_report
from optimum_fista.folder.packed_folder import pack_folder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tokens that stay|belong to no token|was pruned before|calibration|bits per byte)"
)


def unigram_tokenizer(size: int = 64) -> PreTrainedTokenizerFast:
    """3 special tokens, the space, 26 letters, 23 words, and rare pieces."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -6.0) for letter in string.ascii_lowercase]
    pieces += [(f"▁{word}", -3.0) for word in f"{COMMON} {RARE}".split()]
    pieces += [(f"q{number}", -20.0) for number in range(size - len(pieces))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def remove_tokens(folder: Path, output: Path, pattern="vocab:unused", texts=(TEXT,), **options):
    """Remove tokens from the model in `folder`; `options` are those of the configuration."""
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)
    return pruner.prune(folder, texts, output_dir=output)


def change_json(file: Path, **values) -> None:
    """Replace or add values of a JSON object in a file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def json_of(file: Path) -> dict:
    """The JSON object in a file."""
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense model with 356 tokens and 8 rows of no token; do not write to it."""
    return save(tmp_path_factory.mktemp("vocabulary") / "dense")


@pytest.fixture(scope="module")
def smaller(dense) -> Path:
    """The dense model with the tokens of `TEXT`; do not write to it."""
    remove_tokens(dense, dense.with_name("smaller"))
    return dense.with_name("smaller")


def assert_rows_are_cut(before: dict, after: dict, cut: set[str], kept: torch.Tensor) -> None:
    """The tensors called `cut` have their rows `kept` only; the others are equal."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor[kept] if name in cut else tensor
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize(
    "rows", [{EMBEDDING, HEAD}, {EMBEDDING}, {HEAD}], ids=["untied", "tied", "tied, as head"]
)
def test_a_text_whose_tokens_stay_has_the_logits_of_the_dense_model(tmp_path, rows):
    dense = save(tmp_path / "dense", tie_word_embeddings=len(rows) == 1)
    if rows == {HEAD}:
        tensors = tensors_of(dense)
        save_file(
            tensors | {HEAD: tensors.pop(EMBEDDING)}, dense / "model.safetensors", {"format": "pt"}
        )

    with pytest.warns(UserWarning, match="8 of the 364 rows of the embedding belong to no token"):
        report = remove_tokens(dense, tmp_path / "smaller")

    kept = kept_tokens(tmp_path / "smaller")
    assert len(kept) == 320  # a multiple of 64
    assert report.removed.endswith("with 320 of 364 tokens")

    smaller_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smaller")
    old_ids = AutoTokenizer.from_pretrained(dense)(TEXT[:200], return_tensors="pt")["input_ids"]
    new_ids = smaller_tokenizer(TEXT[:200], return_tensors="pt")["input_ids"]
    other_text = string.printable + "é東"
    assert len(smaller_tokenizer) == 320
    assert torch.equal(kept[new_ids], old_ids)
    assert smaller_tokenizer.decode(smaller_tokenizer(other_text).input_ids) == other_text

    assert_rows_are_cut(tensors_of(dense), tensors_of(tmp_path / "smaller"), rows, kept)

    smaller_model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    with torch.no_grad():
        dense_logits = AutoModelForCausalLM.from_pretrained(dense)(old_ids).logits
        logits = smaller_model(new_ids).logits
    torch.testing.assert_close(logits, dense_logits[..., kept])
    assert smaller_model.config.vocab_size == 320


def test_a_share_is_removed_and_tokens_that_are_asked_for_stay(dense, tmp_path):
    tokenizer = bpe_tokenizer()

    remove_tokens(
        dense, tmp_path / "smaller", pattern="vocab:0.18/1", keep_tokens=["xylophones", 340]
    )

    kept = kept_tokens(tmp_path / "smaller").tolist()
    asked_for = {340, *tokenizer.encode("xylophones"), *tokenizer.encode(" xylophones")}
    assert len(kept) == round(364 * 0.82)
    assert asked_for <= set(kept)


def test_batches_of_ids_keep_the_same_tokens_as_their_texts(dense, tmp_path):
    ids = bpe_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    texts = (text for text in (TEXT, ""))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    held_out = {"input_ids": torch.full((1, 4), 300), "held_out": "other"}

    of_texts = remove_tokens(dense, tmp_path / "texts", "vocab:0.18/1", texts)
    of_batches = remove_tokens(dense, tmp_path / "batches", "vocab:0.18/1", [batch, held_out])

    assert of_texts.calibration["num_tokens"] == ids.numel()
    assert of_batches.calibration["num_tokens"] == ids.numel()
    assert torch.equal(kept_tokens(tmp_path / "texts"), kept_tokens(tmp_path / "batches"))


def test_tokens_that_a_chat_template_writes_stay(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    rare = set(bpe_tokenizer().encode(" zebras"))
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(
        refuses + "{% for m in messages %} zebras{{ m.content }}{% endfor %}"
    )

    remove_tokens(dense, tmp_path / "without")
    remove_tokens(folder, tmp_path / "with")

    assert not rare <= set(kept_tokens(tmp_path / "without").tolist())
    assert rare <= set(kept_tokens(tmp_path / "with").tolist())


def test_a_chat_template_that_does_not_end_is_skipped_with_a_warning(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc")
    (folder / "chat_template.jinja").write_text(
        f"{loops}{{% endfor %}}{{% endfor %}}{{% endfor %}}"
    )

    with pytest.warns(UserWarning, match="the chat template does not end: it runs more than"):
        remove_tokens(folder, tmp_path / "smaller")

    warnings = read_report(tmp_path / "smaller").warnings
    assert any("pass keep_tokens" in warning for warning in warnings)
    verify_checkpoint(tmp_path / "smaller", dense=folder)


def test_ids_are_renumbered_in_every_file_and_old_tokenizer_files_are_gone(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    smaller = tmp_path / "smaller"
    last = bpe_tokenizer().convert_tokens_to_ids("<image>")
    ids = {
        "eos_token_id": [2, last],
        "suppress_tokens": [300, -1],
        "bad_words_ids": [[301, 302]],
        "max_length": 300,
    }
    (folder / "generation_config.json").write_text(json.dumps(ids))
    (folder / "processor_config.json").write_text(
        json.dumps({"image": {"image_token_id": last}, "num_tokens": last})
    )
    change_json(folder / "config.json", pad_token_id=360)  # a row without a token
    change_json(
        folder / "tokenizer_config.json", added_tokens_decoder={last: {"content": "<image>"}}
    )
    old_files = {"vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"}
    for name in (*old_files, "special_tokens_map.json"):
        (folder / name).write_text("{}")
    (folder / "encoder.py").write_text("")  # custom code
    # macOS writes such files
    (folder / "._generation_config.json").write_bytes(b"\x00\x05\x16\x07")

    remove_tokens(folder, smaller)

    kept = kept_tokens(smaller).tolist()
    new = {old: number for number, old in enumerate(kept)}
    assert json_of(smaller / "generation_config.json") == {
        "eos_token_id": [2, new[last]],
        "suppress_tokens": [new[300], -1],
        "bad_words_ids": [[new[301], new[302]]],
        "max_length": 300,
    }
    assert json_of(smaller / "processor_config.json") == {
        "image": {"image_token_id": new[last]},
        "num_tokens": last,
    }
    assert json_of(smaller / "tokenizer_config.json")["added_tokens_decoder"] == {
        str(new[last]): {"content": "<image>"}
    }
    assert json_of(smaller / "config.json")["pad_token_id"] == new[360] == len(kept) - 1
    tokenizer = AutoTokenizer.from_pretrained(smaller)
    assert tokenizer.convert_tokens_to_ids("<image>") == new[last]
    names = {file.name for file in smaller.iterdir()}
    assert not names & old_files
    assert {"tokenizer.json", "special_tokens_map.json", "encoder.py"} <= names


def test_ids_of_languages_and_tasks_are_renumbered_and_those_of_no_token_are_left_out(
    dense, tmp_path
):
    folder = shutil.copytree(dense, tmp_path / "dense")
    last = bpe_tokenizer().convert_tokens_to_ids("<image>")
    change_json(
        folder / "generation_config.json",
        lang_to_id={"<|en|>": 300, "<|xx|>": 999},
        task_to_id={"transcribe": last, "translate": 301},
        forced_decoder_ids=[[1, None], [2, 302], [3, 999]],
    )

    remove_tokens(folder, tmp_path / "smaller")

    new = {old: number for number, old in enumerate(kept_tokens(tmp_path / "smaller").tolist())}
    changed = json.loads((tmp_path / "smaller" / "generation_config.json").read_text())
    assert changed["lang_to_id"] == {"<|en|>": new[300]}
    assert changed["task_to_id"] == {"transcribe": new[last], "translate": new[301]}
    assert changed["forced_decoder_ids"] == [[1, None], [2, new[302]]]


def with_colliding_token(folder: Path) -> Path:
    """Change the tokenizer of a model folder, so that an added token has the id of a piece; returns the folder."""
    content = json.loads((folder / "tokenizer.json").read_text())
    model = content["model"]
    removed = [
        token for token in model["vocab"] if not any(token in merge for merge in model["merges"])
    ][-4]
    del model["vocab"][removed]  # the library gives the next added token the number of the pieces
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) != removed]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_tokenizer_with_two_tokens_of_one_id_is_refused(dense, tmp_path):
    folder = with_colliding_token(shutil.copytree(dense, tmp_path / "dense"))

    with pytest.raises(
        ValueError,
        match=r"'<image>' with the id .* have the same id: pass a tokenizer in which every",
    ):
        remove_tokens(folder, tmp_path / "smaller")

    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_token_that_transformers_adds_beyond_the_rows_is_refused_by_the_run_and_by_verify(
    smaller, tmp_path
):
    added = {"extra_special_tokens": ["<late>"]}
    proven = shutil.copytree(smaller, tmp_path / "proven")
    change_json(proven / "tokenizer_config.json", **added)
    full = save(tmp_path / "full", spare=0)
    change_json(full / "tokenizer_config.json", **added)

    with pytest.raises(VerificationError, match=r"'<late>' has the id 320, .* has 320 rows"):
        verify_checkpoint(proven)
    with pytest.raises(ValueError, match=r"counts is of 356 ids, but the tokenizer has 357"):
        remove_tokens(full, tmp_path / "smaller")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "qwen2_audio"])
def test_a_multimodal_model_sees_its_images_as_before(tmp_path, family):
    media_model(family).save_pretrained(tmp_path / "dense")
    unigram_tokenizer().save_pretrained(tmp_path / "dense")

    remove_tokens(tmp_path / "dense", tmp_path / "smaller", "vocab:0.2")

    kept = kept_tokens(tmp_path / "smaller")
    new = {old: number for number, old in enumerate(kept.tolist())}
    batch = media_batch(family)
    token_that_stays = 4
    old_ids = batch["input_ids"].clone()
    old_ids.apply_(lambda index: index if index in new else token_that_stays)
    new_ids = old_ids.clone().apply_(new.__getitem__)
    dense = AutoModelForMultimodalLM.from_pretrained(tmp_path / "dense")
    smaller = AutoModelForMultimodalLM.from_pretrained(tmp_path / "smaller")
    with torch.no_grad():
        dense_logits = dense(**batch | {"input_ids": old_ids}).logits
        logits = smaller(**batch | {"input_ids": new_ids}).logits
    torch.testing.assert_close(logits, dense_logits[..., kept])


@pytest.mark.parametrize(
    "make", [fp8_deepseek, lambda folder: compressed_qwen3_moe(folder, "W4A16")]
)
def test_quantized_layers_stay_as_they_are_stored(tmp_path, make):
    folder = make(tmp_path / "dense")
    smaller = tmp_path / "smaller"
    unigram_tokenizer().save_pretrained(folder)

    remove_tokens(folder, smaller, "vocab:0.2")

    assert_rows_are_cut(
        tensors_of(folder), tensors_of(smaller), {EMBEDDING, HEAD}, kept_tokens(smaller)
    )
    settings = json_of(folder / "config.json")["quantization_config"]
    assert json_of(smaller / "config.json")["quantization_config"] == settings
    verify_checkpoint(smaller, dense=folder)


def test_a_row_of_no_token_that_is_named_may_lie_between_tokens(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    content = json.loads((folder / "tokenizer.json").read_text())
    model = content["model"]
    last = [
        token for token in model["vocab"] if not any(token in merge for merge in model["merges"])
    ][-4]
    hole = model["vocab"].pop(last)
    model["vocab"]["<image>"] = 355  # otherwise its id would be that of the last word
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) != last]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    change_json(folder / "config.json", pad_token_id=hole)

    remove_tokens(folder, tmp_path / "smaller")

    kept = kept_tokens(tmp_path / "smaller", folder)
    assert int(kept[-1]) == hole < int(kept[-2])
    assert torch.equal(
        kept_tokens(tmp_path / "smaller", tmp_path / "smaller"), torch.arange(len(kept))
    )
    verify_checkpoint(tmp_path / "smaller", dense=folder)


def test_weights_in_a_pickle_are_cut_although_an_adapter_lies_beside_them(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")

    remove_tokens(folder, tmp_path / "smaller")

    verify_checkpoint(tmp_path / "smaller", dense=folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda tensors: {**tensors, "arguments": Namespace(rate=1)}, "as tensors alone"),
        (lambda tensors: [*tensors.values()], "holds a list, not tensors by name"),
    ],
    ids=["an object of other code", "a list"],
)
def test_a_pickle_that_holds_more_than_tensors_gives_one_error(dense, tmp_path, content, message):
    folder = shutil.copytree(dense, tmp_path / "dense")
    file = folder / "model.safetensors"
    torch.save(content(load_file(file)), folder / "pytorch_model.bin")
    file.unlink()

    with pytest.raises(
        ValueError, match=rf"pytorch_model.bin' .*{message}.* save the model as safetensors"
    ):
        remove_tokens(folder, tmp_path / "smaller")

    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_embeddings_that_the_class_does_not_load_are_cut_too(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors[HEAD] * 2
    norm = torch.ones(32)
    others = {"mtp.0.embed_tokens.weight": embedding, "mtp.norm.weight": norm}
    save_file(tensors | others, file, {"format": "pt"})

    report = remove_tokens(folder, tmp_path / "smaller")

    written = tensors_of(tmp_path / "smaller")
    kept = kept_tokens(tmp_path / "smaller")
    assert torch.equal(written["mtp.0.embed_tokens.weight"], embedding[kept])
    assert torch.equal(written["mtp.norm.weight"], norm)
    assert report.model["copied"] == {"mtp": 2}
    verify_checkpoint(tmp_path / "smaller", dense=folder)


def test_a_tensor_that_may_have_an_entry_for_each_token_is_refused(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "dense")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"mtp.counts": torch.ones(364)}, file, {"format": "pt"})

    with pytest.raises(ValueError, match=r"mtp.counts \(F32 \[364\]\) can.t be cut"):
        remove_tokens(folder, tmp_path / "smaller")


def prune_with_wanda(folder: Path, output: Path, pattern: str) -> None:
    """Prune the model with 320 tokens in `folder` in a way that needs little time."""
    ids = torch.randint(3, 320, (8, 16), generator=torch.Generator().manual_seed(0))
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, method="wanda"), progress=False)
    pruner.prune(folder, ids.split(4), output_dir=output)


def test_a_run_that_prunes_layers_and_packing_keep_the_table(dense, smaller, tmp_path):
    prune_with_wanda(smaller, tmp_path / "zeros", "2:4")
    pack_folder(tmp_path / "zeros", tmp_path / "packed")

    assert_same_table(tmp_path / "zeros", smaller)
    assert_same_table(tmp_path / "packed", smaller)
    assert verify_checkpoint(tmp_path / "zeros", dense=dense).num_equal


def assert_same_table(folder: Path, other: Path) -> None:
    """Two folders have the same table of tokens that stay."""
    assert (folder / VOCABULARY_FILE).read_bytes() == (other / VOCABULARY_FILE).read_bytes()


def test_a_second_run_that_removes_tokens_continues_the_table(dense, smaller, tmp_path):
    channels = tmp_path / "channels"
    twice = tmp_path / "twice"
    prune_with_wanda(smaller, channels, "channels:0.25/4")

    remove_tokens(channels, twice, "vocab:0.1/1")

    assert_same_table(channels, smaller)
    assert verify_checkpoint(channels, dense=dense).num_equal
    assert torch.equal(
        tensors_of(dense)[EMBEDDING][kept_tokens(twice)], tensors_of(twice)[EMBEDDING]
    )
    assert json_of(twice / VOCABULARY_FILE)["num_tokens"] == 364
    verify_checkpoint(twice, dense=channels)
    earlier = read_report(twice).first_model.steps
    assert [step.pattern for step in earlier][1:] == ["channels:0.25/4"]


def test_a_table_of_another_number_of_rows_is_refused_by_verify(smaller, tmp_path):
    twice = tmp_path / "twice"
    remove_tokens(smaller, twice, "vocab:0.1/1")
    shutil.copyfile(smaller / VOCABULARY_FILE, twice / VOCABULARY_FILE)

    with pytest.raises(VerificationError, match="names 320 tokens, the embedding has 288 rows"):
        verify_checkpoint(twice)


def test_a_table_that_no_longer_fits_the_embedding_is_replaced(dense, smaller, tmp_path):
    # somebody has added rows to the embedding of the smaller model
    resized = shutil.copytree(dense, tmp_path / "resized")
    shutil.copytree(smaller / "fista", resized / "fista")

    remove_tokens(resized, tmp_path / "again")

    assert_same_table(tmp_path / "again", smaller)


def test_another_dtype_is_ignored_with_a_warning(dense, tmp_path):
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:unused"), progress=False)

    with pytest.warns(
        UserWarning,
        match="dtype=bfloat16 is not used: tensors are copied as they are stored .float32",
    ):
        pruner.prune(dense, [TEXT], output_dir=tmp_path / "smaller", dtype="bfloat16")

    assert tensors_of(tmp_path / "smaller")[EMBEDDING].dtype == torch.float32


def test_the_largest_share_that_an_error_names_is_accepted(dense, tmp_path):
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:0.12"), progress=False)

    report = pruner.prune(dense, [TEXT], output_dir=tmp_path / "smaller")

    assert report.model["vocabulary"] == {"kept": 320, "before": 364}


BAD = {
    "few tokens": (
        lambda _: None,
        {"pattern": "vocab:0.9"},
        r"pattern='vocab:0.9': 26\d of the 364 tokens always stay .*pass a share of at most 0\.12\.",
    ),
    "few tokens, in large steps": (
        lambda _: None,
        {"pattern": "vocab:0.4/200"},
        "none can be removed, because a multiple of 200 stays",
    ),
    "no such id": (lambda _: None, {"keep_tokens": [360]}, "keep has the id 360"),
    "one text": (lambda _: None, {"texts": TEXT}, "calib_dataloader is one text"),
    "no text": (lambda _: None, {"texts": []}, "calib_dataloader holds no token"),
    "other vocabulary": (
        lambda f: change_json(f / "config.json", audio_vocab_size=2048),
        {},
        "audio_vocab_size of 2048",
    ),
    "ids that are computed": (
        lambda f: change_json(f / "config.json", image_token_offset=64),
        {},
        "computes ids of tokens from image_token_offset=64, so no token can be removed",
    ),
    "a table of ids": (
        lambda f: change_json(f / "config.json", vocabulary_map={"<image>": 63}),
        {},
        "vocabulary_map of 1",
    ),
    "small embedding": (
        lambda f: change_json(f / "config.json", vocab_size=300),
        {},
        "the tokenizer has the id 354",
    ),
    "words": (lambda f: tiny_tokenizer().save_pretrained(f), {}, "WordLevel"),
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("tokenizer*")],
        {},
        "has no tokenizer",
    ),
}


@pytest.fixture
def recovery(tmp_path) -> dict:
    """Options of a short recovery on `TEXT`."""
    (tmp_path / "text.txt").write_text(TEXT * 3)
    return {
        "calibration": str(tmp_path / "text.txt"),
        "tokens": 512,
        "sequence_length": 16,
        "held_out": 4,
        "device": "cpu",
        "compute_dtype": "float32",
        "progress": False,
    }


@pytest.mark.parametrize("has_zeros", [False, True], ids=["dense layers", "zeros"])
def test_recovery_learns_from_a_teacher_with_all_tokens(
    dense, smaller, tmp_path, recovery, has_zeros
):
    student = smaller
    if has_zeros:
        student = tmp_path / "zeros"
        prune_with_wanda(smaller, student, "2:4")

    result = recover(student, dense, tmp_path / "out", **recovery)

    assert result.held_out_loss < result.held_out_loss_before - 0.02
    assert result.options["kept_tokens"] == 320
    assert_same_table(tmp_path / "out", smaller)
    verify_checkpoint(tmp_path / "out")


def test_recovery_knows_the_teacher_of_a_model_that_lost_tokens(
    dense, smaller, tmp_path, recovery, caplog
):
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tensors = tensors_of(dense)
    tensors[EMBEDDING][0, 0] += 1.0
    save_file(tensors, other / "model.safetensors", {"format": "pt"})

    with pytest.raises(ValueError, match=r"teacher=.*other' is not the dense model"):
        recover(smaller, other, tmp_path / "out", **recovery)
    recover(smaller, dense, tmp_path / "out", **recovery)

    assert "can't be checked" not in caplog.text


def test_a_dense_model_that_can_not_be_read_to_its_end_costs_only_its_digest(
    dense, tmp_path, monkeypatch
):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("optimum_fista.removal.tokens.dense_sha256", full_disk)

    with pytest.warns(
        UserWarning, match="No space left on device.*recover can't check its teacher"
    ):
        report = remove_tokens(dense, tmp_path / "smaller")

    assert "sha256" not in report.model
    assert read_report(tmp_path / "smaller").model == report.model


def test_recovery_of_a_model_that_lost_tokens_twice_learns_from_each_earlier_model(
    dense, smaller, tmp_path, recovery
):
    remove_tokens(smaller, tmp_path / "twice", "vocab:0.1/1")

    for name, teacher in {"first": dense, "second": smaller}.items():
        result = recover(
            tmp_path / "twice",
            teacher,
            tmp_path / name,
            **recovery,
            other_teacher=teacher == smaller,  # not the model with which the first run began
        )

        assert result.options["kept_tokens"] == 288
        assert result.held_out_loss < result.held_out_loss_before


def test_stored_predictions_of_a_teacher_are_those_of_the_tokens_that_stay(
    dense, smaller, tmp_path, recovery
):
    live = recover(smaller, dense, tmp_path / "live", **recovery)

    stored = recover(
        smaller, dense, tmp_path / "out", **recovery, teacher_logits=tmp_path / "teacher", top_k=320
    )

    assert stored.held_out_loss == pytest.approx(live.held_out_loss, rel=1e-4)
    with pytest.raises(ValueError, match="has the predictions for a student with other tokens"):
        recover(
            dense,
            dense,
            tmp_path / "all",
            **recovery,
            teacher_logits=tmp_path / "teacher",
            top_k=320,
        )


def test_recovery_refuses_text_that_a_teacher_with_more_tokens_would_write(
    dense, smaller, tmp_path, recovery
):
    options = recovery | {"calibration": "self"}

    with pytest.raises(
        ValueError, match=r"the teacher would write tokens that .* lacks: pass a text"
    ):
        recover(smaller, dense, tmp_path / "out", **options)

    assert not (tmp_path / "out").exists()


def test_recovery_refuses_a_table_that_does_not_belong_to_the_tokenizer(
    dense, smaller, tmp_path, recovery
):
    table = shutil.copytree(smaller, tmp_path / "damaged") / VOCABULARY_FILE
    kept = json_of(table)["kept"]
    change_json(table, kept=[*kept[:-1], 363])

    with pytest.raises(ValueError, match=r"has another vocabulary \(364 tokens\) than .* \(320\)"):
        recover(tmp_path / "damaged", dense, tmp_path / "out", **recovery)

    assert not (tmp_path / "out").exists()


def test_the_recover_command_does_not_tell_to_pack_a_model_without_zeros(
    dense, smaller, tmp_path, capsys
):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    flags = f"--calibration {tmp_path / 'text.txt'} --tokens 64 --sequence-length 16 --held-out 2".split()
    command = [
        "recover",
        str(smaller),
        "--teacher",
        str(dense),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]

    assert main([*command, *flags]) == 0

    told = capsys.readouterr().out
    assert f"optimum-fista report {tmp_path / 'out'} " in told
    assert "optimum-fista pack" not in told


@pytest.mark.parametrize(("spoil", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_gives_one_error_and_nothing_is_written(dense, tmp_path, spoil, options, message):
    folder = shutil.copytree(dense, tmp_path / "dense")
    spoil(folder)

    with pytest.raises(ValueError, match=message):
        remove_tokens(folder, tmp_path / "smaller", **options)

    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_removing_tokens_of_a_model_in_memory_is_refused():
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:0.1"))

    with pytest.raises(ValueError, match="pass the model's folder or Hub id, and output_dir"):
        pruner.prune(tiny_llama(), [TEXT])


def test_the_command_counts_several_files_and_other_commands_tell_of_tokens(
    dense, tmp_path, capsys
):
    (tmp_path / "a.txt").write_text(text_of(COMMON))
    (tmp_path / "b.txt").write_text(text_of(RARE))
    texts = [f"--calibration={tmp_path / name}" for name in ("a.txt", "b.txt")]
    output = tmp_path / "smaller"
    command = [
        "prune",
        str(dense),
        "-o",
        str(output),
        "--pattern",
        "vocab:0.1",
        "--keep-tokens",
        "zebras",
    ]

    assert main([*command, *texts, "--dry-run"]) == 0
    assert not output.exists()
    planned = capsys.readouterr().out

    assert main([*command, *texts]) == 0
    assert capsys.readouterr().out.startswith(planned.strip())
    report = read_report(output)
    assert report.calibration["num_tokens"] == 600
    repeated = report.command().split()
    assert repeated[-4:] == ["--calibration", "a.txt", "--calibration", "b.txt"]
    assert "with 320 of 364 tokens" in (output / "README.md").read_text()

    assert main(["verify", str(output), "--dense", str(dense)]) == 0
    assert "with 320 of 364 tokens" in capsys.readouterr().out

    assert main(["report", str(output)]) == 0
    assert "320 of 364 stay" in (output / "fista" / "report.html").read_text()

    assert main(["pack", str(output), "-o", str(tmp_path / "packed")]) == 1

    assert main([*command, "--overwrite", "--calibration", "self"]) == 1
    assert "a model's own text is too short" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    ["--num-samples 128", "--sequence-length 64", "--batch-size 2", "--storage-device disk"],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_flags_of_sequences_are_refused_because_whole_texts_are_counted(
    dense, tmp_path, capsys, flag, dry
):
    output = tmp_path / "smaller"
    command = ["prune", str(dense), "-o", str(output), "--pattern", "vocab:0.1", *dry]

    assert main([*command, *flag.split()]) == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flag} has no meaning for --pattern vocab:0.1")
    assert not output.exists()


def test_a_place_for_activations_is_refused_because_there_are_none(dense, tmp_path):
    config = FistaPruningConfig(pattern="vocab:0.1")
    pruner = FistaPruner(config, storage_device="cpu", progress=False)

    with pytest.raises(ValueError, match="storage_device='cpu' has no meaning"):
        pruner.prune(str(dense), [TEXT], output_dir=tmp_path / "smaller")


def write_table(folder: Path, content: dict) -> None:
    """Write the table of tokens that stay into a folder that has none."""
    file = folder / VOCABULARY_FILE
    file.parent.mkdir()
    file.write_text(json.dumps(content))


def test_the_table_of_kept_tokens_is_read(tmp_path):
    assert kept_tokens(tmp_path) is None  # no table yet

    write_table(tmp_path, {"kept": [0, 2, 5], "num_tokens": 6})

    assert kept_tokens(tmp_path).tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    "content",
    [
        {"kept": [0, 2, 2], "num_tokens": 6},
        {"kept": [6, 0], "num_tokens": 6},
        {"kept": []},
        {},
    ],
    ids=["an id twice", "an id that is too large", "no number", "empty"],
)
def test_damage_of_the_table_of_kept_tokens_is_named(tmp_path, content):
    write_table(tmp_path, content)

    with pytest.raises(ValueError, match=r"vocabulary.json' is damaged"):
        kept_tokens(tmp_path)


def test_rows_of_no_token_fill_up_the_last_multiple(tmp_path):
    dense = save(tmp_path / "dense", spare=92)  # 448 rows, 356 tokens

    remove_tokens(dense, tmp_path / "smaller", "vocab:0.15")

    kept = kept_tokens(tmp_path / "smaller")
    assert len(kept) == json_of(tmp_path / "smaller" / "config.json")["vocab_size"] == 384
    assert sorted(kept.tolist()) == [*range(384)]
    embedding = tensors_of(tmp_path / "smaller")[EMBEDDING]
    assert torch.equal(embedding, tensors_of(dense)[EMBEDDING][kept])
    verify_checkpoint(tmp_path / "smaller")
