import errno
import json
import math
import os
import random
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from hub_standin import hub_fixture, run_with_hub  # noqa: F401
from quantized_models import fp8_llama, gguf_llama
from quick_recovery import QUICK
from safetensors.torch import load_file, save_file
from tiny_llama import TEXT, VOCABULARY, save_tiny_folder, tiny_llama, tiny_tokenizer, tiny_tokens
from tiny_models import tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig, recover
from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.checkpoint import read_recoveries, read_report
from optimum_fista.folder.output import folder_beside, unfinished_folder
from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.memory import size_text
from optimum_fista.model import predictor
from optimum_fista.prune.identity import require_same_run
from optimum_fista.source.loading import load_model
from optimum_fista.train import distillation, preview, recovery, recovery_plan, sequences
from optimum_fista.train.distillation import (
    DistillationTrainer,
    Watch,
    explaining_full_disk,
    intact_states,
)

OPERATOR_WEIGHTS = 15360  # of all operators of `tiny_llama`
NORM_WEIGHTS = 160  # of its five norms of 32 weights
CLEAR_FALL = 0.02  # of a loss: far more than rounding changes


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
def run(saved, tiny_folder, text, tmp_path):
    """`run("out")` recovers the saved model quickly, into this folder of `tmp_path`."""

    def recovered(output="out", *, source=saved.folder, teacher=tiny_folder, **options):
        settings = {"calibration": text} | QUICK | options
        return recover(source, teacher, tmp_path / output, **settings)

    return recovered


@contextmanager
def stopped_at(step: int, error: type[BaseException] = KeyboardInterrupt, *, saves: bool = False):
    """What is run inside ends with an error after this step; `saves`: every step's state was saved."""
    on_step_end = Watch.on_step_end

    def stopped(self, args, state, control, **given):
        on_step_end(self, args, state, control, **given)
        if state.global_step == step:
            raise error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Watch, "on_step_end", stopped)
        patched.setattr(distillation, "_SAVE_SECONDS", -1.0 if saves else 120.0)
        with pytest.raises(error) as caught:
            yield
        assert caught.tb  # which keeps all objects
        assert not _global_optimizer_post_hooks


def latest_state(output: Path) -> int:
    """The step of the last state that was saved of an unfinished run; 0 if there is none."""
    return max(intact_states(unfinished_folder(output) / "journal"), default=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def steps_and_losses(report) -> list[list[float]]:
    """The evaluations of a training without their seconds."""
    return [[step, loss] for step, _, loss in report.evaluations]


@pytest.mark.parametrize("train", ["all", "norms"])
def test_the_loss_falls_and_the_zeros_stay(train, run, saved, tmp_path):
    before = bits(saved.folder)

    found = run("out", train=train)

    assert found.held_out_loss < found.held_out_loss_before - CLEAR_FALL
    assert found.held_out_loss_before == found.evaluations[0][2]
    zeros = saved.report.totals["num_zeros"]
    assert (
        found.num_trained
        == {"all": OPERATOR_WEIGHTS + NORM_WEIGHTS - zeros, "norms": NORM_WEIGHTS}[train]
    )
    assert bits(saved.folder) == before
    assert verify_checkpoint(tmp_path / "out").num_zeros == zeros
    report = read_report(tmp_path / "out")
    assert report.retrained
    assert report.recoveries == [found]


@pytest.mark.parametrize("train", ["all", "norms"])
def test_trained_parameters_change_and_all_others_stay(train, run, saved, tmp_path):
    def is_trained(name: str) -> bool:
        is_norm = "layernorm" in name or name == "model.norm.weight"
        return is_norm or (train == "all" and "proj" in name)

    run("out", train=train)

    old = weights(saved.folder)
    new = weights(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if is_trained(name)}


def test_the_card_has_the_losses_of_the_recovery(run, tmp_path):
    found = run("out")

    card = (tmp_path / "out" / "README.md").read_text()
    assert "| fit error of the operators, before retraining |" in card
    assert f"held-out loss {found.held_out_loss_before:.4f}" in card


def test_a_training_that_only_worsens_the_loss_leaves_the_weights_as_they_were(
    run, saved, tmp_path
):
    found = run(train="all", relative_step=1e11)

    losses_of_training = [loss for step, _, loss in found.evaluations if step]
    assert all(loss > found.held_out_loss_before for loss in losses_of_training)
    assert found.best_step == 0
    assert found.held_out_loss == found.held_out_loss_before
    before = weights(saved.folder)
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, before[name]), name
    assert not read_report(tmp_path / "out").retrained
    verify_checkpoint(tmp_path / "out")


