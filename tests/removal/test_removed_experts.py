"""Experts go in every kind of run: those that matter least, chosen in the network as pruned so far."""

import copy
import json
import re
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from architectures import read_outcomes
from families import family_model, family_tokens, logits
from folder_files import files_of
from killed import Killed, interrupted_after, killed_at_write
from shrunken_models import parts_of
from tiny_llama import tiny_llama
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.offload import onloaded
from optimum_fista.removal.smaller_modules import smaller_copy

IDLE = (1, 2)
SOON = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text")
MIXTURES = [family for family, outcome in read_outcomes().items() if "experts" in outcome.smaller]


def prune_quietly(model, pattern="experts:0.5", batches=None, output=None, **options):
    """Prune a model, in memory or from a folder to another; returns the pruner and its report."""
    pruner = FistaPruner(FistaPruningConfig(pattern=pattern, **options), progress=False)
    if batches is None:
        # Two texts: experts are refitted to several only.
        batches = [
            {"input_ids": ids, "source": name}
            for ids, name in zip(family_tokens(), "ab", strict=True)
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, and of layers without residual correction
        return pruner, pruner.prune(
            model, batches, **({} if output is None else {"output_dir": output})
        )


def kept(report):
    return [mixture.groups_kept for mixture in report.mixtures]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_experts_that_are_never_chosen_are_removed_and_logits_stay(family):
    model = family_model(family)
    tensors = model.state_dict()
    for part in parts_of(model, "experts").parts:
        bias = next(
            name for name in part.tensors if "bias" in name and not name.startswith(f"{part.name}.")
        )
        tensors[bias][list(IDLE)] = -1000  # of the router
    expected = logits(model)

    _, report = prune_quietly(model)

    assert set(kept(report)) == {(0, 3)}
    assert {mixture.expert_tokens[expert] for mixture in report.mixtures for expert in IDLE} == {0}
    assert torch.allclose(logits(model), expected, atol=1e-5 * float(expected.abs().max()))


def with_idle_experts(experts):
    """A model whose router never chooses these experts, in any mixture."""
    model = family_model("deepseek_v3")
    tensors = model.state_dict()
    for part in parts_of(model, "experts").parts:
        (bias,) = [name for name in part.tensors if name.endswith("correction_bias")]
        tensors[bias][list(experts)] = -1000
    return model


@pytest.mark.parametrize(
    ("idle", "pattern", "message"),
    [
        (
            (1, 2),
            "experts:0.5",
            r"no calibration token reached 2 of 4 experts, in 1 of 1 mixtures: model\.layers\.1\.mlp\.experts \(1-2\); "
            r"they were removed before all others\. Pass more sequences \(--num-samples\), or text of the kind that "
            r"uses them\.",
        ),
        (
            (0, 3),
            "experts:0.25",
            r"reached 2 of 4 experts, in 1 of 1 mixtures: .* \(0, 3\); nothing is known of them, and 1 of them "
            r"stay, because more experts have to stay than were reached\. Pass more",
        ),
    ],
)
def test_experts_that_no_token_reached_are_named_and_removed_first(
    idle, pattern, message, tmp_path
):
    model = with_idle_experts(idle)

    pruner, report = prune_quietly(model, pattern)

    (warning,) = [text for text in report.warnings if "no calibration token reached" in text]
    assert re.fullmatch(f".*{message}.*", warning)
    (mixture,) = report.mixtures
    assert mixture.unreached == idle
    assert set(range(4)).difference(idle) <= set(mixture.groups_kept)
    pruner.save_pretrained(model, tmp_path / "smaller")
    assert verify_checkpoint(tmp_path / "smaller").num_mixtures == 1


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in MIXTURES],
)
def test_a_smaller_mixture_loads_in_transformers_and_is_verified_against_the_dense_model(
    family, tmp_path
):
    model = family_model(family)
    model.save_pretrained(tmp_path / "dense")

    pruner, report = prune_quietly(
        model, "experts:0.5+heads:0.5" if family == "mixtral" else "experts:0.5"
    )
    pruner.save_pretrained(model, tmp_path / "smaller")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert again.num_parameters() == model.num_parameters() == report.model["num_parameters"]
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))
    verified = verify_checkpoint(tmp_path / "smaller", dense=tmp_path / "dense")
    assert verified.num_mixtures == len(report.mixtures) > 0
    assert verified.num_equal
    assert verified.removed


