import pytest
import torch
from folder_files import files_of
from killed import Killed, killed_at_write
from layer_problems import example
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from torch import nn

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.pruning import budgets
from optimum_fista.solve.methods.taylor import Taylor
from optimum_fista.solve.patterns import Columns
from optimum_fista.solve.problem import LayerProblem

TOKENS = tiny_tokens()
CONFIG = FistaPruningConfig(pattern="channels:0.5/4+heads:0.5", method="taylor")


def test_groups_with_the_largest_sums_stay_and_no_weight_changes():
    made = example(6, 16)
    made.problem.loss_changes = torch.tensor([3.0, 0, 1, 1, 0, 0, 9, 0, 2, 2, 1, 1, 0, 3, 0, 0])
    pruned = Taylor().prune(made.problem, Columns(0.5, width=2))
    assert pruned.mask[0].nonzero().flatten().tolist() == [0, 1, 6, 7, 8, 9, 12, 13]
    assert torch.equal(pruned.weight, made.weight * pruned.mask)
    assert pruned.converged


def test_without_gradients_it_is_refused():
    made = example(4, 8)
    with pytest.raises(ValueError, match=r"weight: method 'taylor' needs gradients .*prune a model"):
        Taylor().prune(LayerProblem(made.weight, made.problem.statistics), Columns(0.5))
    with pytest.raises(ValueError, match=r"method 'taylor' can't remove single weights"):
        FistaPruningConfig(0.5, method="taylor")
    config = FistaPruningConfig(pattern="columns:0.5", method="taylor")
    with pytest.raises(ValueError, match=r"weight: method 'taylor' needs gradients"):
        FistaPruner(config).prune_weight(made.weight.float(), made.inputs.float())


def test_the_channels_that_stay_are_those_of_plain_gradients():
    model = tiny_llama()
    report = FistaPruner(CONFIG, progress=False).prune(model, TOKENS.split(4))
    dense = tiny_llama()
    for ids in TOKENS:
        logits = dense(input_ids=ids[None]).logits[0]
        nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
    kept = {operator.name: operator.groups_kept for operator in report.operators}
    for index, layer in enumerate(dense.model.layers):
        mlp = layer.mlp
        terms = [p.weight * p.weight.grad for p in (mlp.down_proj, mlp.gate_proj, mlp.up_proj)]
        scores = terms[0].sum(0).abs() + terms[1].sum(1).abs() + terms[2].sum(1).abs()
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert kept[name] == tuple(sorted(scores.topk(24).indices.tolist()))
    for operator in report.operators:
        name = operator.name.removesuffix(".weight")
        columns = torch.tensor(operator.groups_kept)
        if name.endswith("down_proj"):
            assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight[:, columns])


def test_an_operator_that_the_loss_does_not_feel_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    report = FistaPruner(CONFIG, progress=False).prune(model, TOKENS.split(4))
    assert any("layers.1.mlp.down_proj.weight: the loss does not feel it" in message for message in report.warnings)
    assert [operator.name for operator in report.operators if not operator.converged] == [
        "model.layers.1.mlp.down_proj.weight"
    ]


def test_a_killed_run_resumes_to_the_same_bytes_without_new_gradients(tmp_path, monkeypatch):
    source = save_tiny_folder(tmp_path / "source")

    def prune(output):
        FistaPruner(CONFIG, progress=False).prune(str(source), TOKENS.split(4), output_dir=output)

    prune(tmp_path / "whole")
    with pytest.raises(Killed), killed_at_write(10):
        prune(tmp_path / "smaller")
    assert (tmp_path / "smaller.unfinished" / "journal" / "layer-00000.json").exists()
    monkeypatch.setattr(budgets, "measure_gates", lambda *_: pytest.fail("it took the gradients again"))
    prune(tmp_path / "smaller")
    assert files_of(tmp_path / "smaller") == files_of(tmp_path / "whole")