def test_a_rate_that_is_too_large_is_lowered_and_a_stopped_run_ends_with_the_same_bits(
    run, saved, tmp_path, caplog
):
    options = {"train": "all", "relative_step": 4.0}

    expected = run("whole", **options)
    for step in (3, 6):
        with stopped_at(step, saves=True):
            run("stopped", **options)
    resumed = run("stopped", **options)

    assert (
        "back to the weights before the training, with a quarter of the steps' size" in caplog.text
    )
    assert expected.options["relative_step"] == 0.25  # lowered after the steps 1 and 2
    steps = [step for step, *_ in expected.evaluations]
    assert steps == [0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert expected.held_out_loss < expected.held_out_loss_before - CLEAR_FALL
    assert resumed.held_out_loss == expected.held_out_loss
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")
    assert verify_checkpoint(tmp_path / "whole").num_zeros == saved.report.totals["num_zeros"]


def test_a_run_that_was_stopped_ends_with_the_same_bits(run, tmp_path):
    expected = run("whole", train="all")
    output = tmp_path / "stopped"
    half_a_state = tmp_path / "stopped.unfinished" / "journal" / "checkpoint-19"

    for last_step, saved_step, saves in (
        (4, 2, False),
        (7, 6, True),
        (8, 7, True),
        (12, 10, False),
    ):
        with stopped_at(last_step, saves=saves):
            run("stopped", train="all")
        assert latest_state(output) == saved_step
        # as a process leaves it that is killed while it saves
        half_a_state.mkdir(exist_ok=True)
        (half_a_state / "trainer_state.json").write_text('{"global_')
    resumed = run("stopped", train="all")

    assert bits(output) == bits(tmp_path / "whole")
    assert steps_and_losses(resumed) == steps_and_losses(expected)
    assert not (tmp_path / "stopped.unfinished").exists()


def test_an_interrupt_ends_the_training_after_its_step_and_a_second_one_at_once(
    run, tmp_path, monkeypatch, caplog
):
    expected = run("whole", train="all")
    compute_loss = DistillationTrainer.compute_loss
    presses_by_step = {}  # how often Ctrl-C is pressed in a step

    def interrupted(self, *given, **named):
        loss = compute_loss(self, *given, **named)
        for _ in range(presses_by_step.pop(self.state.global_step, 0)):
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(DistillationTrainer, "compute_loss", interrupted)
    for step, presses, saved_step in ((3, 1, 4), (4, 2, 4)):
        presses_by_step[step] = presses
        with pytest.raises(KeyboardInterrupt):
            run("out", train="all")
        assert latest_state(tmp_path / "out") == saved_step
        assert "stopping: this step is finished and saved first" in caplog.text
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = run("out", train="all")

    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert steps_and_losses(resumed) == steps_and_losses(expected)


@pytest.fixture
def dry_run(saved, tiny_folder, text, tmp_path, monkeypatch, capsys):
    """`dry_run()` is what the command prints with --dry-run; `tmp_path` is the working folder."""
    monkeypatch.chdir(tmp_path)
    command = ["recover", str(saved.folder), "--teacher", str(tiny_folder), "--output", "out"]
    command += ["--calibration", text, "--tokens", "640", "--sequence-length", "16"]
    command += ["--train", "norms", "--device", "cpu", "--dry-run"]

    def printed() -> str:
        assert main(command) == 0
        return capsys.readouterr().out

    return printed


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(dry_run, tmp_path):
    shown = dry_run()

    assert "160 parameters are trained (norms and biases), which takes about " in shown
    assert re.search(
        r"640 tokens of .*sea.txt, 20 steps of 1 x 2 sequences of 16 tokens; 8 more", shown
    )
    assert re.search(r"time +about 00:\d\d, 0\.\d seconds a step", shown)
    assert re.search(r"steps +each moves weights by about 1\.000% of their root mean", shown)
    assert not list(tmp_path.iterdir())


def test_a_run_says_its_plan_before_it_trains_and_the_time_after_a_step(run, caplog):
    caplog.set_level("INFO", "optimum_fista")

    run(train="all")

    messages = [record.getMessage() for record in caplog.records]
    plan = next(index for index, text in enumerate(messages) if text.startswith("pruned "))
    time = next(index for index, text in enumerate(messages) if text.startswith("one step takes"))
    first_loss = next(index for index, text in enumerate(messages) if "after step 0" in text)
    assert plan < first_loss < time
    assert "each moves weights by about 10.000% of their root mean square" in messages[plan]


def test_a_dry_run_measures_no_step_that_does_not_fit(dry_run, monkeypatch):
    monkeypatch.setattr(preview, "available_bytes", lambda device: 1000)

    shown = dry_run()

    assert "time      not measured: one step does not fit into the free memory" in shown


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def test_a_state_that_is_moved_or_damaged_does_not_change_the_bits(
    run, tmp_path, caplog, monkeypatch
):
    is_best = DistillationTrainer._determine_best_metric

    def is_best_and_early(self, **named):
        """After step 10 no state is the best, so that the best and the last one are different."""
        return self.state.global_step <= 10 and is_best(self, **named)

    monkeypatch.setattr(DistillationTrainer, "_determine_best_metric", is_best_and_early)
    expected = run("whole", train="all")
    with stopped_at(14, saves=True):
        run("out", train="all")
    unfinished = (tmp_path / "out.unfinished").rename(tmp_path / "unfinished")
    best = Path("journal", "checkpoint-10")
    last = Path("journal", "checkpoint-13")
    states = {folder.name for folder in (unfinished / "journal").glob("checkpoint-*")}
    assert states == {best.name, last.name}

    damages = {
        "moved": lambda folder: None,
        "last": lambda folder: flip_a_bit(folder / last / "optimizer.pt"),
        "half": lambda folder: (folder / last / "model.safetensors").unlink(),
        "best": lambda folder: flip_a_bit(folder / best / "model.safetensors"),
    }
    for name, damage in damages.items():
        caplog.clear()
        damage(shutil.copytree(unfinished, tmp_path / name / "out.unfinished"))
        resumed = run(f"{name}/out", train="all")

        assert bits(tmp_path / name / "out") == bits(tmp_path / "whole"), name
        assert resumed.best_step == 10
        assert resumed.held_out_loss == expected.held_out_loss
        assert ("is damaged and not used" in caplog.text) == (name != "moved")


def test_a_hub_id_is_another_model_once_its_main_has_moved(hub, saved, tiny_folder, text, tmp_path):
    code = f"""
        import json
        from pathlib import Path
        from huggingface_hub import HfApi
        from optimum_fista import recover
        from optimum_fista.train.distillation import Watch
        api, on_step_end = HfApi(), Watch.on_step_end
        def stop(*given, **named):
            raise KeyboardInterrupt
        for name, folder in (("pruned", {str(saved.folder)!r}), ("dense", {str(tiny_folder)!r})):
            api.create_repo(f"tester/{{name}}")
            api.upload_folder(repo_id=f"tester/{{name}}", folder_path=folder)
        for Watch.on_step_end, overwrite in ((stop, False), (stop, False), (on_step_end, True)):
            try:
                options = {QUICK | {"tokens": 64, "calibration": text}} | {{"overwrite": overwrite}}
                recover("tester/pruned", "tester/dense", {str(tmp_path / "out")!r}, **options)
            except (KeyboardInterrupt, ValueError) as error:
                print(type(error).__name__, error)
            config = json.loads(Path({str(tiny_folder)!r}, "config.json").read_text()) | {{"rms_norm_eps": 1e-2}}
            changed = json.dumps(config).encode()
            api.upload_file(repo_id="tester/dense", path_in_repo="config.json", path_or_fileobj=changed)
    """

    process = run_with_hub(hub, code, tmp_path)

    assert process.returncode == 0, process.stderr
    assert re.fullmatch(
        r"KeyboardInterrupt \nValueError output: .* \(teacher.config.json was .*\n", process.stdout
    )
    assert read_report(tmp_path / "out").recoveries[-1].teacher == "tester/dense"
    verify_checkpoint(tmp_path / "out")


def test_another_run_is_not_mixed_with_an_unfinished_one(run, saved, tiny_folder, tmp_path):
    other_teacher = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((other_teacher / "config.json").read_text())
    (other_teacher / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    other_masks = shutil.copytree(saved.folder, tmp_path / "masked")
    flip_a_bit(other_masks / "fista" / "masks.safetensors")

    with stopped_at(6):
        run(train="all")

    with pytest.raises(ValueError, match=r"was another one \(recovery was 5, is null"):
        require_same_run(tmp_path / "out.unfinished", {"recovery": None})
    with pytest.raises(ValueError, match=r"was another one \(teacher.config.json was"):
        run(teacher=other_teacher, train="all")
    with pytest.raises(ValueError, match=r"was another one \(masks was"):
        run(source=other_masks, train="all")
    with pytest.raises(ValueError, match=r"was another one \(options.relative_step"):
        run(train="all", relative_step=1e-3)
    assert latest_state(tmp_path / "out") == 4


def test_another_run_takes_the_place_of_one_that_is_thrown_away(run, tmp_path):
    fingerprint = tmp_path / "out.unfinished" / "journal" / "fingerprint.json"
    with stopped_at(6):
        run(train="all")
    fingerprint.unlink()  # as if it was killed while the run is thrown away

    found = run(train="norms", relative_step=1e-3)

    assert found.train == "norms"


def test_overwrite_replaces_a_model_and_an_unfinished_run_of_other_settings(run):
    run(train="norms", relative_step=1e-3)
    with stopped_at(6):
        run(train="all", overwrite=True)

    run(train="all", relative_step=1e-3, overwrite=True)

    with pytest.raises(FileExistsError, match="already holds a model"):
        run(train="all", relative_step=1e-3)


def test_a_model_that_changes_meanwhile_ends_the_run_which_resumes_once_it_is_put_back(
    run, saved, tmp_path
):
    source = shutil.copytree(saved.folder, tmp_path / "pruned")
    config = source / "config.json"
    before = config.read_text()
    train = DistillationTrainer.train

    def train_and_change(*given):
        train(*given)
        config.write_text(before + "\n")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DistillationTrainer, "train", train_and_change)
        with pytest.raises(
            ValueError, match=r"^config\.json in .*pruned' changed during the run: restore"
        ):
            run(source=source)
    assert not (tmp_path / "out").exists()
    config.write_text(before)
    run(source=source)
    run("other")

    assert bits(tmp_path / "out") == bits(tmp_path / "other")


def test_bfloat16_is_trained_in_float32_and_saved_as_it_was(run, saved_by_rows, tmp_path):
    dense = tiny_llama(tie_word_embeddings=True, intermediate_size=45).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")

    found = run(
        train="all",
        source=saved_by_rows.folder,
        teacher=tmp_path / "dense",
        compute_dtype="bfloat16",
    )

    assert found.held_out_loss < found.held_out_loss_before
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_in_16_bits_while_products_are_and_is_saved_as_it_was(tied, run, tmp_path):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    before = weights(tmp_path / "dense")
    dtypes_of_heads = set()

    def note_head(module, inputs):
        if getattr(module, "out_features", None) == VOCABULARY:
            dtypes_of_heads.add(module.weight.dtype)

    with register_module_forward_pre_hook(note_head):
        found = run(
            source=tmp_path / "dense",
            teacher=tmp_path / "dense",
            label_share=1.0,
            compute_dtype="bfloat16",
        )

    assert dtypes_of_heads == {
        torch.bfloat16
    }  # of the student, in training and when it is measured
    assert found.best_step  # so trained weights were saved
    after = weights(tmp_path / "out")
    assert after.keys() == before.keys()
    assert ("lm_head.weight" in after) != tied
    for name in after.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        assert torch.equal(after[name], before[name]), name
        assert not torch.equal(after[name], after[name].bfloat16().float()), name


def test_the_head_of_sharded_weights_is_left_as_it_is(run, monkeypatch):
    rounded = []
    monkeypatch.setattr(recovery, "round_head", lambda *_: rounded.append("head"))

    run(train="all", compute_dtype="bfloat16", tokens=128)
    assert rounded == ["head"]

    monkeypatch.setattr(recovery, "shards_weights", lambda: True)
    run(train="all", compute_dtype="bfloat16", tokens=128, overwrite=True)
    assert rounded == ["head"]  # not once more


def test_a_rounded_head_predicts_inside_autocast_what_the_whole_one_does():
    model = tiny_llama(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    in_float32 = embedding.detach().clone()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tiny_tokens()).logits
        recovery_plan.round_head(model, torch.bfloat16)
        rounded = model(tiny_tokens()).logits

    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(rounded, expected)
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, in_float32)