@pytest.mark.parametrize("pattern", ["experts:0.5", "experts:0.5+heads:0.5", "2:4"])
def test_weights_that_the_files_keep_as_several_matrices_stay_dense(pattern, tmp_path):
    """MiniMax-M3: the gate and the up projection of its shared expert are one module, and two tensors in the files."""
    model = family_model("minimax_m3_vl", kind=AutoModelForMultimodalLM)
    model.save_pretrained(tmp_path / "dense")

    _, report = prune_quietly(model, pattern)
    prune_quietly(tmp_path / "dense", pattern, output=tmp_path / "streamed")

    dense = {name.rpartition("shared_experts.")[2] for name in report.left_dense}
    assert "gate_up_proj" in dense
    assert not any("gate_up_proj" in operator.name for operator in report.operators)
    if pattern == "2:4":
        assert any("down_proj" in operator.name for operator in report.operators)
        assert "files keep its weight as several matrices" in " ".join(report.warnings)
    else:
        assert len(report.mixtures) > 0
    loaded = type(model).from_pretrained(tmp_path / "streamed").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    verify_checkpoint(tmp_path / "streamed", dense=tmp_path / "dense")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense mixture of four decoder layers, and what a run without an interruption makes of it."""
    folder = tmp_path_factory.mktemp("experts")
    tiny_model("mixtral", num_hidden_layers=4).save_pretrained(folder / "dense")
    _, report = prune_quietly(
        folder / "dense", "experts:0.5+layers:0.25", output=folder / "smaller"
    )
    return folder / "dense", folder / "smaller", report


def test_a_killed_run_resumes_to_the_same_bytes_and_is_that_in_memory(folders, tmp_path):
    dense, smaller, report = folders

    with pytest.raises(Killed), killed_at_write(14):
        prune_quietly(dense, "experts:0.5+layers:0.25", output=tmp_path / "smaller")
    assert 0 < len(list((tmp_path / "smaller.unfinished" / "journal").glob("layer-*.json"))) < 4
    prune_quietly(dense, "experts:0.5+layers:0.25", output=tmp_path / "smaller")

    assert files_of(tmp_path / "smaller") == files_of(smaller)

    model = tiny_model("mixtral", num_hidden_layers=4)
    _, here = prune_quietly(model, "experts:0.5+layers:0.25")

    assert kept(here) == kept(report) == kept(read_report(smaller))
    assert len(kept(here)) == 3
    loaded = AutoModelForCausalLM.from_pretrained(smaller).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert verify_checkpoint(smaller, dense=dense).num_mixtures == 3


def test_refits_tested_by_text_are_the_same_in_a_run_that_resumes_and_in_memory(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 64, (48, 32), generator=torch.Generator().manual_seed(1))
    names = ("a", "b", "c", "a", "b", "c")
    batches = [
        {"input_ids": rows, "source": name} for rows, name in zip(ids.split(8), names, strict=True)
    ]
    options = {"batches": batches, "held_out": 3}

    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune_quietly(tmp_path / "dense", output=tmp_path / "smaller", **options)
    _, streamed = prune_quietly(tmp_path / "dense", output=tmp_path / "smaller", **options)
    model = tiny_model("mixtral")
    _, in_memory = prune_quietly(model, **options)

    numbers = [(mixture.num_refitted, mixture.num_shrunk) for mixture in in_memory.mixtures]
    assert numbers == [(mixture.num_refitted, mixture.num_shrunk) for mixture in streamed.mixtures]
    assert sum(refitted for refitted, _ in numbers) > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert streamed.calibration["sources"] == [
        {"source": name, "num_sequences": 15, "num_tokens": 480} for name in "abc"
    ]
    assert verify_checkpoint(tmp_path / "smaller", dense=tmp_path / "dense").num_mixtures == 2


@pytest.mark.parametrize("at", ["layer", "shrink"])
@pytest.mark.usefixtures("fails_at_the_end")
def test_a_failure_leaves_the_model_as_it_was(at):
    model = tiny_model("mixtral")
    changed = []  # whether the experts of each finished layer were
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config
    ids = torch.randint(3, 64, (48, 32), generator=torch.Generator().manual_seed(1))
    # Experts are refitted to several texts only.
    batches = [
        {"input_ids": rows, "source": name}
        for rows, name in zip(ids.split(8), "ababab", strict=True)
    ]

    class Watch(PruningCallback):
        def on_layer_end(self, index, report, operators):
            down = f"{report.mixture.name}.down_proj"
            changed.append(not torch.equal(model.state_dict()[down], before[down]))
            if index == 1 and at == "layer":
                raise KeyboardInterrupt

    pruner = FistaPruner(
        FistaPruningConfig(pattern="experts:0.5"), progress=False, callbacks=[Watch()]
    )

    with pytest.raises(KeyboardInterrupt):
        pruner.prune(model, batches)

    assert any(changed), "no expert was refitted, so that there was nothing to put back"
    assert model.config is config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_groups_of_the_router_keep_equally_many_experts():
    model = tiny_model("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1)

    _, report = prune_quietly(model, "experts:0.26")  # 5.92 experts, to the nearest even number

    assert all(sum(expert < 4 for expert in found) == 3 for found in kept(report))
    assert model.config.n_routed_experts == 6


def test_with_one_text_no_expert_is_refitted_and_a_warning_says_so():
    _, report = prune_quietly(tiny_model("mixtral"), batches=family_tokens())

    (warning,) = [text for text in report.warnings if "refitted" in text]
    assert "because the calibration is one text" in warning
    assert {mixture.num_refitted for mixture in report.mixtures} == {0}
    assert "refitted" not in report.experts_left


def test_the_warning_of_one_text_comes_before_the_run_removes_anything():
    class Interrupting(PruningCallback):
        def on_layer_end(self, *_):
            raise KeyboardInterrupt

    pruner = FistaPruner(
        FistaPruningConfig(pattern="experts:0.5"), progress=False, callbacks=[Interrupting()]
    )

    with (
        pytest.warns(UserWarning, match="because the calibration is one text"),
        pytest.raises(KeyboardInterrupt),
    ):
        pruner.prune(tiny_model("mixtral"), family_tokens())


def test_no_copy_of_a_layer_lives_when_the_weights_of_the_next_layer_are_read(
    monkeypatch, tmp_path
):
    """Otherwise a run holds two decoder layers and the experts that stay in a third."""
    copies = []
    living = []

    def copy_layer(*arguments):
        copy = smaller_copy(*arguments)
        copies.append(weakref.ref(copy))
        return copy

    def read_weights(modules):
        living.append([copy for copy in copies if copy() is not None])
        return onloaded(modules)

    monkeypatch.setattr("optimum_fista.removal.experts.smaller_copy", copy_layer)
    monkeypatch.setattr("optimum_fista.prune.loop.onloaded", read_weights)
    # In tiny models unused cycles are not looked for.
    monkeypatch.setattr("optimum_fista.memory._WORTH_A_SEARCH", 0)
    tiny_model("mixtral").save_pretrained(tmp_path / "source")

    prune_quietly(str(tmp_path / "source"), output=tmp_path / "out")

    assert len(copies) == 2
    assert living == [[], []]


def test_without_refits_the_report_counts_no_refitted_expert():
    _, report = prune_quietly(tiny_model("mixtral"), expert_refit=False)

    assert {mixture.num_refitted for mixture in report.mixtures} == {0}
    assert "2 of 4 experts left in each of 2 mixtures (REAP)" in str(report)
    assert "refitted" not in str(report)


def test_verify_finds_experts_that_were_not_chosen(folders, tmp_path):
    """Without the dense model by their saliency, and with it by their values if saliencies fit the choice."""
    shutil.copytree(folders[1], tmp_path / "changed")
    edit(tmp_path / "changed", lambda found: [expert for expert in range(4) if expert not in found])
    with pytest.raises(
        VerificationError, match="groups_kept are not the experts with the largest saliency"
    ):
        verify_checkpoint(tmp_path / "changed")
    edit(tmp_path / "changed", lambda found: [-value for value in found], "saliency")
    verify_checkpoint(tmp_path / "changed")
    with pytest.raises(VerificationError, match=r"mlp\.gate\.weight differs from"):
        verify_checkpoint(tmp_path / "changed", dense=folders[0])


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("groups_kept", lambda found: found[:1], "has 2 experts, and the report says 1"),
        ("name", lambda name: name.rpartition(".")[0], "has no weights of experts"),
    ],
)
def test_verify_names_a_mixture_with_other_experts_than_the_report_says(
    folders, tmp_path, key, change, message
):
    shutil.copytree(folders[1], tmp_path / "changed")
    edit(tmp_path / "changed", change, key)

    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(tmp_path / "changed")


def edit(folder: Path, change, key="groups_kept") -> None:
    """Change what the report says of the first mixture."""
    file = folder / "fista" / "report.json"
    values = json.loads(file.read_text())
    mixture = values["layers"][0]["mixture"]
    mixture[key] = change(mixture[key])
    file.write_text(json.dumps(values))


def test_removing_experts_that_a_model_lacks_or_too_many_is_refused_and_changes_nothing():
    with (
        Untouched(model := tiny_llama()),
        pytest.raises(UnsupportedArchitectureError, match="can't lose experts: its"),
    ):
        prune_quietly(model, "experts:0.5")
    message = r"^pattern='experts:0.75': 1 of 4 experts would stay .* for which 2 to 3 stay"
    with Untouched(model := tiny_model("mixtral")), pytest.raises(ValueError, match=message):
        prune_quietly(model, "experts:0.75")
