"""The teacher's predictions are stored once; the training from them is that with the teacher in memory."""

import json
import shutil

import pytest
import quick_recovery
import torch
from filelock import FileLock
from tiny_llama import TEXT, VOCABULARY, save_tiny_folder, tiny_llama

from optimum_fista import recover
from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.model import predictor
from optimum_fista.text import calibration_tokens
from optimum_fista.train import preview, recovery, recovery_plan, sequences, stored_teacher

QUICK = quick_recovery.QUICK | {"train": "all"}
SHARDS = 10


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
def run(saved, tiny_folder, text, tmp_path, monkeypatch):
    """`run("out")` recovers the saved model from predictions stored in `tmp_path / "teacher"`, in ten shards."""
    monkeypatch.setattr(stored_teacher, "_TOKENS_OF_SHARD", 64)

    def recovered(output="out", *, source=saved.folder, teacher=tiny_folder, **options):
        settings = QUICK | {"calibration": text, "teacher_logits": tmp_path / "teacher"} | options
        return recover(source, teacher, tmp_path / output, **settings)

    return recovered


def shards(folder):
    """The bytes of the shards in a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.glob("predictions-*.safetensors")}


def bits(folder):
    return (folder / "model.safetensors").read_bytes()


def losses(report):
    return [*(loss for _, _, loss in report.evaluations), report.held_out_loss]


def fail(*_, **__):
    raise AssertionError("must not be called")


def test_predictions_of_all_tokens_train_as_the_teacher_in_memory_does(run):
    live = run("live", teacher_logits=None)

    stored = run("stored", top_k=VOCABULARY)

    assert live.held_out_loss < live.held_out_loss_before - 0.02
    assert losses(stored) == pytest.approx(losses(live), rel=1e-4)  # float16 rounds logarithms


def test_products_in_bfloat16_give_nearly_the_same_as_with_the_teacher_in_memory(run, monkeypatch):
    monkeypatch.setattr(predictor, "LOGITS_PER_CHUNK", 1)  # so that a sequence has several chunks
    monkeypatch.setattr(predictor, "POSITIONS_ON_CPU", 4)
    options = {"compute_dtype": "bfloat16", "batch_size": 2, "tokens": 256}
    live = run("live", **options, teacher_logits=None)

    stored = run("stored", **options, top_k=VOCABULARY)

    assert losses(stored) == pytest.approx(losses(live), rel=1e-2)  # bfloat16 has 8 bits


def test_predictions_of_few_tokens_lower_the_loss_too(run):
    found = run(top_k=5)

    assert found.held_out_loss < found.held_out_loss_before - 0.02


def test_more_tokens_than_there_are_count_as_all_of_them(run, tmp_path):
    all_tokens = run("all", top_k=VOCABULARY)

    more = run("more", top_k=VOCABULARY + 1, teacher_logits=tmp_path / "more-teacher")

    assert losses(more) == losses(all_tokens)


def test_the_report_says_how_many_tokens_were_stored(run, tmp_path):
    run(top_k=5, tokens=64)

    assert read_report(tmp_path / "out").recoveries[-1].options["top_k"] == 5


def test_a_training_from_a_filled_folder_has_no_teacher_in_memory(run, tmp_path, monkeypatch):
    run("first")
    for module in (recovery, stored_teacher):
        monkeypatch.setattr(module, "load_model", fail)

    run("second")

    assert bits(tmp_path / "second") == bits(tmp_path / "first")


def test_a_text_that_the_teacher_writes_lies_with_its_predictions(run, tmp_path, monkeypatch):
    run("first", calibration="self", tokens=64)
    for module in (recovery, stored_teacher, calibration_tokens):
        monkeypatch.setattr(module, "load_model", fail)

    run("second", calibration="self", tokens=64)

    assert bits(tmp_path / "second") == bits(tmp_path / "first")


def test_the_same_text_gives_the_same_bytes(run, tmp_path):
    run("first")

    run("second", teacher_logits=tmp_path / "other", batch_size=2, seed=0)

    assert len(shards(tmp_path / "teacher")) == SHARDS
    assert shards(tmp_path / "other") == shards(tmp_path / "teacher")


def test_writing_that_was_interrupted_resumes_and_ends_with_the_same_bytes(
    run, tmp_path, monkeypatch
):
    run("whole", teacher_logits=tmp_path / "whole-teacher")
    write_file = stored_teacher.write_file
    written = []

    def write_three(path, tensors):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write_file(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(stored_teacher, "write_file", write_three)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    times = {path: path.stat().st_mtime_ns for path in written}
    shutil.copyfile(written[0], tmp_path / "teacher" / "half")  # a file of the user stays

    run("out")

    assert shards(tmp_path / "teacher") == shards(tmp_path / "whole-teacher")
    assert {path: path.stat().st_mtime_ns for path in written} == times
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert (tmp_path / "teacher" / "half").exists()


def test_a_shard_that_is_cut_short_is_written_again(run, tmp_path):
    run("first")
    expected = shards(tmp_path / "teacher")
    damaged = tmp_path / "teacher" / "predictions-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])

    run("second")

    assert shards(tmp_path / "teacher") == expected


@pytest.fixture
def filled(run, tmp_path):
    """The folder with the predictions of a run."""
    run("first", tokens=64)
    return tmp_path / "teacher"


def test_predictions_for_another_text_or_tokenizer_are_refused(filled, run, tmp_path):
    other_text = tmp_path / "other.txt"
    other_text.write_text(TEXT.replace("sea", "sky"))
    message = r"teacher_logits=.* has the predictions for another text, tokenizer, seed or length"

    for options in ({"calibration": str(other_text)}, {"seed": 1}, {"tokens": 128}):
        with pytest.raises(ValueError, match=message):
            run("out", **{"tokens": 64} | options, overwrite=True)


def test_predictions_with_another_tokenizer_are_refused(run, tmp_path):
    dense = save_tiny_folder(tmp_path / "dense")
    run("first", source=dense, teacher=None, tokens=64)
    tokenizer = dense / "tokenizer.json"
    swapped = tokenizer.read_text().replace('"e":', '"E":').replace('"t":', '"e":')
    tokenizer.write_text(swapped.replace('"E":', '"t":'))

    with pytest.raises(ValueError, match="for another text, tokenizer, seed or length"):
        run("out", source=dense, teacher=None, tokens=64)


def test_predictions_of_another_teacher_are_refused_before_the_text_is_drawn(
    filled, run, tmp_path, monkeypatch
):
    other = save_tiny_folder(tmp_path / "other")
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] += 1.0
    model.save_pretrained(other)
    monkeypatch.setattr(sequences, "calibration_tokens_by_name", fail)

    with pytest.raises(ValueError, match="has the predictions for another teacher"):
        run("out", teacher=other, other_teacher=True, tokens=64)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"top_k": 3}, r"another top_k \(top_k was 32, is 3\)"),
        ({"compute_dtype": "bfloat16"}, r"another compute_dtype \(compute_dtype was float32, is"),
    ],
)
def test_predictions_with_another_option_are_refused(option, message, filled, run):
    with pytest.raises(ValueError, match=message):
        run("out", **{"tokens": 64} | option)


def test_predictions_of_which_nobody_knows_the_settings_are_refused(filled, run):
    (filled / stored_teacher.SETTINGS_FILE).unlink()

    with pytest.raises(ValueError, match=r"teacher\.json is missing or damaged"):
        run("out", tokens=64)


def test_a_file_of_the_user_with_the_name_of_the_settings_is_not_overwritten(run, tmp_path):
    file = tmp_path / "teacher" / stored_teacher.SETTINGS_FILE
    file.parent.mkdir()
    file.write_text('{"name": "Ada"}')

    with pytest.raises(ValueError, match=r"teacher\.json is missing or damaged"):
        run("out", tokens=64)

    assert file.read_text() == '{"name": "Ada"}'


def test_a_folder_that_another_run_is_filling_is_refused(run, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()

    with (
        FileLock(folder / ".lock"),
        pytest.raises(OSError, match="is being filled by another run"),
    ):
        run("out", tokens=64)


def test_the_memory_of_a_training_from_stored_predictions_has_no_teacher(
    saved, tiny_folder, text, tmp_path
):
    def needed(**options):
        options = QUICK | {"calibration": text, "overwrite": False} | options
        del options["progress"]
        plan = recovery_plan.plan_recovery(
            saved.folder, tiny_folder, tmp_path / "out", processes=1, **options
        )
        return recovery_plan.choose(plan, [None]).num_bytes

    difference = needed() - needed(teacher_logits="teacher")

    assert difference == 4 * saved.report.first_model.num_parameters


def test_the_command_has_a_flag_and_a_dry_run_writes_nothing(
    saved, tiny_folder, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preview, "load_model", fail)
    command = ["recover", str(saved.folder), "--teacher", str(tiny_folder), "--output", "out"]
    command += ["--calibration", text, "--tokens", "640", "--sequence-length", "16"]
    command += ["--device", "cpu", "--teacher-logits", "stored", "--top-k", "5", "--dry-run"]

    assert main(command) == 0

    shown = capsys.readouterr().out
    assert "the 5 most likely tokens, stored in stored" in shown
    assert "seconds a step, beside the time to store predictions that are missing" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other_shape",
    [
        {"held_out": 8, "tokens": 576},  # four of the sequences to train on are held out instead
        {"held_out": 8, "sequence_length": 8},  # the same tokens, in sequences of half the length
    ],
)
def test_other_sequences_of_the_same_tokens_are_another_text(run, tmp_path, other_shape):
    documents = (
        tmp_path / "sea.jsonl"
    )  # of several documents, which are cut into consecutive windows
    documents.write_text(2 * f"{json.dumps({'text': TEXT})}\n")
    run("one", calibration=str(documents))

    with pytest.raises(ValueError, match="another text"):
        run("two", calibration=str(documents), **other_shape)


@pytest.mark.parametrize("folder", ["out", "out/teacher", "out.unfinished/journal", "dense"])
def test_a_folder_in_the_output_or_in_a_model_is_refused_at_once(
    folder, run, tmp_path, monkeypatch
):
    dense = save_tiny_folder(tmp_path / "dense")
    monkeypatch.setattr(recovery, "shared_files", fail)

    with pytest.raises(ValueError, match="unfinished folder or a model: pass a folder outside"):
        run("out", source=dense, teacher=None, teacher_logits=tmp_path / folder)