def test_tensors_of_a_file_of_two_dtypes_keep_theirs(run, saved_by_rows, tmp_path):
    dense = tiny_llama(tie_word_embeddings=True, intermediate_size=45).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    source = shutil.copytree(saved_by_rows.folder, tmp_path / "source")
    before = weights(source)
    in_float32 = {
        name for name in before if "norm" in name or name.endswith("layers.1.mlp.up_proj.weight")
    }
    for name in in_float32:
        before[name] = before[name].float() * (1 + 1e-4)  # which bfloat16 would round away
    save_file(before, source / "model.safetensors", {"format": "pt"})

    run(train="norms", source=source, teacher=tmp_path / "dense", compute_dtype="bfloat16")

    after = weights(tmp_path / "out")
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float32} == in_float32
    for name, tensor in after.items():
        if "norm" not in name:
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_packed_folder_gives_what_the_plain_one_gives(run, saved, tmp_path):
    pack_folder(saved.folder, tmp_path / "packed")
    plain_output = tmp_path / "plain-out"
    packed_output = tmp_path / "packed-out"

    run(plain_output, train="all")
    run(packed_output, source=tmp_path / "packed", train="all")

    assert bits(plain_output) == bits(packed_output)
    assert "quantization_config" not in json.loads((packed_output / "config.json").read_text())
    verify_checkpoint(packed_output)


