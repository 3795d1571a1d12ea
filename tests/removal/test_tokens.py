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
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)
    return pruner.prune(folder, texts, output_dir=output)


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("vocabulary") / "dense")


@pytest.fixture(scope="module")
def smaller(dense) -> Path:
    """The dense model with the tokens of `TEXT`; do not write to it."""
    remove_tokens(dense, dense.with_name("smaller"))
    return dense.with_name("smaller")


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
    networks = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "smaller")
    ]
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("dense", "smaller")]
    old, new = (tokenizer(TEXT[:200], return_tensors="pt")["input_ids"] for tokenizer in tokenizers)
    assert torch.equal(kept[new], old)
    assert (
        tokenizers[1].decode(tokenizers[1](string.printable + "é東").input_ids)
        == string.printable + "é東"
    )
    weights, found = tensors_of(dense), tensors_of(tmp_path / "smaller")
    assert weights.keys() == found.keys()
    assert all(
        torch.equal(found[name], weights[name][kept] if name in rows else weights[name])
        for name in weights
    )
    with torch.no_grad():
        wanted, logits = (
            model(ids).logits for model, ids in zip(networks, (old, new), strict=True)
        )
    torch.testing.assert_close(logits, wanted[..., kept])
    assert (
        networks[1].config.vocab_size == len(kept) == len(tokenizers[1]) == 320
    )  # a multiple of 64
    assert report.removed.endswith("with 320 of 364 tokens")


def test_a_share_goes_tokens_that_are_asked_for_stay_and_batches_count_as_texts(dense, tmp_path):
    ids = bpe_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    held_out = {"input_ids": torch.full((1, 4), 300), "held_out": "other"}
    options = {"pattern": "vocab:0.18/1", "keep_tokens": ["xylophones", 340]}
    for name, texts in (("texts", (t for t in (TEXT, ""))), ("batches", [batch, held_out])):
        report = remove_tokens(dense, tmp_path / name, texts=texts, **options)
        assert report.calibration["num_tokens"] == ids.numel()
    kept = kept_tokens(tmp_path / "texts")
    assert len(kept) == round(364 * 0.82)
    assert {340, *bpe_tokenizer().encode("xylophones"), *bpe_tokenizer().encode(" xylophones")} <= {
        *kept.tolist()
    }
    assert torch.equal(kept, kept_tokens(tmp_path / "batches"))


def test_what_a_chat_template_writes_stays(dense, tmp_path):
    folder, rare = shutil.copytree(dense, tmp_path / "dense"), {*bpe_tokenizer().encode(" zebras")}
    assert not rare <= {
        *(remove_tokens(dense, tmp_path / "without"), kept_tokens(tmp_path / "without").tolist())[1]
    }
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(
        refuses + "{% for m in messages %} zebras{{ m.content }}{% endfor %}"
    )
    remove_tokens(folder, tmp_path / "with")
    assert rare <= {*kept_tokens(tmp_path / "with").tolist()}


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
    folder, last = (
        shutil.copytree(dense, tmp_path / "dense"),
        bpe_tokenizer().convert_tokens_to_ids("<image>"),
    )
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
    for name in (
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
    ):
        (folder / name).write_text("{}")
    (folder / "encoder.py").write_text("")  # custom code
    (folder / "._generation_config.json").write_bytes(
        b"\x00\x05\x16\x07"
    )  # macOS writes such files
    remove_tokens(folder, tmp_path / "smaller")
    kept = kept_tokens(tmp_path / "smaller").tolist()
    new = {old: number for number, old in enumerate(kept)}
    read = lambda name: json.loads((tmp_path / "smaller" / name).read_text())  # noqa: E731
    wanted = {"eos_token_id": [2, new[last]], "suppress_tokens": [new[300], -1], "max_length": 300}
    assert read("generation_config.json") == wanted | {"bad_words_ids": [[new[301], new[302]]]}
    assert read("processor_config.json") == {
        "image": {"image_token_id": new[last]},
        "num_tokens": last,
    }
    assert read("tokenizer_config.json")["added_tokens_decoder"] == {
        str(new[last]): {"content": "<image>"}
    }
    assert read("config.json")["pad_token_id"] == new[360] == len(kept) - 1
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "smaller").convert_tokens_to_ids("<image>")
        == new[last]
    )
    names = {file.name for file in (tmp_path / "smaller").iterdir()}
    assert not names & {"vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"}
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
    """A copy of a model folder in whose tokenizer an added token has the id of a piece."""
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
        ValueError, match=r"'<image>' with the id .* pass a tokenizer in which every"
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
    kept, batch = kept_tokens(tmp_path / "smaller"), media_batch(family)
    new = {old: number for number, old in enumerate(kept.tolist())}
    old = batch["input_ids"].clone().apply_(lambda index: index if index in new else 4)
    dense, smaller = (
        AutoModelForMultimodalLM.from_pretrained(tmp_path / name) for name in ("dense", "smaller")
    )
    with torch.no_grad():
        wanted = dense(**batch | {"input_ids": old}).logits[..., kept]
        found = smaller(**batch | {"input_ids": old.clone().apply_(new.__getitem__)}).logits
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "make", [fp8_deepseek, lambda folder: compressed_qwen3_moe(folder, "W4A16")]
)
def test_quantized_layers_stay_as_they_are_stored(tmp_path, make):
    folder = make(tmp_path / "dense")
    unigram_tokenizer().save_pretrained(folder)
    remove_tokens(folder, tmp_path / "smaller", "vocab:0.2")
    kept, before, after = (
        kept_tokens(tmp_path / "smaller"),
        tensors_of(folder),
        tensors_of(tmp_path / "smaller"),
    )
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], before[name][kept] if name in rows else before[name])
        for name in before
    )
    settings = [
        json.loads((tmp_path / n / "config.json").read_text())["quantization_config"]
        for n in ("dense", "smaller")
    ]
    assert settings[0] == settings[1]
    verify_checkpoint(tmp_path / "smaller", dense=folder)


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


