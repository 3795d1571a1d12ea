"""A model of a given size: what goes is what costs least, in every kind of run."""

import copy
import itertools
from functools import partial
from itertools import product

import pytest
import torch
from folder_files import files_of
from killed import Killed, killed_at_write
from pruning import prune
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from tiny_models import tiny_model
from torch import nn
from untouched import Untouched

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.gates import measure_gates
from optimum_fista.model.loss_gradients import DenseLoss
from optimum_fista.model.losses import Missing, choose_layers, losses_without
from optimum_fista.model.operator import LinearOperator
from optimum_fista.model.parts import find_parts
from optimum_fista.run.checkpoints.checkpoint import read_report
from optimum_fista.run.pruning import model_pruning, sizes
from optimum_fista.run.pruning.sizes import Sizes
from optimum_fista.run.pruning.target_size import choose_size
from optimum_fista.solve.patterns import PartShare, parse_pattern

ALL = 10_000  # tokens


def small_llama():
    """Three decoder layers of 8 channels and 2 groups of heads, so that all mixtures can be tried."""
    return tiny_llama(num_hidden_layers=3, intermediate_size=8)


def own_text(model):
    ids = model.generate(tiny_tokens(8, 1), max_new_tokens=23, do_sample=False)
    return ids.split(4)


def choose(model, pattern, batches):
    with torch.no_grad():
        return choose_size(loss_on(model, batches), parse_pattern(pattern))


def loss_on(model, batches):
    return DenseLoss(model, find_decoder_layers(model), read_batches(batches, 64), ALL)


def loss_of(model, batches):
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            for batch in batches
            for ids in batch
        ]
    return float(sum(losses)) / sum(ids.numel() - len(ids) for ids in batches)


def without_columns(model, kept, gates):
    """A copy with zeros in the columns of the groups whose gates cost least."""
    model = copy.deepcopy(model)
    for kind, count in kept.items():
        for part in find_parts(model, kind).parts:
            gone = gates[part.name].costs.argsort()[: part.groups - count]
            columns = torch.isin(torch.arange(part.groups).repeat_interleave(part.width), gone)
            model.get_submodule(part.name).weight.data[:, columns] = 0.0
    return model


@pytest.mark.parametrize("size", [0.85, 0.6])
def test_the_choice_is_the_best_of_all_mixtures(size):
    """Of all that lose no more channels than the size takes."""
    model = small_llama()
    batches = own_text(model)
    choice = choose(model, f"bytes:{size}", batches)
    parts = {part.name: part for kind in ("channels", "heads") for part in find_parts(model, kind).parts}
    operators = {name: LinearOperator(name, model.get_submodule(name)) for name in parts}
    with torch.no_grad():
        gates = measure_gates(loss_on(model, batches), operators, parts)
        order = [index for index, _ in choose_layers(loss_on(model, batches), 2)]
    dense, total, losses = loss_of(model, batches), model.num_parameters(), {}
    for channels, heads, removed in product(range(1, 9), (1, 2), range(3)):
        settings = {"num_hidden_layers": 3 - removed, "intermediate_size": channels, "head_dim": 8}
        smaller = tiny_llama(**settings, num_key_value_heads=heads, num_attention_heads=2 * heads)
        one_more = 32 * 3 * (3 - removed) * (channels < 8)
        if size * total - (one_more or total) < smaller.num_parameters() <= size * total:
            found = without_columns(model, {"channels": channels, "heads": heads}, gates)
            for index in sorted(order[:removed], reverse=True):
                del found.model.layers[index]
            losses[channels, heads, removed] = loss_of(found, batches) - dense, smaller.num_parameters() / total
    least, share = min(losses.values())
    assert choice.mixture.loss == pytest.approx(least, abs=1e-4)
    assert choice.mixture.size == pytest.approx(share)
    assert [mixture.loss for mixture in choice.alternatives] == sorted(m.loss for m in choice.alternatives)
    assert all(mixture.size <= size for mixture in choice.alternatives)


