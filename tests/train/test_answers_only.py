"""With `answers_only`, tokens of answers alone count in the losses of a recovery."""

import json
import shutil

import pytest
import quick_recovery
import torch
from launched import exit_codes, launch, recover_together
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_fista import recover
from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.model.predictor import Predictor
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import windows_with_answers
from optimum_fista.train import distillation, stored_teacher
from optimum_fista.train import recovery as recovery_module
from optimum_fista.train.distillation import Watch

QUICK = quick_recovery.QUICK | {"train": "all", "answers_only": True}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
SENTENCES = [sentence for sentence in TEXT.split(". ") if sentence]


def chat_tokenizer():
    """A tokenizer with a token for each character, and a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The dense model, with a chat template."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(saved, tmp_path_factory):
    """The pruned model, with the same template."""
    folder = tmp_path_factory.mktemp("student") / "llama-2-4"
    shutil.copytree(saved.folder, folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Conversations with answers of different lengths."""
    file = tmp_path_factory.mktemp("text") / "chat.jsonl"
    with file.open("w") as lines:
        for number, sentence in enumerate(SENTENCES):
            turns = [
                {"role": "user", "content": "what is deep?"},
                {"role": "assistant", "content": sentence[: 5 + 3 * number]},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return str(file)


@pytest.fixture
def run(student, teacher, text, tmp_path):
    """`run("out")` recovers the pruned model on answers alone."""

    def recovered(output="out", **options):
        settings = QUICK | {"calibration": text} | options
        return recover(student, teacher, tmp_path / output, **settings)

    return recovered


def bits(folder):
    return (folder / "model.safetensors").read_bytes()


def losses(report):
    return [*(loss for _, _, loss in report.evaluations), report.held_out_loss]


def test_the_held_out_loss_is_the_mean_over_tokens_of_answers(run, student, text):
    report = run(tokens=64)

    conversations = load_text(text, "calibration")
    tokens, answers = windows_with_answers(chat_tokenizer(), conversations, 8, 16, 0, held_out=4)
    held_out = tokens[:4]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(student)(held_out).logits
    of_tokens = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten(), reduction="none"
    )
    of_answers = of_tokens[answers[:4, 1:].flatten()]
    assert 0 < len(of_answers) < len(of_tokens)
    assert report.held_out_loss_before == pytest.approx(float(of_answers.mean()), rel=1e-5)
    assert report.options["answers_only"] is True
    assert "held-out sequences of 16 tokens, answers alone; " in str(report)


def test_each_token_of_an_answer_counts_as_much_in_batches_of_any_size(run):
    """The step of all sequences in one pass is that of one sequence after the other."""
    options = {"tokens": 128, "compute_dtype": "float32"}
    whole = run("whole", batch_size=8, accumulate=1, **options)
    parts = run("parts", batch_size=1, accumulate=8, **options)

    assert whole.evaluations[-1][0] == parts.evaluations[-1][0] == 1
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_answers_are_learned(run):
    report = run()

    assert report.held_out_loss < report.held_out_loss_before - 0.02


def test_predictions_that_were_stored_for_all_tokens_serve_answers(run, tmp_path, monkeypatch):
    run("all", teacher_logits=tmp_path / "teacher", answers_only=False)
    live = run("live")
    for module in (recovery_module, stored_teacher):
        monkeypatch.setattr(module, "load_model", None)

    stored = run("stored", teacher_logits=tmp_path / "teacher", top_k=32)

    # 32 of 64 tokens, in float16
    assert losses(stored) == pytest.approx(losses(live), rel=1e-2)
    assert stored.held_out_loss_before == live.held_out_loss_before


def test_an_interrupted_training_resumes_with_the_same_bits(run, tmp_path, monkeypatch):
    run("whole")
    on_step_end = Watch.on_step_end

    def stopped(self, args, state, control, **given):
        on_step_end(self, args, state, control, **given)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Watch, "on_step_end", stopped)
        patched.setattr(distillation, "_SAVE_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            run("out")

    with pytest.raises(ValueError, match="answers_only"):
        run("out", answers_only=False)
    run("out")

    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_two_processes_train_on_answers_as_one_does(run, student, teacher, text, tmp_path):
    one = run("one", tokens=128)
    given = {"folder": student, "teacher": teacher, "output_dir": tmp_path / "two"}
    call = given | QUICK | {"calibration": text, "tokens": 128}

    assert exit_codes(launch(2, recover_together, [call], tmp_path / "log")) == [0, 0]

    two = read_report(tmp_path / "two").recoveries[-1]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": sentence} for sentence in SENTENCES], "has no conversations"),
        (
            [{"messages": [{"role": "user", "content": sentence}]} for sentence in SENTENCES],
            "none of the 64 tokens of 'other.jsonl' that are held out is of an answer",
        ),
    ],
)
def test_a_text_without_answers_is_refused(rows, message, run, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    with pytest.raises(ValueError, match=message):
        run(calibration=str(file))


def test_a_text_that_the_teacher_writes_has_no_answers(run):
    with pytest.raises(ValueError, match=r"answers_only=True: a text that the teacher writes"):
        run(calibration="self")


def test_the_command_trains_on_answers(student, teacher, text, tmp_path, capsys):
    command = ["recover", str(student), "--teacher", str(teacher), "--calibration", text]
    command += ["--answers-only", "--tokens", "64", "--sequence-length", "16", "--batch-size", "1"]
    command += ["--output", str(tmp_path / "out"), "--device", "cpu", "--held-out", "4"]

    assert main([*command, "--dry-run"]) == 0
    assert "only answers count in the loss" in capsys.readouterr().out

    assert main(command) == 0
    assert read_report(tmp_path / "out").recoveries[-1].options["answers_only"] is True


def test_a_dry_run_times_as_many_predictions_as_a_pass_of_the_run_has(
    student, teacher, text, tmp_path, monkeypatch
):
    num_positions = []
    logits = Predictor.logits

    def counting(self, hidden):
        num_positions.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Predictor, "logits", counting)
    command = ["recover", str(student), "--teacher", str(teacher), "--calibration", text]
    command += ["--answers-only", "--tokens", "64", "--sequence-length", "16", "--held-out", "4"]
    command += ["--output", str(tmp_path / "out"), "--device", "cpu", "--batch-size", "2"]

    assert main([*command, "--dry-run"]) == 0

    conversations = load_text(text, "calibration")
    _, answers = windows_with_answers(chat_tokenizer(), conversations, 8, 16, 0, held_out=4)
    num_of_batch = round(2 * int(answers[4:, 1:].sum()) / 4)
    assert 2 < num_of_batch < 30
    # Two passes of both models, after the two tokens by which each is cut.
    assert num_positions == [2, 2, *(4 * [num_of_batch])]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_the_text_that_the_run_refuses(student, teacher, tmp_path, capsys):
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    command = ["recover", str(student), "--teacher", str(teacher), "--calibration", str(file)]
    command += ["--answers-only", "--tokens", "64", "--sequence-length", "16", "--held-out", "4"]

    assert main([*command, "--output", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]) == 1

    assert "has no conversations" in capsys.readouterr().err
