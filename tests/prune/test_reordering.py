"""Channels of MLPs change places before they are pruned, so that n:m patterns keep more."""

import json

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from shrunken_models import parts_of
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.offload import stored_tensor
from optimum_fista.removal.parts import Part

BATCHES = tiny_tokens().split(4)


def pruner(reorder: bool = True, **options) -> FistaPruner:
    options = {"pattern": "2:4", "method": "wanda", "include": ("*down_proj",)} | options
    return FistaPruner(FistaPruningConfig(reorder_channels=reorder, **options), progress=False)


def test_sizes_of_channels_are_measured_on_the_first_tokens_alone(monkeypatch):
    def order(batches):
        report = pruner().prune(tiny_llama(), batches)
        return [operator.input_order for operator in report.operators]

    of_first_batch = order(BATCHES[:1])
    of_all_batches = order(BATCHES)
    monkeypatch.setattr("optimum_fista.prune.reordering._TOKENS_OF_ORDER", BATCHES[0].numel())

    limited = order(BATCHES)

    assert limited[0] == of_first_batch[0] != of_all_batches[0]


def biased_llama():
    model = tiny_llama(mlp_bias=True)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(len(name)))
    return model


# GPT-2 stores [in, out] and has biases; Phi-3 has a gate and an up projection in one matrix.
@pytest.mark.parametrize(
    "make", [biased_llama, lambda: tiny_model("gpt2"), lambda: tiny_model("phi3")]
)
def test_rows_and_columns_of_a_channel_move_together_and_errors_become_smaller(make):
    dense = make()
    model = make()
    plain = make()
    down = ("*mlp.c_proj" if dense.config.model_type == "gpt2" else "*down_proj",)

    errors = [
        pruner(reorder, include=down).prune(pruned, BATCHES).operators
        for reorder, pruned in ((True, model), (False, plain))
    ]

    assert sum(o.fit_error for o in errors[0]) < 0.98 * sum(o.fit_error for o in errors[1])
    before = dict(dense.named_parameters())
    after = dict(model.named_parameters())
    moved = set()
    for part in parts_of(dense, "channels").parts:
        rows = next(
            name
            for name in part.tensors
            if name.endswith("weight") and not name.startswith(part.name)
        )
        axis, _ = part.tensors[rows]
        originals, moves = (
            tensors[rows].movedim(axis, 0)[: part.groups] for tensors in (before, after)
        )
        order = [int((originals == row).all(1).nonzero()[0]) for row in moves]
        assert order != sorted(order)
        for name in part.tensors:
            expected = part.shrink(name, before[name], order)
            assert torch.equal(after[name], torch.where(after[name] == 0, 0, expected))
        moved |= part.tensors.keys()
    assert all(
        torch.equal(after[name], tensor) for name, tensor in before.items() if name not in moved
    )


def test_offloaded_weights_move_where_they_are_kept():
    model = biased_llama()
    offloaded = biased_llama()
    cpu_offload(offloaded, torch.device("cpu"))

    for each in (model, offloaded):
        pruner().prune(each, BATCHES)

    for name, weight in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(stored_tensor(offloaded.get_submodule(owner), leaf), weight)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A dense folder, and what the run made of it, files to files."""
    folder = tmp_path_factory.mktemp("reordered")
    biased_llama().save_pretrained(save_tiny_folder(folder / "dense"))
    pruner().prune(folder / "dense", BATCHES, output_dir=folder / "pruned")
    return folder


def test_reordering_from_files_to_files_gives_the_same_model_as_in_memory(streamed):
    model = biased_llama()
    pruner().prune(model, BATCHES)
    stored = {}
    for path in (streamed / "pruned").glob("model*.safetensors"):
        stored |= load_file(path)

    assert all(
        torch.equal(tensor, stored[name])
        for name, tensor in model.state_dict().items()
        if name in stored
    )
    assert json.loads((streamed / "pruned" / "fista" / "report.json").read_text())["config"][
        "reorder_channels"
    ]
    assert verify_checkpoint(streamed / "pruned", dense=str(streamed / "dense")).num_equal > 6


def test_a_layer_that_returns_something_else_is_refused_and_put_back(monkeypatch):
    shrink = Part.shrink

    def wrong(self, name, tensor, kept):
        return shrink(self, name, tensor, kept[::-1] if "up_proj" in name else kept)

    monkeypatch.setattr(Part, "shrink", wrong)
    message = r"layers\.0 does not return the same after its channels"
    with (
        Untouched(model := tiny_llama()),
        pytest.raises(UnsupportedArchitectureError, match=message),
    ):
        pruner().prune(model, BATCHES)


def test_models_whose_channels_are_not_found_are_refused():
    with pytest.raises(
        UnsupportedArchitectureError, match=r"reorder_channels=True: .* can't lose channels"
    ):
        pruner(include=()).prune(tiny_model("mixtral"), BATCHES)