@pytest.mark.parametrize("redundant", ["heads", "channels", "layers"])
def test_what_is_redundant_goes_and_nothing_changes(redundant):
    model = tiny_llama(num_hidden_layers=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # so sure of its own text that it loses by everything that does something
        for layer in model.model.layers:
            if redundant == "heads":  # of the second key-value group, whose two query heads are columns 16 to 31
                layer.self_attn.o_proj.weight[:, 16:] = 0.0
            if redundant == "channels":
                layer.mlp.down_proj.weight[:, ::2] = 0.0
        if redundant == "layers":
            for operator in (model.model.layers[2].mlp.down_proj, model.model.layers[2].self_attn.o_proj):
                operator.weight.zero_()
    batches = own_text(model)
    with torch.no_grad():
        expected = model(torch.cat(batches)).logits
    size = {"heads": 0.83, "channels": 0.74, "layers": 0.8}[redundant]
    report = prune(model, batches, pattern=f"bytes:{size}")
    chosen = report.model["size_choice"]["mixture"]
    share = {"heads": 0.5, "channels": 0.5, "layers": 0.25}[redundant]
    assert chosen["pattern"] == f"{redundant}:{share}"
    assert abs(chosen["loss"]) < 1e-4
    assert chosen["size"] == report.model["num_parameters"] / report.model["dense_num_parameters"] <= size
    with torch.no_grad():
        assert torch.allclose(model(torch.cat(batches)).logits, expected, atol=2e-3 * float(expected.abs().max()))


def test_files_to_files_and_the_explicit_pattern_give_the_same_model(tmp_path, monkeypatch):
    source, tokens = save_tiny_folder(tmp_path / "source"), tiny_tokens().split(4)

    def stream(output, pattern="bytes:0.8"):
        return FistaPruner(FistaPruningConfig(pattern=pattern), progress=False).prune(source, tokens, output_dir=output)

    whole = stream(tmp_path / "whole")
    model = tiny_llama()
    report = prune(model, tokens, pattern="bytes:0.8")
    assert report.model["size_choice"] == whole.model["size_choice"]
    chosen = report.model["size_choice"]["mixture"]["pattern"]
    assert read_report(tmp_path / "whole").model["size_choice"]["mixture"]["pattern"] == chosen
    assert f"| chosen for this size | {chosen}:" in (tmp_path / "whole" / "README.md").read_text()
    stream(tmp_path / "explicit", chosen)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "explicit")]
    assert weights[0] == weights[1]
    with pytest.raises(Killed), killed_at_write(12):
        stream(tmp_path / "smaller")
    assert (tmp_path / "smaller.unfinished" / "journal" / "layer-00000.json").exists()
    monkeypatch.setattr(model_pruning, "choose_size", lambda *_: pytest.fail("it chose again"))
    stream(tmp_path / "smaller")
    assert files_of(tmp_path / "smaller") == files_of(tmp_path / "whole")


def test_active_weights_and_bytes_count_differently():
    model = tiny_llama()
    layers = find_decoder_layers(model)
    of = {measure: Sizes(model, layers, measure) for measure in ("bytes", "active")}
    smaller = tiny_llama(intermediate_size=12)
    gone, embedding = model.num_parameters() - smaller.num_parameters(), 64 * 32
    assert of["bytes"].of({"channels": 12}) == pytest.approx(1 - gone / model.num_parameters())
    assert of["active"].of({"channels": 12}) == pytest.approx(1 - gone / (model.num_parameters() - embedding))
    tied = tiny_llama(tie_word_embeddings=True)
    assert Sizes(tied, find_decoder_layers(tied), "active").of({"channels": 12}) == pytest.approx(
        1 - gone / tied.num_parameters()
    )
    mixture = tiny_model("mixtral")
    found = Sizes(mixture, find_decoder_layers(mixture), "active")
    layer, rest = mixture.model.layers[0], mixture.num_parameters() - mixture.get_input_embeddings().weight.numel()
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    own = sum(p.numel() for p in layer.parameters())
    assert found.of({}, [0]) == pytest.approx(1 - (own - experts / 2) / (rest - experts))