def test_a_model_without_some_channels_and_layers_is_recovered(run, tmp_path):
    model = tiny_llama()
    config = FistaPruningConfig(pattern="channels:0.25/4+layers:0.5", method="wanda")
    pruner = FistaPruner(config, progress=False)
    pruner.prune(model, tiny_tokens().split(4))
    pruner.save_pretrained(model, tmp_path / "in", tiny_tokenizer())

    found = run("out", source=tmp_path / "in", train="all")

    assert found.held_out_loss < found.held_out_loss_before
    assert verify_checkpoint(tmp_path / "out").removed


def test_the_name_of_the_result_is_made_from_that_of_the_folder(saved, tiny_folder, text, tmp_path):
    source = shutil.copytree(saved.folder, tmp_path / "model")

    recover(source, tiny_folder, calibration=text, **QUICK | {"tokens": 64})

    assert (tmp_path / "model-recovered" / "config.json").exists()


def test_auto_trains_norms_alone_if_memory_does_not_suffice_for_all(run, monkeypatch, caplog):
    trained_by_free_bytes = {}

    with caplog.at_level("INFO"):
        for free in (None, 10**9, 1000):
            monkeypatch.setattr(recovery, "available_bytes", lambda device, free=free: free)
            trained_by_free_bytes[free] = run(str(free), tokens=64).train

    assert trained_by_free_bytes == {None: "all", 10**9: "all", 1000: "norms"}
    assert "160 parameters are trained (norms and biases), which takes about " in caplog.text


def test_checkpointed_layers_give_the_same_result(run, tmp_path, monkeypatch):
    for name in ("plain", "checkpointed"):
        choice = recovery_plan.Choice(
            train="all", checkpointed=name == "checkpointed", num_trained=1, num_bytes=1
        )
        monkeypatch.setattr(recovery, "choose", lambda *_, choice=choice: choice)
        run(name, tokens=64)

    checkpointed = weights(tmp_path / "checkpointed")
    for name, weight in weights(tmp_path / "plain").items():
        torch.testing.assert_close(checkpointed[name], weight, rtol=1e-4, atol=1e-5)