def test_weights_of_pickle_lie_beside_those_of_an_adapter(dense, tmp_path):
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
    file, extra = (
        folder / "model.safetensors",
        {"mtp.norm.weight": torch.ones(32), "mtp.0.embed_tokens.weight": None},
    )
    tensors = load_file(file)
    extra["mtp.0.embed_tokens.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors | extra, file, {"format": "pt"})
    report = remove_tokens(folder, tmp_path / "smaller")
    found, kept = tensors_of(tmp_path / "smaller"), kept_tokens(tmp_path / "smaller")
    assert torch.equal(found["mtp.0.embed_tokens.weight"], extra["mtp.0.embed_tokens.weight"][kept])
    assert torch.equal(found["mtp.norm.weight"], extra["mtp.norm.weight"])
    assert report.model["copied"] == {"mtp": 2}
    verify_checkpoint(tmp_path / "smaller", dense=folder)
    save_file(tensors | {"mtp.counts": torch.ones(364)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"mtp.counts \(F32 \[364\]\) can.t be cut"):
        remove_tokens(folder, tmp_path / "other")


def test_a_second_run_keeps_the_table_and_runs_compose(dense, smaller, tmp_path):
    batches, table = (
        torch.randint(3, 320, (8, 16), generator=torch.Generator().manual_seed(0)).split(4),
        VOCABULARY_FILE,
    )
    for pattern, name in (("2:4", "zeros"), ("channels:0.25/4", "channels")):
        pruner = FistaPruner(FistaPruningConfig(pattern=pattern, method="wanda"), progress=False)
        pruner.prune(smaller, batches, output_dir=tmp_path / name)
        assert (tmp_path / name / table).read_bytes() == (smaller / table).read_bytes()
        assert verify_checkpoint(tmp_path / name, dense=dense).num_equal
    pack_folder(tmp_path / "zeros", tmp_path / "packed")
    assert (tmp_path / "packed" / table).read_bytes() == (smaller / table).read_bytes()
    remove_tokens(tmp_path / "channels", tmp_path / "twice", "vocab:0.1/1")
    twice = kept_tokens(tmp_path / "twice")
    embeddings = [
        tensors_of(folder)["model.embed_tokens.weight"] for folder in (dense, tmp_path / "twice")
    ]
    assert torch.equal(embeddings[0][twice], embeddings[1])
    assert json.loads((tmp_path / "twice" / table).read_text())["num_tokens"] == 364
    verify_checkpoint(tmp_path / "twice", dense=tmp_path / "channels")
    earlier = read_report(tmp_path / "twice").first_model.steps
    assert [step.pattern for step in earlier][1:] == ["channels:0.25/4"]
    # a table that is older than the embedding, to which somebody has added rows, says nothing of it
    resized = shutil.copytree(dense, tmp_path / "resized")
    shutil.copytree(smaller / "fista", resized / "fista")
    pruner = FistaPruner(FistaPruningConfig(pattern="vocab:unused"), progress=False)
    with pytest.warns(
        UserWarning,
        match="dtype=bfloat16 is not used: tensors are copied as they are stored .float32",
    ):
        pruner.prune(resized, [TEXT], output_dir=tmp_path / "again", dtype="bfloat16")
    assert (tmp_path / "again" / table).read_bytes() == (smaller / table).read_bytes()
    shutil.copyfile(smaller / table, tmp_path / "twice" / table)
    with pytest.raises(VerificationError, match="names 320 tokens, the embedding has 288 rows"):
        verify_checkpoint(tmp_path / "twice")


BAD = {
    "few tokens": (
        lambda _: None,
        {"pattern": "vocab:0.9"},
        r"pattern='vocab:0.9' of 364 tokens: .*pass 260 .*to 356",
    ),
    "no such id": (lambda _: None, {"keep_tokens": [360]}, "keep has the id 360"),
    "one text": (lambda _: None, {"texts": TEXT}, "calib_dataloader is one text"),
    "no text": (lambda _: None, {"texts": []}, "calib_dataloader holds no token"),
    "other vocabulary": (
        lambda f: change_json(f / "config.json", audio_vocab_size=2048),
        {},
        "audio_vocab_size of 2048",
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


def test_recovery_learns_from_a_teacher_with_all_tokens(dense, smaller, tmp_path):
    pruner = FistaPruner(FistaPruningConfig(pattern="2:4", method="wanda"), progress=False)
    pruner.prune(smaller, torch.randint(3, 300, (2, 16)).split(1), output_dir=tmp_path / "zeros")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    options = {
        "calibration": str(tmp_path / "text.txt"),
        "tokens": 512,
        "sequence_length": 16,
        "held_out": 4,
    }
    options |= {"device": "cpu", "compute_dtype": "float32", "progress": False}
    for folder in (smaller, tmp_path / "zeros"):
        found = recover(folder, dense, tmp_path / "out", overwrite=True, **options)
        assert found.held_out_loss < found.held_out_loss_before - 0.02
        assert found.options["kept_tokens"] == 320
        assert (tmp_path / "out" / VOCABULARY_FILE).read_bytes() == (
            smaller / VOCABULARY_FILE
        ).read_bytes()
        verify_checkpoint(tmp_path / "out")
    remove_tokens(smaller, tmp_path / "twice", "vocab:0.1/1")
    for teacher in (dense, smaller):
        found = recover(tmp_path / "twice", teacher, tmp_path / "out", overwrite=True, **options)
        assert found.options["kept_tokens"] == 288
        assert found.held_out_loss < found.held_out_loss_before
    with pytest.raises(
        ValueError, match=r"the teacher would write tokens that .* lacks: pass a text"
    ):
        recover(smaller, dense, tmp_path / "other", **options | {"calibration": "self"})
    table = shutil.copytree(smaller, tmp_path / "damaged") / VOCABULARY_FILE
    kept = json.loads(table.read_text())["kept"]
    change_json(table, kept=[*kept[:-1], 363])
    with pytest.raises(ValueError, match=r"has another vocabulary \(364 tokens\) than .* \(320\)"):
        recover(tmp_path / "damaged", dense, tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()


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


def test_a_model_in_memory_is_refused():
    with pytest.raises(ValueError, match="pass the model's folder or Hub id, and output_dir"):
        FistaPruner(FistaPruningConfig(pattern="vocab:0.1")).prune(tiny_llama(), [TEXT])


def test_the_command_counts_several_files_and_other_commands_tell_of_tokens(
    dense, tmp_path, capsys
):
    for name, words in (("a.txt", COMMON), ("b.txt", RARE)):
        (tmp_path / name).write_text(text_of(words))
    texts, output = (
        [f"--calibration={tmp_path / name}" for name in ("a.txt", "b.txt")],
        tmp_path / "smaller",
    )
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
    said = capsys.readouterr().out
    assert main([*command, *texts]) == 0
    assert capsys.readouterr().out.startswith(said.strip())
    report = read_report(output)
    assert report.calibration["num_tokens"] == 600
    assert "--calibration a.txt --calibration b.txt" in report.command()
    assert main(["verify", str(output), "--dense", str(dense)]) == 0
    assert "with 320 of 364 tokens" in capsys.readouterr().out
    assert "with 320 of 364 tokens" in (output / "README.md").read_text()
    assert main(["report", str(output)]) == 0
    assert "320 of 364 stay" in (output / "fista" / "report.html").read_text()
    assert main(["pack", str(output), "-o", str(tmp_path / "packed")]) == 1
    assert main([*command, "--overwrite", "--calibration", "self"]) == 1
    assert "a model's own text is too short" in capsys.readouterr().err
    assert main(["prune", str(dense), "-o", str(tmp_path / "zeros"), *texts]) == 1
    assert "--calibration has 2 sources" in capsys.readouterr().err


def test_the_table_of_kept_tokens_is_read_and_damage_is_named(tmp_path):
    assert kept_tokens(tmp_path) is None
    file = tmp_path / VOCABULARY_FILE
    file.parent.mkdir()
    file.write_text(json.dumps({"kept": [0, 2, 5], "num_tokens": 6}))
    assert kept_tokens(tmp_path).tolist() == [0, 2, 5]
    for damaged in (
        {"kept": [0, 2, 2], "num_tokens": 6},
        {"kept": [6, 0], "num_tokens": 6},
        {"kept": []},
        {},
    ):
        file.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"vocabulary.json' is damaged"):
            kept_tokens(tmp_path)
