"""The temperature is divided into the model, in memory and in files, and everything knows of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from families import family_model
from folder_files import files_of
from killed import Killed, interrupted_after, killed_at_write
from pruning import prune
from safetensors.torch import load_file, save_file
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.loss_probe import LossProbe, Temperature
from optimum_fista.model.offload import stored_tensor
from optimum_fista.run.evaluation.verification import VerificationError, verify_checkpoint
from optimum_fista.run.ranks import require_independent_layers
from optimum_fista.run.reproduction import reproduce

BATCHES = tiny_tokens(16, 16).split(4)
NORM = "model.norm.weight"
AGAIN = "what the temperature is fitted to can't be taken up again: all layers are pruned again"


def pruner(scaled: bool = True, **options) -> FistaPruner:
    options = {"pattern": "2:4", "held_out": 5} | options
    return FistaPruner(FistaPruningConfig(temperature_scaling=scaled, **options), progress=False)


def sure_llama(**options):
    """A model whose predictions are sure enough to be worth a temperature."""
    model = tiny_llama(**options)
    model.model.norm.weight.data.mul_(3)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "wanda", "error_correction": "none"}, {"pattern": "channels:0.25"}, {"pattern": "layers:0.5"}],
    ids=["default", "independent layers", "channels", "layers"],
)
def test_logits_are_divided_and_nothing_else_changes(options):
    model, plain = sure_llama(num_hidden_layers=4), sure_llama(num_hidden_layers=4)
    report = pruner(**options).prune(model, BATCHES)
    expected = pruner(False, **options).prune(plain, BATCHES)
    found, ids = report.temperature, torch.cat(BATCHES)[-5:]
    assert expected.temperature is None
    assert found.value != 1.0
    assert found.divergence < found.divergence_before
    for name, weight in plain.state_dict().items():
        wanted = weight / found.value if name == NORM else weight
        torch.testing.assert_close(model.state_dict()[name], wanted, rtol=1e-6, atol=0)
    with torch.no_grad():
        logits, others = (each(input_ids=ids, use_cache=False).logits for each in (model, plain))
        torch.testing.assert_close(logits * found.value, others, rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert report.perplexity["pruned"] == pytest.approx(loss, rel=1e-4)
    assert [o.fit_error for o in report.operators] == [o.fit_error for o in expected.operators]


def test_offloaded_models_get_it_where_their_weights_are_kept():
    model, offloaded = sure_llama(), sure_llama()
    cpu_offload(offloaded, torch.device("cpu"))
    for each in (model, offloaded):
        assert pruner().prune(each, BATCHES).temperature.tensors
    assert torch.equal(stored_tensor(offloaded.model.norm, "weight"), model.model.norm.weight)


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_that_fails_after_it_leaves_the_model_as_it_was(offload, monkeypatch):
    model = sure_llama()
    model = cpu_offload(model, torch.device("cpu")) if offload else model
    before = stored_tensor(model.model.norm, "weight").clone()
    monkeypatch.setattr("optimum_fista.run.pruner.summary", lambda report: 1 / 0)
    with Untouched(model), pytest.raises(ZeroDivisionError):
        pruner().prune(model, BATCHES)
    assert torch.equal(stored_tensor(model.model.norm, "weight"), before)


def test_an_error_while_it_is_measured_leaves_the_model_as_it_was(monkeypatch):
    found = LossProbe._divergences

    def fail(self, scaled, temperatures):
        with scaled.divided(1.5):
            found(self, scaled, temperatures)
            raise KeyboardInterrupt

    monkeypatch.setattr(LossProbe, "_divergences", fail)
    with Untouched(model := sure_llama()), pytest.raises(KeyboardInterrupt):
        pruner().prune(model, BATCHES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense folder, and what the run made of it, files to files."""
    folder = tmp_path_factory.mktemp("temperature")
    sure_llama().save_pretrained(save_tiny_folder(folder / "dense"))
    pruner().prune(folder / "dense", BATCHES, output_dir=folder / "pruned")
    return folder


def test_files_to_files_gives_the_same_model(folder):
    model = sure_llama()
    report = pruner().prune(model, BATCHES)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    saved = json.loads((folder / "pruned" / "fista" / "report.json").read_text())
    assert saved["temperature"] == {**vars(report.temperature)}
    assert f"divided by {report.temperature.value:.3f}" in (folder / "pruned" / "README.md").read_text()


@pytest.mark.parametrize("number", range(2, 12))
def test_a_killed_run_resumes_to_the_same_bytes(folder, tmp_path, number):
    with pytest.raises(Killed), killed_at_write(number):
        pruner().prune(folder / "dense", BATCHES, output_dir=tmp_path / "again")
    report = pruner().prune(folder / "dense", BATCHES, output_dir=tmp_path / "again")
    assert report.temperature.tensors == {NORM: 0.0}
    found, expected = (
        {n: b for n, b in files_of(f).items() if n.endswith(".safetensors")}
        for f in (tmp_path / "again", folder / "pruned")
    )
    assert found == expected