def test_wrapped_layers_give_the_same_result(run, tmp_path, monkeypatch):
    """As Accelerate wraps them for FSDP2 with activation checkpointing, before the optimizer is made."""
    options = {"tokens": 256, "train": "all", "relative_step": 4.0}  # so large that it backs off
    expected = run("plain", **options)
    create_optimizer = DistillationTrainer.create_optimizer

    def wrap_layers(self, model=None):
        layers = self.model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
        return create_optimizer(self, model)

    monkeypatch.setattr(DistillationTrainer, "create_optimizer", wrap_layers)
    wrapped = run("wrapped", **options)

    assert expected.options["relative_step"] < 4.0
    assert expected.best_step
    assert steps_and_losses(wrapped) == steps_and_losses(expected)
    assert bits(tmp_path / "wrapped") == bits(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokens": 31},
            r"tokens=31: one step takes 2 passes of 1 sequences of 16 tokens: pass at least 32",
        ),
        ({"tokens": 10**6}, "tokens=1000000 and held_out=4 ask for this text: text 'sea.txt' has"),
        ({"train": "some"}, "train='some': pass 'auto', 'all' or 'norms'"),
        ({"relative_step": 0.0}, r"relative_step=0\.0: pass a positive share of the weights'"),
        ({"relative_step": math.inf}, r"relative_step=inf: pass a positive share of the weights'"),
        ({"teacher": None}, "teacher is missing: the report of .* calls the dense model"),
    ],
)
def test_bad_options_are_refused(options, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(**options)

    assert not list(tmp_path.iterdir())


def test_the_folder_has_a_name_also_if_it_is_the_working_folder(saved, monkeypatch):
    monkeypatch.chdir(saved.folder)

    output = folder_beside(".", "-recovered")

    assert output == saved.folder.with_name(f"{saved.folder.name}-recovered")


def test_a_folder_that_has_lost_its_report_is_refused(run, saved, tmp_path):
    folder = shutil.copytree(saved.folder, tmp_path / "lost")
    shutil.rmtree(folder / "fista")

    with pytest.raises(
        FileNotFoundError,
        match=r"holds no fista/report\.json, but its config\.json says that it was",
    ):
        run(source=folder)


def test_a_plan_for_a_folder_that_has_lost_its_masks_is_refused(
    saved, tiny_folder, tmp_path, capsys
):
    folder = shutil.copytree(saved.folder, tmp_path / "lost")
    (folder / "fista" / "masks.safetensors").unlink()

    words = ["recover", str(folder), "--teacher", str(tiny_folder), "--calibration", "pydoc"]

    assert main([*words, "--dry-run"]) == 1

    assert "holds no fista/masks.safetensors" in capsys.readouterr().err


def test_a_dense_model_is_trained_too(run, tiny_folder, tmp_path):
    before = bits(tiny_folder)

    found = run(source=tiny_folder, label_share=1.0)

    assert found.held_out_loss < found.held_out_loss_before - CLEAR_FALL
    assert found.num_trained == OPERATOR_WEIGHTS + NORM_WEIGHTS
    assert bits(tiny_folder) == before
    output = tmp_path / "out"
    assert read_recoveries(output) == [found]
    assert not (output / "fista" / "report.json").exists()
    assert not (output / "README.md").exists()
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)


