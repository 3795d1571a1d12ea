"""A folder says how it was made, and a second run makes it again or says what differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import save_tiny_folder, tiny_tokens
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, save_masked
from optimum_fista.model import products
from optimum_fista.run import reproduction
from optimum_fista.run.packed_folders.packed_folder import pack_folder, unpack_folder
from optimum_fista.run.pruning import model_pruning
from optimum_fista.run.reproduction import Reproduction, reproduce

pytestmark = pytest.mark.usefixtures("one_picture")
WANDA = {"method": "wanda", "error_correction": "full"}


def batches() -> list:
    return list(tiny_tokens().split(4))


def prune(source: Path, output: Path, *, in_memory: bool = False, packed: bool = False, **options) -> Path:
    pruner = FistaPruner(FistaPruningConfig(**(options or WANDA)), progress=False)
    if in_memory:
        model = AutoModelForCausalLM.from_pretrained(source)
        pruner.prune(model, batches())
        pruner.save_pretrained(model, output)
    else:
        pruner.prune(source, batches(), output_dir=output, packed=packed, device="cpu")
    return output


def made(folder: Path) -> dict:
    return json.loads((folder / "fista" / "reproduce.json").read_text())


def again(folder: Path, model: Path | None, **options) -> Reproduction:
    return reproduce(folder, calib_dataloader=batches(), model=model, progress=False, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory) -> Path:
    return prune(source, tmp_path_factory.mktemp("pruned") / "model")


def test_all_that_a_result_depends_on_is_there_and_the_same_in_memory_and_from_files(source, pruned, tmp_path):
    found = made(pruned)
    assert found == made(prune(source, tmp_path / "memory", in_memory=True))
    assert found["model"]["name"] == "tiny"
    assert found["batches"] == [[2, 4, 16]]
    assert found["processor"]["threads"] == torch.get_num_threads()
    assert "--num-samples 8 --sequence-length 16 --batch-size 4 --device cpu --dtype float32" in found["command"]
    assert {"python", "torch", "transformers", "optimum-fista"} <= set(found["versions"])
    assert (pruned / "fista" / "reproduce.json").stat().st_size < 2048
    report = json.loads((pruned / found["config"]).read_text())
    assert FistaPruningConfig.from_json(pruned / found["config"]).to_dict() == report["config"]
    assert "origin" not in report


def test_products_are_those_of_the_first_run_whatever_is_quick_here(source, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_is_fast", lambda device: True)
    folder = prune(source, tmp_path / "pruned", compute_dtype="auto")  # with a refit, which feels the products
    assert made(folder)["arithmetic"]["products"] == "torch.bfloat16"
    monkeypatch.setattr(products, "_is_fast", lambda device: False)
    assert again(folder, source).bit_equal


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_result_has_one_digest_however_it_is_stored(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    tokens = torch.randint(0, VOCAB_SIZE, (8, 24), generator=torch.Generator().manual_seed(1))
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruner.prune(model, [tokens])
    pruner.save_pretrained(model, tmp_path / "memory")
    pruner.prune(tmp_path / "dense", [tokens], output_dir=tmp_path / "files", device="cpu")
    assert made(tmp_path / "memory") == made(tmp_path / "files")


@pytest.mark.parametrize(
    "options",
    [
        {"packed": True},
        {"pattern": "channels:0.25+heads:0.5"},
        {"pattern": "layers:0.5", "method": "wanda", "error_correction": "full"},
    ],
)
def test_a_second_run_makes_the_same_bits(source, tmp_path, options):
    folder = prune(source, tmp_path / "model", **options)
    assert again(folder, source).bit_equal
    assert not list(tmp_path.glob("*again*"))


def test_without_progress_no_bar_is_shown_while_text_is_drawn_and_the_model_is_pruned(
    source, pruned, monkeypatch, capsys
):
    seen = []
    monkeypatch.setattr(
        reproduction, "calibration_tokens_by_name", lambda *_, progress, **__: [tiny_tokens(), seen.append(progress)][0]
    )
    monkeypatch.setattr(reproduction, "_require_same_tokens", lambda *_: None)  # their source has another name
    assert reproduce(pruned, model=source, calibration="self", progress=False).bit_equal
    assert seen == [False]
    assert "Pruning" not in capsys.readouterr().err


def test_a_size_is_not_chosen_again(source, tmp_path, monkeypatch):
    folder = prune(source, tmp_path / "model", pattern="bytes:0.8")
    monkeypatch.setattr(model_pruning, "choose_size", None)  # it may measure times
    assert again(folder, source).bit_equal


def test_a_folder_that_was_packed_later_is_made_again_too(source, pruned, tmp_path):
    pack_folder(pruned, tmp_path / "packed")
    assert again(tmp_path / "packed", source, output=tmp_path / "again").bit_equal
    assert made(tmp_path / "again") == made(pruned)


def test_threads_are_those_of_the_first_run_and_then_those_of_the_caller(source, pruned, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(reproduction, "load_lazily", lambda *_, **__: seen.append(torch.get_num_threads()) or 1 / 0)
    found = made(pruned) | {"processor": made(pruned)["processor"] | {"threads": before + 1}}
    monkeypatch.setattr(reproduction, "read_json", lambda _: found)
    with pytest.raises(ZeroDivisionError):
        again(pruned, source)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def changed(folder: Path, copy: Path, name: str) -> Path:
    """A copy of a model folder, in whose tensor a bit is another."""
    shutil.copytree(folder, copy)
    file = next(f for f in sorted(copy.glob("*.safetensors")) if name in load_file(f))
    tensors = load_file(file)
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


NO_RUN = "the run has begun"


@pytest.fixture
def no_run(monkeypatch):
    """Whatever ends the call ends it before anything is pruned."""
    monkeypatch.setattr(FistaPruner, "prune", lambda *_, **__: pytest.fail(NO_RUN))


@pytest.mark.parametrize(
    ("tensor", "shown"),
    [
        ("model.layers.1.mlp.down_proj.weight", r"was pruned: model\.layers\.1 differs"),
        ("model.norm.weight", "was pruned: what is in no decoder layer differs"),
    ],
)
def test_another_model_is_named_before_any_work(source, pruned, tmp_path, no_run, tensor, shown):
    with pytest.raises(ValueError, match=shown):
        again(pruned, changed(source, tmp_path / "other", tensor))


def test_other_tokens_are_named_before_any_work(source, pruned, no_run):
    with pytest.raises(
        ValueError, match=r"tokens are not those of the first run \(sha256 was .*num_sequences was 8, is 4"
    ):
        reproduce(pruned, calib_dataloader=batches()[:1], model=source, progress=False)
    with pytest.raises(ValueError, match="came from Python and have no name"):
        reproduce(pruned, model=source, progress=False)


def test_weights_that_were_changed_after_the_run_are_named_before_any_work(source, pruned, tmp_path, no_run):
    folder = changed(pruned, tmp_path / "model", "model.norm.weight")
    with pytest.raises(ValueError, match="were changed after the run"):
        again(folder, source)
    pack_folder(folder, tmp_path / "packed")
    with pytest.raises(ValueError, match="were changed after the run"):
        again(tmp_path / "packed", source)


def test_an_output_that_is_taken_is_refused_before_any_text_is_drawn(source, pruned, no_run):
    with pytest.raises(FileExistsError, match="holds a model"):
        reproduce(pruned, pruned, model=source, progress=False)
    with pytest.raises(ValueError, match="lies in the folder that is read"):
        reproduce(pruned, pruned / "again", model=source, progress=False)


@pytest.mark.parametrize(
    ("change", "shown"),
    [({"arithmetic": None}, "it lacks arithmetic"), ({"packed": 1}, "it lacks packed"), ({"format": 2}, "reads 1")],
)
def test_what_cant_be_read_of_how_it_was_made_is_one_error(source, pruned, tmp_path, no_run, change, shown):
    folder = shutil.copytree(pruned, tmp_path / "model")
    (folder / "fista" / "reproduce.json").write_text(json.dumps(made(pruned) | change))
    with pytest.raises(ValueError, match=rf"reproduce\.json' can't be used: .*{shown}"):
        again(folder, source)


def test_a_folder_that_was_unpacked_later_is_made_again_too(source, tmp_path):
    unpack_folder(prune(source, tmp_path / "packed", packed=True), tmp_path / "unpacked")
    assert again(tmp_path / "unpacked", source).bit_equal


def test_a_model_that_lies_elsewhere_is_asked_for(pruned, tmp_path, no_run):
    folder, found = tmp_path / "model", made(pruned)
    shutil.copytree(pruned, folder)
    (folder / "fista" / "reproduce.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no fista/reproduce\.json"):
        again(folder, None)
    for name in ("elsewhere", ""):
        found["model"] |= {"name": name, "is_local": True}
        (folder / "fista" / "reproduce.json").write_text(json.dumps(found))
        with pytest.raises(FileNotFoundError, match=r"pass where it is \(--model\)"):
            again(folder, None)


def test_what_differs_is_said_first(source, pruned, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(reproduction, "library_versions", lambda: made(pruned)["versions"] | {"torch": "9"})
    monkeypatch.setattr(FistaPruner, "prune", lambda *_, **__: said.append("pruned") or 1 / 0)
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    with pytest.raises(ZeroDivisionError):
        again(pruned, other, say=said.append)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"the result is another one, .* \(rms_norm_eps was 1e-06, is 0\.01\)"):
        again(pruned, other)
    assert said[1:] == ["model_config.rms_norm_eps was 1e-06, is 0.01", "pruned"]
    assert said[0].startswith('versions.torch was "')
    assert said[0].endswith('is "9"')


def test_results_that_differ_are_told_by_how_much(source, pruned, tmp_path, monkeypatch):
    prune_as_before = FistaPruner.prune

    def prune_another(self, model, batches, **options):
        self.config = FistaPruningConfig(**{**WANDA, **change})
        return prune_as_before(self, model, batches, **options)

    monkeypatch.setattr(FistaPruner, "prune", prune_another)
    change = {"sparsity": 0.53}
    found = again(pruned, source)
    assert not found.bit_equal
    assert 0.95 < found.mask_agreement < 1
    assert 0 < max(found.error_changes.values()) < 0.5
    change = {"method": "magnitude"}
    found = again(pruned, source)
    assert not found.nearly_equal
    assert 0.5 < found.mask_agreement < 0.95
    assert "NOT equal: masks agree in" in str(found)


@pytest.mark.parametrize(("family", "pattern"), [("gpt2", "2:4"), ("llama", "channels:0.25")])
def test_weights_that_were_changed_before_they_were_saved_are_found(family, pattern, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern), progress=False)
    name = pruner.prune(model, batches()).operators[-1].name
    with torch.no_grad():
        model.get_parameter(name).mul_(3)
    pruner.save_pretrained(model, tmp_path / "pruned")
    found = again(tmp_path / "pruned", tmp_path / "dense")
    assert found.mask_agreement == 1
    assert not any(found.error_changes.values())
    assert {n: change for n, change in found.weight_changes.items() if change} == {name: pytest.approx(2 / 3)}
    assert not found.nearly_equal


def test_what_processors_differ_by_has_limits():
    assert str(Reproduction(True)).startswith("bit-equal")
    found = Reproduction(False, 0.96, {"a": 0.01, "b": 0.1}, {"a": 0.2})
    assert found.nearly_equal
    assert str(found) == (
        "equal within what processors differ by: masks agree in 96.00% of the weights, "
        "errors differ most in b (10.0%), a (1.0%), weights that both keep in a (20.0%)"
    )
    for far in (
        Reproduction(False, 0.94, {"a": 0.01}),
        Reproduction(False, 0.96, {"a": 0.11}),
        Reproduction(False, 0.96, {"a": 0.01}, {"a": 0.9}),
        Reproduction(False, 0.96, {"a": 0.01}, {"a": float("nan")}),
        Reproduction(False, 0.0),
    ):
        assert not far.nearly_equal
        assert str(far).startswith("NOT equal: ")


def test_a_trained_folder_does_not_say_that_pruning_makes_it(pruned, tmp_path):
    save_masked(AutoModelForCausalLM.from_pretrained(pruned), tmp_path / "trained", pruned)
    assert not (tmp_path / "trained" / "fista" / "reproduce.json").exists()
    with pytest.raises(ValueError, match="was trained after pruning"):
        again(tmp_path / "trained", None)
