"""Experts go in every kind of run: those that matter least, chosen in the network as pruned so far."""

import copy
import warnings

import pytest
import torch
from families import family_model, family_tokens, logits
from folder_files import files_of
from killed import Killed, killed_at_write
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.parts import find_parts
from optimum_fista.run.checkpoints.checkpoint import read_report
from optimum_fista.run.evaluation.verification import verify_checkpoint

IDLE = (1, 2)


def pruned(model, pattern="experts:0.5", output=None, **options):
    """The pruner and its report."""
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens
        return pruner, pruner.prune(model, family_tokens(), **({} if output is None else {"output_dir": output}))


def with_idle_experts(family):
    """A model whose router never chooses two of four experts, by its bias."""
    model = family_model(family)
    tensors = model.state_dict()
    for part in find_parts(model, "experts").parts:
        bias = next(name for name in part.tensors if "bias" in name and not name.startswith(f"{part.name}."))
        tensors[bias][list(IDLE)] = -1000
    return model


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("saliency", ["reap", "frequency"])
def test_experts_that_are_never_chosen_go_and_nothing_changes(family, saliency):
    model = with_idle_experts(family)
    expected = logits(model)
    _, report = pruned(model, expert_saliency=saliency)
    assert report.mixtures
    for mixture in report.mixtures:
        assert mixture.groups_kept == (0, 3)
        assert [mixture.expert_tokens[expert] for expert in IDLE] == [0, 0]
    assert torch.allclose(logits(model), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_what_is_saved_loads_plainly_and_is_proved_against_the_dense_model(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path / "dense")
    pruner, report = pruned(model, "experts:0.5+heads:0.5")
    pruner.save_pretrained(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert again.num_parameters() == model.num_parameters() == report.model["num_parameters"]
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))
    verified = verify_checkpoint(tmp_path / "smaller", dense=tmp_path / "dense")
    assert verified.num_equal
    assert verified.removed


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    family_model("mixtral").save_pretrained(tmp_path / "dense")
    _, report = pruned(tmp_path / "dense", output=tmp_path / "whole")
    with pytest.raises(Killed), killed_at_write(9):
        pruned(tmp_path / "dense", output=tmp_path / "smaller")
    assert len(list((tmp_path / "smaller.unfinished" / "journal").glob("layer-*.json"))) == 1
    pruned(tmp_path / "dense", output=tmp_path / "smaller")
    assert files_of(tmp_path / "smaller") == files_of(tmp_path / "whole")
    model = family_model("mixtral")
    _, here = pruned(model)
    kept = [mixture.groups_kept for mixture in here.mixtures]
    assert (
        kept
        == [m.groups_kept for m in report.mixtures]
        == [m.groups_kept for m in read_report(tmp_path / "whole").mixtures]
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
