import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import prune_and_save
from tiny_llama import tiny_llama
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_fista.evaluate.verification import Verification, VerificationError, verify_checkpoint
from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.source.model_folder import checkpoint_files

UP = "model.layers.1.mlp.up_proj.weight"
MASKS = "fista/masks.safetensors"


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the 2:4 model to break."""
    return shutil.copytree(saved.folder, tmp_path / "model")


def change(file: Path, name: str, edit) -> None:
    """Apply `edit` to a tensor of a safetensors file."""
    tensors = load_file(file)
    tensors[name] = edit(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})


def delete_tensor(folder: Path, words: str) -> None:
    """Delete the first tensor with these words in its name from the files of a folder."""
    files = checkpoint_files(folder)
    name = next(name for name in files if words in name)
    tensors = load_file(files[name])
    del tensors[name]
    save_file(tensors, files[name], metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        change_json(index, lambda values: values["weight_map"].pop(name))


def change_json(file: Path, edit) -> None:
    """Apply `edit` to the object of a JSON file, in place."""
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def change_config(folder: Path, **values) -> None:
    """Change what `config.json` promises."""
    change_json(folder / "config.json", lambda config: config["fista_pruning"].update(values))


def change_operator(folder: Path, index: int, **values) -> None:
    """Change what the report says of one operator."""
    change_json(
        folder / "fista/report.json", lambda report: report["operators"][index].update(values)
    )


def flip(bit: int):
    """An edit of a packed mask: bits are row by row, lowest bit first."""

    def edit(packed: Tensor) -> Tensor:
        packed[bit // 8] ^= 1 << (bit % 8)
        return packed

    return edit


def move(folder: Path, kept: int, pruned: int) -> None:
    """Move a kept weight to the place of a pruned one, in the weight and in its mask."""

    def edit(weight: Tensor) -> Tensor:
        flat = weight.view(-1)
        flat[pruned] = flat[kept].clone()
        flat[kept] = 0
        return weight

    change(folder / "model.safetensors", UP, edit)
    change(folder / MASKS, UP, flip(kept))
    change(folder / MASKS, UP, flip(pruned))


def broken(folder: Path, error: type[Exception] = VerificationError) -> str:
    """The error of a folder that is not as it promises."""
    with pytest.raises(error) as caught:
        verify_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", ["saved", "saved_by_rows", "saved_gpt2"])
def test_what_was_saved_is_proven(name, request):
    example = request.getfixturevalue(name)
    tensors = example.model.state_dict()
    weights = [tensors[operator.name] for operator in example.report.operators]
    seen = []

    proven = verify_checkpoint(example.folder, seen.append)

    assert proven == Verification(
        num_operators=len(weights),
        num_weights=sum(weight.numel() for weight in weights),
        num_zeros=sum(int((weight == 0).sum()) for weight in weights),
        num_parameters=example.model.num_parameters(),
    )
    assert seen == [o.name for o in example.report.operators]


@pytest.mark.parametrize("name", ["saved", "saved_gpt2"])
def test_a_single_weight_outside_the_mask_breaks_the_folder(name, request, tmp_path):
    example = request.getfixturevalue(name)
    folder = shutil.copytree(example.folder, tmp_path / "model")
    target = example.report.operators[-1].name

    def fill_last_zero(weight: Tensor) -> Tensor:
        flat = weight.view(-1)
        last_zero = int((flat == 0).nonzero()[-1])
        flat[last_zero] = 1e-3
        return weight

    change(checkpoint_files(folder)[target], target, fill_last_zero)

    assert broken(folder) == f"{target} has 1 weights outside its mask that are not zero."


def test_a_weight_that_is_not_finite_breaks_the_folder(folder):
    def fill_first_kept(weight: Tensor) -> Tensor:
        flat = weight.view(-1)
        flat[int(flat.nonzero()[0])] = torch.inf
        return weight

    change(folder / "model.safetensors", UP, fill_first_kept)

    assert broken(folder) == f"{UP} holds NaN or Inf."


def test_a_mask_that_removes_a_weight_more_breaks_the_folder(folder, saved):
    kept = int(saved.model.state_dict()[UP].view(-1).nonzero()[5])

    change(folder / MASKS, UP, flip(kept))

    assert broken(folder) == f"{UP} has 1 weights outside its mask that are not zero."


def test_a_mask_that_keeps_a_weight_more_breaks_the_folder(folder, saved):
    pruned = int((saved.model.state_dict()[UP].view(-1) == 0).nonzero()[5])

    change(folder / MASKS, UP, flip(pruned))

    assert f"{UP}: its mask keeps 769 weights, but 2:4" in broken(folder)


def test_a_weight_that_moved_to_another_group_of_its_row_breaks_the_folder(folder, saved):
    weight = saved.model.state_dict()[UP].view(-1)  # the first row: groups 0..3 and 4..7
    kept = next(i for i in range(4) if weight[i] != 0)
    pruned = next(i for i in range(4, 8) if weight[i] == 0)

    move(folder, kept, pruned)

    assert broken(folder) == f"{UP}: its mask row 0, group 0 keeps 1 of 4 weights."


def test_a_weight_that_moved_to_another_row_breaks_the_folder(saved_by_rows, tmp_path):
    folder = shutil.copytree(saved_by_rows.folder, tmp_path / "model")
    weight = saved_by_rows.model.state_dict()[UP]
    columns = weight.shape[1]
    flat = weight.view(-1)
    kept = next(i for i in range(columns) if flat[i] != 0)
    pruned = next(i for i in range(columns, 2 * columns) if flat[i] == 0)

    move(folder, kept, pruned)

    assert f"{UP}: its mask row 0 keeps" in broken(folder)


def test_n_of_m_is_checked_along_the_inputs_of_weights_that_are_stored_transposed(
    saved_gpt2, tmp_path
):
    folder = shutil.copytree(saved_gpt2.folder, tmp_path / "model")
    name = saved_gpt2.report.operators[0].name
    stored = saved_gpt2.model.state_dict()[name]  # [in, out]
    columns = stored.shape[1]
    old = int(stored[:4, 0].nonzero()[0])
    new = int((stored[4:8, 0] == 0).nonzero()[0]) + 4

    def move_along_inputs(weight: Tensor) -> Tensor:
        weight[new, 0] = weight[old, 0].clone()
        weight[old, 0] = 0
        return weight

    change(checkpoint_files(folder)[name], name, move_along_inputs)
    change(folder / MASKS, name, flip(old * columns))
    change(folder / MASKS, name, flip(new * columns))

    assert broken(folder) == f"{name}: its mask row 0, group 0 keeps 0 of 4 weights."


@pytest.mark.parametrize("file", [MASKS, "model.safetensors"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()

    assert file.removeprefix("fista/") in broken(folder, FileNotFoundError)


@pytest.mark.parametrize(("name", "value"), [("mean_fit_error", 0.01), ("num_zeros", 1)])
def test_a_wrong_promise_of_the_configuration_is_named(folder, name, value):
    change_config(folder, **{name: value})

    assert f"config.json promises {name} {value}, fista/report.json says" in broken(folder)


def test_a_configuration_without_promises_is_refused(folder):
    change_json(folder / "config.json", lambda values: values.pop("fista_pruning"))

    assert broken(folder) == "config.json has no 'fista_pruning'."


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (
            2,
            {"num_kept": 3},
            "its mask keeps 256 weights, the report says 3, and 50.000000% zeros.",
        ),
        (1, {"shape": [1, 2]}, "has shape (16, 32), the report says (1, 2)"),
        (0, {"pattern": "two of four"}, "pattern='two of four': pass "),
    ],
)
def test_a_wrong_number_of_an_operator_is_named(folder, saved, index, values, message):
    change_operator(folder, index, **values)

    error = broken(folder)

    assert error.startswith(saved.report.operators[index].name)
    assert message in error


@pytest.mark.parametrize(("name", "value"), [("num_zeros", 7424), ("mean_held_out_fit_error", 0.2)])
def test_wrong_totals_of_the_report_are_named(folder, saved, name, value):
    change_json(folder / "fista/report.json", lambda values: values["totals"].update({name: value}))

    right = saved.report.totals[name]
    message = f"fista/report.json: totals promise {name} {value}, the operators make {right}."
    assert broken(folder) == message


def test_a_class_that_transformers_does_not_have_is_not_counted(folder):
    change_json(
        folder / "fista/report.json", lambda values: values["model"].update({"class": "OfMyOwn"})
    )

    assert verify_checkpoint(folder).num_parameters is None


def test_masks_and_report_name_the_same_operators(folder):
    change_json(folder / "fista/report.json", lambda values: values["operators"].pop())

    assert broken(folder) == "the masks and the report name different operators."


def test_report_and_checkpoint_name_the_same_operators(folder):
    change_operator(folder, 0, name="gone.weight")

    assert broken(folder) == "gone.weight is in the report but not in the checkpoint."


def test_an_operator_may_get_all_the_zeros_of_its_group(tmp_path):
    report = prune_and_save(tiny_llama(), tmp_path / "model", sparsity=0.998).report

    proven = verify_checkpoint(tmp_path / "model")

    assert max(operator.target_sparsity for operator in report.operators) == 1
    assert proven.num_zeros == report.totals["num_zeros"]


def test_a_folder_may_be_given_as_text(saved):
    assert verify_checkpoint(str(saved.folder)) == verify_checkpoint(saved.folder)


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match="'no/folder': there is no such folder"):
        verify_checkpoint("no/folder")


def test_a_folder_of_an_earlier_version_promises_nothing_of_earlier_runs(folder):
    change_json(folder / "config.json", lambda values: values["fista_pruning"].pop("origin"))

    verify_checkpoint(folder)


def test_a_wrong_origin_is_named(folder):
    change_config(folder, origin={})

    assert "config.json promises origin {}, fista/report.json says" in broken(folder)


@pytest.fixture(scope="module")
def fewer_experts(tmp_path_factory) -> Path:
    """A mixture with zeros that lost a quarter of its experts; do not write to it."""
    folder = tmp_path_factory.mktemp("mixture")
    tiny_model("qwen3_moe").save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    prune_and_save(model, folder / "zeros", method="wanda", pattern="2:4")
    model = AutoModelForCausalLM.from_pretrained(folder / "zeros")
    prune_and_save(model, folder / "experts", pattern="experts:0.25")
    return folder / "experts"


@pytest.mark.parametrize(
    "words", ["embed_tokens", "q_proj", "mlp.gate.weight", "experts.0.up_proj", "model.norm"]
)
@pytest.mark.filterwarnings("ignore:the model was pruned before", "ignore:.*experts")
def test_a_mixture_whose_files_lack_a_tensor_is_broken(fewer_experts, tmp_path, words):
    verify_checkpoint(fewer_experts)
    folder = shutil.copytree(fewer_experts, tmp_path / "model")
    delete_tensor(folder, words)

    with pytest.raises(VerificationError, match="not in the checkpoint"):
        verify_checkpoint(folder)


def test_a_packed_mixture_with_fewer_experts_is_verified(fewer_experts, tmp_path):
    pack_folder(fewer_experts, tmp_path / "packed")

    verify_checkpoint(tmp_path / "packed")


def test_a_model_with_zeros_alone_whose_files_lack_a_norm_is_broken(folder):
    delete_tensor(folder, "model.norm")

    with pytest.raises(VerificationError, match=r"model\.norm\.weight is not in the checkpoint"):
        verify_checkpoint(folder)