@pytest.mark.parametrize(
    ("save_quantized", "dtype"), [(fp8_llama, torch.bfloat16), (gguf_llama, torch.float32)]
)
def test_a_quantized_dense_model_is_trained_and_saved_without_quantization(
    run, tmp_path, caplog, save_quantized, dtype
):
    if save_quantized is gguf_llama:
        pytest.importorskip("gguf")
    source = save_quantized(tmp_path / "quantized")

    with caplog.at_level("INFO", "optimum_fista.train"):
        report = run(source=source, teacher=source, label_share=1.0)

    output = tmp_path / "out"
    assert report.held_out_loss < report.held_out_loss_before - CLEAR_FALL
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert {weight.dtype for weight in weights(output).values()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert f"is trained and saved without quantization, in {name}" in caplog.text
    model, tokenizer = load_model(str(output), device="cpu")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :64]
    before, _ = load_model(str(source), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        assert model(ids, labels=ids).loss < before(ids, labels=ids).loss - CLEAR_FALL


def test_a_training_says_that_it_takes_more_memory_if_a_model_cant_be_cut(
    run, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(predictor, "POSITIONS_ON_CPU", 1)
    monkeypatch.setattr(predictor, "LOGITS_PER_CHUNK", 7 * VOCABULARY)
    monkeypatch.setattr(predictor.Predictor, "_output_class_if_cut", lambda _: None)

    report = run(tokens=64)

    (warning,) = report.warnings
    num_bytes = 3 * 4 * (16 - 7) * VOCABULARY  # of student, its gradient, and teacher
    assert f"memory: about {size_text(num_bytes)} more than the plan says" in warning
    assert caplog.text.count(warning) == 1
    assert read_report(tmp_path / "out").recoveries == [report]


def test_the_command_shows_a_warning_of_the_training_when_it_arises(
    tiny_folder, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(predictor, "POSITIONS_ON_CPU", 1)
    monkeypatch.setattr(predictor, "LOGITS_PER_CHUNK", 7 * VOCABULARY)
    monkeypatch.setattr(predictor.Predictor, "_output_class_if_cut", lambda _: None)
    command = ["recover", str(tiny_folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--calibration", text, "--tokens", "64", "--sequence-length", "16"]

    assert main(command) == 0

    (warning,) = read_recoveries(tmp_path / "out")[0].warnings
    shown = capsys.readouterr().err
    assert shown.count(warning) == 1
    assert shown.index(warning) < shown.index("held-out loss")


def test_the_plan_of_a_sharded_training_counts_whole_logits(
    saved, tiny_folder, text, tmp_path, monkeypatch
):
    options = {name: value for name, value in QUICK.items() if name != "progress"}
    plan = recovery_plan.plan_recovery(
        saved.folder,
        tiny_folder,
        tmp_path / "out",
        calibration=text,
        overwrite=False,
        processes=2,
        **options,
    )

    whole = recovery_plan.choose(plan, [None, None])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = recovery_plan.choose(plan, [None, None])

    assert sharded.num_bytes - whole.num_bytes == 3 * 4 * 16 * VOCABULARY


def test_no_teacher_is_loaded_if_the_text_alone_counts(
    run, saved, tiny_folder, text, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise AssertionError("the teacher is loaded")

    for module in (recovery, preview):
        monkeypatch.setattr(module, "load_model", fail)
    options = {name: value for name, value in QUICK.items() if name != "progress"}

    def plan_with(label_share):
        return recovery_plan.plan_recovery(
            saved.folder,
            tiny_folder,
            tmp_path / "planned",
            calibration=text,
            overwrite=False,
            processes=1,
            label_share=label_share,
            **options,
        )

    found = run(label_share=1.0)

    assert found.held_out_loss < found.held_out_loss_before
    assert "the text alone counts" in preview.preview(plan_with(1.0))
    bytes_of_text_alone = recovery_plan.choose(plan_with(1.0), [None]).num_bytes
    bytes_with_teacher = recovery_plan.choose(plan_with(0.9), [None]).num_bytes
    teacher_bytes = 4 * saved.report.first_model.num_parameters  # in float32
    assert bytes_with_teacher - bytes_of_text_alone == teacher_bytes


def test_stored_predictions_are_refused_if_the_text_alone_counts(run, tmp_path):
    with pytest.raises(ValueError, match="has no meaning with label_share=1"):
        run(label_share=1.0, teacher_logits=tmp_path / "predictions")


def test_every_training_of_a_dense_model_stays_on_record(run, tiny_folder, tmp_path):
    options = {"label_share": 1.0, "tokens": 64}

    first = run("first", source=tiny_folder, **options)
    second = run("second", source=tmp_path / "first", **options, seed=1)
    third = run("third", source=tmp_path / "second", **options, train="norms")

    assert read_recoveries(tmp_path / "third") == [first, second, third]
    assert read_recoveries(tmp_path / "second") == [first, second]
    assert third.train == "norms"


def test_a_damaged_record_of_trainings_is_refused_before_the_training(run, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "trained")
    record = tmp_path / "trained" / "fista" / "recovery.json"
    record.parent.mkdir()
    record.write_text('{"recoveries": [{"teacher": 1}]}')

    with pytest.raises(ValueError, match=r"recovery\.json' is no record of trainings"):
        run(source=tmp_path / "trained")


def test_the_command_trains_a_dense_model_without_a_teacher(tiny_folder, text, tmp_path, capsys):
    command = ["recover", str(tiny_folder), "--output", str(tmp_path / "out")]
    command += ["--calibration", text, "--tokens", "64", "--sequence-length", "16"]

    assert main([*command, "--device", "cpu"]) == 0

    assert f"saved to {tmp_path / 'out'}" in capsys.readouterr().out


def test_zeros_of_an_unknown_program_are_refused(run, tiny_folder, tmp_path):
    model = tiny_llama()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data[:, ::2] = 0
    folder = save_tiny_folder(tmp_path / "zeros")
    model.save_pretrained(folder)

    with pytest.raises(
        ValueError, match=r"has no report of optimum-fista, but 7,680 of the 15,360"
    ):
        run(source=folder)

    with stopped_at(3, saves=True):
        run("filled", source=folder, fill_zeros=True)
    with pytest.raises(ValueError, match=r"was another one \(fill_zeros"):
        run("filled", source=folder)
    with pytest.raises(ValueError, match=r"has no report of optimum-fista"):
        run("filled", source=folder, overwrite=True)
    assert (
        run("filled", source=folder, fill_zeros=True).num_trained == OPERATOR_WEIGHTS + NORM_WEIGHTS
    )


def test_smaller_weights_with_a_larger_norm_before_them_are_trained_in_the_same_way(
    run, saved, tmp_path
):
    """The function stays the same, so the training has to stay the same; powers of two keep the bits."""
    factors = {
        "input_layernorm": 8.0,
        "q_proj": 1 / 8,
        "k_proj": 1 / 8,
        "v_proj": 1 / 8,
        "post_attention_layernorm": 1 / 16,
        "gate_proj": 16.0,
        "up_proj": 4.0,
        "down_proj": 4.0,  # 1 / 16 by the norm, 4 by `up_proj`
    }

    def factor(name: str) -> float:
        return next((factors[part] for part in name.split(".") if part in factors), 1.0)

    other = shutil.copytree(saved.folder, tmp_path / "other")
    scaled = {name: factor(name) * weight for name, weight in weights(other).items()}
    save_file(scaled, other / "model.safetensors", {"format": "pt"})

    expected = run("out", train="all")
    found = run("out-other", source=other, train="all")

    assert steps_and_losses(found) == steps_and_losses(expected)
    trained = weights(tmp_path / "out-other")
    for name, weight in weights(tmp_path / "out").items():
        assert torch.equal(trained[name], factor(name) * weight), name


def test_a_teacher_with_another_vocabulary_is_refused(run, tmp_path):
    other = save_tiny_folder(tmp_path / "other")
    tiny_llama(vocab_size=70).save_pretrained(other)

    with pytest.raises(ValueError, match=r"has another vocabulary \(70 tokens\) than .* \(64\)"):
        run(teacher=other)


def test_an_output_inside_the_teacher_is_refused(run, tiny_folder):
    with pytest.raises(ValueError, match="lies in the folder that is read"):
        run(tiny_folder / "out", overwrite=True)


def test_a_text_that_is_not_there_is_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr(recovery, "locked_output", None)

    with pytest.raises(FileNotFoundError, match=r"source='no\.txt': there is no such file"):
        run(calibration="no.txt")


def test_several_texts_give_equal_shares_and_take_turns(
    run, saved, tiny_folder, text, tmp_path, capsys
):
    contents = (TEXT.replace(" ", ""), TEXT[::-1].replace(" ", ""))
    backwards = tmp_path / "backwards.txt"
    backwards.write_text(TEXT[::-1])
    options = {"tokens": 160, "batch_size": 1, "held_out": 3}
    given = {name: value for name, value in (QUICK | options).items() if name != "progress"}
    plan = recovery_plan.plan_recovery(
        saved.folder,
        tiny_folder,
        tmp_path / "planned",
        calibration=[text, str(backwards)],
        overwrite=False,
        processes=1,
        **given,
    )

    drawn = sequences.draw_text(plan, tmp_path, progress=False).tokens
    report = run(calibration=[text, str(backwards)], **options)

    assert len(drawn) == 3 + 160 // 16
    # The first three are held out: two of the first text, and one of the other.
    for part in (drawn[:3], drawn[3:]):
        for turn, ids in enumerate(part):
            sequence = tiny_tokenizer().decode(ids).replace(" ", "")
            assert sequence in contents[turn % 2]
            assert sequence not in contents[1 - turn % 2]
    assert report.calibration["source"] == "sea.txt, backwards.txt"

    command = ["recover", str(saved.folder), "--teacher", str(tiny_folder), "--dry-run"]
    command += ["--calibration", text, "--calibration", str(backwards), "--tokens", "160"]
    assert main([*command, "--sequence-length", "16", "--device", "cpu"]) == 0
    assert re.search(r"160 tokens of \S*sea\.txt, \S*backwards\.txt", capsys.readouterr().out)


def test_calibration_takes_paths_and_refuses_other_kinds(run, text):
    of_path = run(calibration=Path(text))

    assert of_path.calibration["source"] == "sea.txt"
    for other in (None, {text}, text.encode(), [[text]]):
        with pytest.raises(ValueError, match=r"calibration=.*: pass 'self', a text such as"):
            run("other", calibration=other)


def test_an_unfinished_run_on_texts_in_another_order_is_refused_by_their_names(run, tmp_path):
    (tmp_path / "backwards.txt").write_text(TEXT[::-1])
    (tmp_path / "sea.txt").write_text(TEXT)
    texts = [str(tmp_path / name) for name in ("sea.txt", "backwards.txt")]
    with stopped_at(1, saves=True):
        run(calibration=texts)

    message = r'texts was \["sea.txt", "backwards.txt"\], is \["backwards.txt", "sea.txt"\]'
    with pytest.raises(ValueError, match=message):
        run(calibration=texts[::-1])

    assert run(calibration=texts).calibration["source"] == "sea.txt, backwards.txt"


def test_texts_that_begin_alike_are_different(run, tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(TEXT + name * 20)
    texts = [str(tmp_path / name) for name in ("one.txt", "two.txt")]

    report = run(calibration=texts)

    assert report.calibration["source"] == "one.txt, two.txt"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, r"calibration=\[\]: pass 'self', a text such as"),
        (["sea.txt", "sea.txt"], {}, "has the text '.*sea.txt' twice: pass it once"),
        (["owner/name", "owner/name:train"], {}, "has the text 'owner/name:train' twice"),
        (["sea.txt", "self"], {}, "a text that the teacher writes is not mixed with others"),
        (["sea.txt", "sky.txt"], {"held_out": 1}, "held_out=1 .*: pass at least 2, one sequence"),
        (
            ["sea.txt", "sky.txt", "copy.txt"],
            {"tokens": 32},
            "give 2 sequences, and there are 3 texts",
        ),
        (["sea.txt", "copy.txt"], {}, "has the same text as .*sea.txt: pass one of the two"),
        (["sea.txt", "short.txt"], {}, "of which 'short.txt' gives .* sequences: "),
    ],
)
def test_texts_that_do_not_go_together_are_refused(texts, options, message, run, tmp_path):
    files = {"sea.txt": TEXT, "sky.txt": TEXT[::-1], "copy.txt": TEXT, "short.txt": "the sky"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        run(
            calibration=[str(tmp_path / text) if text in files else text for text in texts],
            **options,
        )

    assert not (tmp_path / "out").exists()


def test_a_teacher_without_a_tokenizer_that_has_to_write_is_refused_before_any_work(
    run, tmp_path, monkeypatch
):
    tiny_llama().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(recovery, "locked_output", None)

    with pytest.raises(
        ValueError,
        match=r"dense' has no tokenizer: copy the files of its tokenizer into the folder",
    ):
        run(teacher=tmp_path / "dense", calibration="self")


def test_the_teacher_writes_the_text_if_there_is_none(run, tmp_path, capsys):
    options = {"calibration": "self", "tokens": 64}

    with stopped_at(1):
        run(**options, relative_step=1e-3)
    (file,) = (tmp_path / "out.unfinished" / "journal").glob("calibration-*")
    written = file.stat().st_mtime_ns
    with stopped_at(1):  # other settings take the place of the first, with its text
        run(**options, overwrite=True)
    written_afterwards = file.stat().st_mtime_ns
    found = run(**options)

    assert written_afterwards == written
    assert found.calibration["source"] == "self"
    assert "Self-sampling" not in capsys.readouterr().err  # QUICK asks for no progress
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def state_of_the_process() -> list:
    """Random numbers and the environment."""
    return [random.getstate(), torch.get_rng_state().tolist(), dict(os.environ)]


def test_the_settings_of_the_process_are_restored_after_a_recovery(run, monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"mixed_precision": "of the caller"})
    random.seed(1)
    before = state_of_the_process()

    run(tokens=64)

    assert state_of_the_process() == before
    assert AcceleratorState._shared_state == {"mixed_precision": "of the caller"}


def save_gpt2(folder: Path) -> Path:
    """A GPT-2 whose learned positions end at 64, with the tiny tokenizer."""
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sequence_longer_than_the_model_takes_is_refused_before_anything_is_loaded(
    family, saved, saved_gpt2, tiny_folder, text, tmp_path, monkeypatch
):
    pruned = {"llama": saved, "gpt2": saved_gpt2}[family].folder
    dense = {"llama": lambda: tiny_folder, "gpt2": lambda: save_gpt2(tmp_path / "dense")}[family]()
    monkeypatch.setattr(recovery, "load_model", None)
    monkeypatch.setattr(recovery_plan, "read_model", None)
    options = QUICK | {"calibration": text, "sequence_length": 65}

    with pytest.raises(
        ValueError,
        match=r"sequence_length=65: '.*' takes at most 64 tokens: pass at most 64 \(--sequence-length\)",
    ):
        recover(pruned, dense, tmp_path / "out", **options)

    assert not (tmp_path / "out.unfinished").exists()


def test_a_teacher_with_a_shorter_context_limits_the_sequences_too(run, tmp_path):
    short = save_tiny_folder(tmp_path / "short")
    tiny_llama(max_position_embeddings=32).save_pretrained(short)

    with pytest.raises(ValueError, match=r"sequence_length=48: '.*short' takes at most 32 tokens"):
        run(teacher=short, sequence_length=48)


def test_a_full_disk_gives_one_error_and_the_run_resumes_after_the_last_state(
    run, tmp_path, monkeypatch
):
    expected = run("whole", train="all")
    save = torch.save
    disk = SimpleNamespace(is_full=True)

    def save_until_full(values, file, *given, **named):
        """Fail as PyTorch does on a full disk, in the optimizer of the third state."""
        step = int(Path(file).parent.name.rpartition("-")[2])
        if disk.is_full and step >= 10 and Path(file).name == "optimizer.pt":
            Path(file).write_bytes(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(values, file, *given, **named)

    monkeypatch.setattr(torch, "save", save_until_full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    with pytest.raises(OSError, match="the disk is full: a state of the training takes") as full:
        run("out", train="all")
    states = intact_states(unfinished_folder(tmp_path / "out") / "journal")
    disk.is_full = False
    found = run("out", train="all")

    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == str(tmp_path / "out.unfinished" / "journal")
    assert re.search(r"takes about 18\dkiB, and 0\.98kiB are free", str(full.value))
    assert max(states) == 8
    assert not (tmp_path / "out.unfinished").exists()
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert found.held_out_loss == expected.held_out_loss


def test_a_disk_that_is_full_at_the_end_loses_no_step(run, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(recovery, "write_checkpoint", full)
        with pytest.raises(OSError, match="the disk is full: the recovered model takes") as error:
            run(train="all")

    assert error.value.filename == str(tmp_path / "out.unfinished")
    assert not (tmp_path / "out.unfinished" / "model").exists()
    assert latest_state(tmp_path / "out") == 20


def test_an_error_of_writing_on_a_disk_that_is_not_full_is_raised_as_it_is(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    refusal = PermissionError(errno.EACCES, "not allowed", "file")

    with (
        pytest.raises(PermissionError, match="not allowed"),
        explaining_full_disk(tmp_path, "a state", 10, discard=folder),
    ):
        raise refusal

    assert folder.exists()  # only a full disk needs its space