def test_any_layers_of_the_number_that_is_tried_are_enough():
    """The first decoder layer of a DeepSeek has a plain MLP, which is smaller than the mixtures of the others."""
    model = tiny_model("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=16)
    found = Sizes(model, find_decoder_layers(model), "bytes")
    alone = [found.of({}, [index]) for index in range(4)]
    assert max(alone) > min(alone)
    for size in (0.4, 0.6, 0.8):
        count = found.layers_needed(size)
        assert all(found.of({}, gone) <= size for gone in itertools.combinations(range(4), count))
        assert count == 1 or any(found.of({}, gone) > size for gone in itertools.combinations(range(4), count - 1))


def test_latency_is_that_of_the_layers_and_of_all_around_them(monkeypatch):
    timed = []

    def count(call, _):
        call()
        timed.append(sum(p.numel() for p in call.func.parameters()) if isinstance(call, partial) else 5_000)
        return float(timed[-1])

    monkeypatch.setattr(sizes, "median_seconds", count)
    model = tiny_llama()
    state = torch.get_rng_state()
    with torch.no_grad():
        found = Sizes(model, find_decoder_layers(model), "latency")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(timed) == 4, "a layer as it is, with few channels, with few heads, and the rest"
    one = sum(p.numel() for p in model.model.layers[0].parameters())
    assert found.of({}) == 1.0
    assert found.of({}, [1]) == pytest.approx((5_000 + one) / (5_000 + 2 * one))
    less = sum(p.numel() for p in tiny_llama(intermediate_size=24).model.layers[0].parameters())
    assert found.of({"channels": 24}) == pytest.approx((5_000 + 2 * less) / (5_000 + 2 * one))
    choice = choose(model, "latency:0.8", tiny_tokens().split(4))
    assert choice.mixture.size <= 0.8


def test_time_is_measured():
    model = tiny_llama()
    with torch.no_grad():
        found = Sizes(model, find_decoder_layers(model), "latency")
    assert 0 < found.of({}, [0]) < 1


@pytest.mark.parametrize(("family", "kinds"), [("gpt2", {"channels", "layers"}), ("mixtral", {"heads", "layers"})])
def test_models_that_can_lose_a_part_only(family, kinds):
    model = tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    before = model.num_parameters()
    report = prune(model, tiny_tokens().split(4), pattern="bytes:0.8")
    chosen = report.model["size_choice"]["mixture"]["pattern"]
    assert {part.partition(":")[0] for part in chosen.split("+")} <= kinds
    assert model.num_parameters() <= 0.8 * before


def test_a_size_that_can_not_be_had_is_refused_with_the_smallest():
    model = tiny_llama()
    message = r"pattern='bytes:0.1': the smallest possible size is 0\.2\d+ of the model's bytes, with 'channels:0.98"
    with Untouched(model), pytest.raises(ValueError, match=message) as refused:
        prune(model, tiny_tokens().split(4), pattern="bytes:0.1")
    least = float(str(refused.value).rpartition("at least ")[2].rstrip("."))
    choice = choose(model, f"bytes:{least}", tiny_tokens().split(4))
    assert choice.mixture.pattern == "channels:0.98+heads:0.5+layers:0.5"


def test_a_model_whose_loss_is_not_finite_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"hold NaN or Inf"):
        choose(model, "bytes:0.8", tiny_tokens().split(4))


def test_losses_without_parts_are_those_of_models_without_them():
    model = tiny_llama(num_hidden_layers=3)
    batches = tiny_tokens().split(4)
    read = torch.arange(48) % 3 > 0
    missing = [Missing(), Missing(frozenset({1})), Missing(frozenset({0}), {"model.layers.1.mlp.down_proj": read})]
    with torch.no_grad():
        found = losses_without(loss_on(model, batches), missing)
    assert not any(module._forward_pre_hooks for module in model.modules())
    expected = [loss_of(model, batches)]
    for lacks in missing[1:]:
        other = copy.deepcopy(model)
        for name in lacks.columns:
            other.get_submodule(name).weight.data[:, ~read] = 0.0
        del other.model.layers[min(lacks.layers)]
        expected.append(loss_of(other, batches))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("number", [9, 48, 1536, 14336])
def test_shares_say_the_numbers_that_they_stand_for(number):
    for kind in ("channels", "layers"):
        step = PartShare.usual_step(kind, number)
        for kept in range(step, number, step * max(1, number // step // 40)):
            share = PartShare.keeping(kind, kept, number)
            assert parse_pattern(str(share)).shares == (share,)
            assert share.num_kept(number) == kept


def test_what_stays_for_a_size_can_have_its_zeros():
    """Of 41 channels, the largest number that fits the size, no zeros 2:4 could be made."""
    counts = [
        Sizes(small_llama(), find_decoder_layers(small_llama()), "bytes", parse_pattern(zeros)).counts
        for zeros in ("2:4", "4:8")
    ]
    assert counts == [{"channels": [4], "heads": [1]}, {"channels": [], "heads": [1]}]
    model = tiny_llama(num_hidden_layers=4)
    prune(model, tiny_tokens().split(4), pattern="bytes:0.75,2:4")
    assert model.config.intermediate_size % 4 == 0
    assert model.num_parameters() <= 0.75 * tiny_llama(num_hidden_layers=4).num_parameters()


def test_zeros_in_what_stays_count_nothing():
    model, dense = tiny_llama(), tiny_llama().num_parameters()
    report = prune(model, tiny_tokens().split(4), pattern="bytes:0.8,2:4")
    chosen = report.model["size_choice"]["mixture"]["pattern"]
    assert "," not in chosen
    assert model.num_parameters() <= 0.8 * dense
    assert report.totals["sparsity"] == 0.5
    other = tiny_llama()
    prune(other, tiny_tokens().split(4), pattern=f"{chosen},2:4")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