def test_a_run_that_lost_what_it_measures_on_prunes_again(folder, tmp_path, caplog):
    with pytest.raises(Killed), killed_at_write(12):
        pruner().prune(folder / "dense", BATCHES, output_dir=tmp_path / "again")
    probes = list((tmp_path / "again.unfinished").rglob("probe-*"))
    assert probes
    for probe in probes:
        probe.unlink()
    pruner().prune(folder / "dense", BATCHES, output_dir=tmp_path / "again")
    assert AGAIN in caplog.text
    again, pruned = (load_file(each / "model.safetensors") for each in (tmp_path / "again", folder / "pruned"))
    assert all(torch.equal(tensor, pruned[name]) for name, tensor in again.items())


def test_a_run_that_prunes_again_writes_the_temperature_that_it_finds(folder, tmp_path, monkeypatch):
    output = tmp_path / "again"
    with monkeypatch.context() as patched:
        patched.setattr("optimum_fista.run.streamed.file_sink.write_all_but_weights", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pruner().prune(folder / "dense", BATCHES, output_dir=output)
    next((tmp_path / "again.unfinished").rglob("probe-*")).unlink()
    monkeypatch.setattr(LossProbe, "_fit", lambda self, scaled: Temperature(1.25, 2.0, 1.0, scaled.tensors))
    pruner().prune(folder / "dense", BATCHES, output_dir=output)
    weights = [load_file(each / "model.safetensors")[NORM] for each in (output, folder / "dense")]
    torch.testing.assert_close(weights[0] * 1.25, weights[1])


def test_layers_that_share_a_dictionary_are_pruned_again_if_a_run_resumes(tmp_path, caplog):
    family_model("gemma3n_text").save_pretrained(tmp_path / "dense")
    with pytest.raises(KeyboardInterrupt), interrupted_after(1):
        pruner().prune(tmp_path / "dense", BATCHES, output_dir=tmp_path / "again")
    for name in ("again", "whole"):
        pruner().prune(tmp_path / "dense", BATCHES, output_dir=tmp_path / name)
    assert AGAIN in caplog.text
    again, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "whole"))
    assert again == whole


def test_verify_takes_the_temperature_of_the_report_and_nothing_else(folder, tmp_path):
    assert verify_checkpoint(folder / "pruned", dense=str(folder / "dense")).num_equal > 4
    changed = shutil.copytree(folder / "pruned", tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    save_file(tensors | {NORM: tensors[NORM] * 1.01}, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=f"{NORM} differs"):
        verify_checkpoint(changed, dense=str(folder / "dense"))


def test_a_second_run_finds_the_same(folder):
    assert reproduce(folder / "pruned", model=folder / "dense", calib_dataloader=BATCHES, progress=False).bit_equal


def test_logits_that_are_not_finite_are_not_divided(monkeypatch):
    monkeypatch.setattr(LossProbe, "_divergences", lambda self, scaled, temperatures: [torch.nan] * len(temperatures))
    model = sure_llama()
    with pytest.warns(UserWarning, match="logits of the held-out sequences are NaN or Inf"):
        report = pruner().prune(model, BATCHES)
    assert report.temperature is None
    assert torch.equal(model.model.norm.weight, sure_llama().model.norm.weight)


def test_padding_is_left_out():
    ids = torch.cat(BATCHES)
    padded = torch.nn.functional.pad(ids, (0, 4), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(padded.split(4), mask.split(4), strict=True)]
    found = [pruner().prune(sure_llama(), each).temperature for each in (batches, BATCHES)]
    assert found[0].value == pytest.approx(found[1].value, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to fit the temperature to: pass held_out=4"),
        ({"held_out": 2, "pattern": "experts:0.5"}, "removes experts: leave it out"),
    ],
)
def test_what_can_not_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FistaPruningConfig(temperature_scaling=True, **options)


def test_several_processes_are_refused():
    config = FistaPruningConfig(temperature_scaling=True, held_out=2, error_correction="intra")
    require_independent_layers(config, 1)
    with pytest.raises(ValueError, match="temperature_scaling=True compares whole models, which 2 processes"):
        require_independent_layers(config, 2)


def test_held_out_sequences_of_one_token_are_refused():
    with pytest.raises(ValueError, match="no held-out sequence has two tokens"):
        prune(tiny_llama(), [*BATCHES, torch.ones(2, 1, dtype=torch.long)], temperature_scaling=True, held_out=2)


def test_layers_that_share_more_than_hidden_states_are_refused():
    model = tiny_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossProbe, "begin", lambda self: False)
        with Untouched(model), pytest.raises(ValueError, match="its layers share more than hidden states"):
            pruner().prune(model, BATCHES)
