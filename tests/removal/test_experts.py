"""Which experts go, what the others are fitted to, and how they are refitted."""

import pytest
import torch
from families import family_model, family_tokens
from shrunken_models import parts_of

from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import hold_out, read_batches
from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.inputs import HiddenStates, LayerActivations, record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.removal import mixture_refit
from optimum_fista.removal.experts import experts_of, experts_to_keep, score_experts
from optimum_fista.removal.mixture_refit import SmallerMixture
from optimum_fista.solve.tested_refit import refit_to_all

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")


def mixture_layer(family, batches=None, held_out=0):
    """The first mixture of a model, its experts, the activations of its decoder layer, and hidden states for that."""
    model = family_model(family)
    layers = find_decoder_layers(model)
    part = parts_of(model, "experts").parts[0]
    indices = [index for index, (name, _) in enumerate(layers) if part.name.startswith(f"{name}.")]
    index = indices[0]
    name, layer = list(layers)[index]
    batches = family_tokens() if batches is None else batches
    recorded = record_inputs(layers, hold_out(read_batches(batches, 64), held_out))
    activations = LayerActivations(
        layer,
        recorded.calls[index],
        recorded.token_masks,
        CPU,
        recorded.held_out,
        recorded.sources,
    )
    return part, experts_of(part, name, layer), activations, list(recorded.hidden_states)


def batches_of_texts(names="abc"):
    """A batch of eight sequences of each text."""
    ids = torch.randint(3, 64, (8 * len(names), 32), generator=torch.Generator().manual_seed(2))
    return [
        {"input_ids": rows, "source": name} for rows, name in zip(ids.split(8), names, strict=True)
    ]


def output_of_experts(experts, activations, hidden):
    """What the experts get, their routing, and what they return together, as the model computes it."""
    ((arguments, keywords),) = activations.arguments_of(experts.module, [hidden])
    return arguments, experts.module(*arguments, **keywords)


def test_scores_are_those_of_a_plain_loop_over_tokens():
    ids = torch.cat(family_tokens())
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    batches = [{"input_ids": ids[:1], "attention_mask": mask[:1]}, ids[1:], ids[1:]]
    _, experts, activations, entering = mixture_layer("mixtral", batches, held_out=1)
    targets = LayerTargets(
        activations,
        [],
        Correction("full"),
        HiddenStates(entering, entering),
        experts=experts.module,
    )

    scores = score_experts(experts, targets)

    counts = [0] * 4
    norms = [0.0] * 4
    module = experts.module
    for batch, length in ((0, 20), (1, 32)):  # of the third one, nothing counts: it is held out
        one = LayerActivations(activations.layer, [activations.calls[batch]], [None], CPU)
        (states, chosen, weights), _ = output_of_experts(experts, one, entering[batch])
        for token in range(length):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                gate, up = (module.gate_up_proj[expert] @ states[token]).chunk(2)
                output = module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                counts[expert] += 1
                norms[expert] += float(weight * output.norm())
    assert scores.num_tokens.tolist() == counts
    means = [norm / max(1, count) for norm, count in zip(norms, counts, strict=True)]
    assert scores.saliency.tolist() == pytest.approx(means, rel=1e-5)


def test_tokens_count_for_an_expert_that_returns_zeros():
    ids = torch.cat(family_tokens())
    _, experts, activations, entering = mixture_layer("mixtral", [ids])
    targets = LayerTargets(
        activations,
        [],
        Correction("full"),
        HiddenStates(entering, entering),
        experts=experts.module,
    )
    counts = score_experts(experts, targets).num_tokens

    with torch.no_grad():
        experts.module.down_proj[0] = 0
    scores = score_experts(experts, targets)

    assert counts[0] > 0
    assert scores.num_tokens.tolist() == counts.tolist()
    assert scores.saliency[0] == 0


def test_tokens_of_each_text_are_counted_alone():
    sea, sky = family_tokens()[:2]
    batches = [{"input_ids": sea, "source": "sea"}, {"input_ids": sky, "source": "sky"}]

    def scores_on(batches):
        _, experts, activations, entering = mixture_layer("mixtral", batches)
        targets = LayerTargets(
            activations,
            [],
            Correction("full"),
            HiddenStates(entering, entering),
            experts=experts.module,
        )
        return score_experts(experts, targets)

    scores = scores_on(batches)

    assert list(scores.num_tokens_of_texts) == ["sea", "sky"]
    for batch in batches:
        alone = scores_on([batch])
        of_text = scores.num_tokens_of_texts[batch["source"]]
        assert of_text.tolist() == alone.num_tokens.tolist()


def test_tokens_that_skip_the_mixture_are_of_no_expert():
    """Zaya gives them to the first expert with the weight 0, if its router chooses the entry after the experts."""
    _, experts, activations, entering = mixture_layer("zaya")
    biases = activations.layer.mlp.gate.balancing_biases
    counts = []
    for bias_of_skipping in (1000.0, -1000.0):
        biases[-1] = bias_of_skipping
        targets = LayerTargets(
            activations,
            [],
            Correction("full"),
            HiddenStates(entering, entering),
            experts=experts.module,
        )
        counts.append(score_experts(experts, targets).num_tokens.sum().item())

    num_tokens = sum(ids.numel() for ids in family_tokens())
    assert counts == [0, num_tokens]


def test_the_device_holds_the_inputs_of_experts_of_one_batch_at_a_time():
    _, experts, activations, entering = mixture_layer("mixtral")
    assert len(entering) > 1
    earlier = []
    held_bytes = []  # by the batches before, while a batch is on the device

    def note(_, assigned):
        held_bytes.append(sum(a.hidden_states.untyped_storage().nbytes() for a in earlier))
        earlier.append(assigned)

    activations.assigned_tokens(experts, entering, note)

    assert held_bytes == [0] * len(entering)


def test_the_first_of_equal_experts_stay():
    scores = torch.tensor([1.0, 3.0, 3.0, 3.0])

    assert experts_to_keep(scores, 2) == (1, 2)


def test_an_expert_without_tokens_stays_only_if_more_have_to_stay_than_were_reached():
    scores = torch.tensor([0.0, 0.0, 2.0, 0.0, 1.0])
    num_tokens = torch.tensor([0, 0, 9, 7, 8])  # the output of the expert 3 is zero for its tokens

    assert experts_to_keep(scores, 3, num_tokens=num_tokens) == (2, 3, 4)
    assert experts_to_keep(scores, 4, num_tokens=num_tokens) == (0, 2, 3, 4)


def test_every_group_of_the_router_keeps_as_many_experts():
    first_group = [5.0, 4.0]
    second_group = [1.0, 2.0]
    scores = torch.tensor(first_group + second_group)

    assert experts_to_keep(scores, 2, num_router_groups=2) == (0, 3)


def test_targets_bring_the_layer_to_the_dense_output():
    """With a = b = 1, D* + Y = D + E(X)."""
    _, experts, activations, dense = mixture_layer("mixtral")
    pruned = [hidden + 0.1 * torch.randn_like(hidden) for hidden in dense]
    targets = LayerTargets(
        activations,
        [],
        Correction("full", 1.0, 1.0),
        HiddenStates(dense, pruned),
        experts=experts.module,
    )
    assert targets.corrects_experts

    found = list(targets.expert_targets())

    for batch, wanted in enumerate(found):
        handle = experts.module.register_forward_hook(
            lambda _, __, output, y=wanted: y.view(output.shape)
        )
        output = activations.run(batch, pruned[batch])
        handle.remove()
        assert torch.allclose(output, activations.run(batch, dense[batch]), atol=1e-5)


@pytest.mark.parametrize(("family", "left"), [("llama4_text", 1e-3), ("mixtral", 0.3)])
def test_refits_find_the_weights_that_made_the_outputs(family, left):
    _, experts, activations, entering = mixture_layer(family, batches_of_texts())
    down = experts.module.down_proj.data
    own = down.clone()
    down += 0.5 * own.std() * torch.randn_like(own)
    targets = LayerTargets(
        activations,
        [],
        Correction("full", 0.0),
        HiddenStates(None, entering),
        experts=experts.module,
    )
    wanted = activations.store()
    for target in targets.expert_targets():
        wanted.append(target)
    made = down.clone()
    down.copy_(own)
    mixture = SmallerMixture(experts, activations, entering, wanted)
    written = {}
    before, _ = mixture.errors()

    count, num_shrunk, message = mixture.refit(written.__setitem__)

    after, _ = mixture.errors()
    assert count == 4
    assert num_shrunk == 0
    assert message == ""
    assert sorted(written) == [0, 1, 2, 3]
    assert after < left * before
    assert (down - made).norm() < (own - made).norm()
    # what was taken off step by step is what is left
    again = SmallerMixture(experts, activations, entering, wanted)
    assert again.errors()[0] == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_text(side):
    lengths = [8] * 3 + [32]
    padded = []
    alone = []
    for batch in batches_of_texts("ab"):
        ids = batch["input_ids"][:4]
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            real_tokens = slice(length) if side == "right" else slice(-length, None)
            mask[row, real_tokens] = 1
            alone.append(batch | {"input_ids": ids[row : row + 1, real_tokens]})
        padded.append(batch | {"input_ids": ids, "attention_mask": mask})

    num_tokens_of_texts = []
    for batches in (padded, alone):
        _, experts, activations, entering = mixture_layer("mixtral", batches)
        wanted = activations.store()
        for hidden in entering:
            wanted.append(torch.zeros_like(hidden))
        mixture = SmallerMixture(experts, activations, entering, wanted)
        problems = mixture._problems_by_text(0)
        num_tokens_of_texts.append([problem.statistics.num_tokens for problem in problems])

    with_padding, without_padding = num_tokens_of_texts
    assert len(with_padding) == 2
    assert with_padding == without_padding


def mixture_that_should_change(changes, sources, batches=None):
    """A mixture whose outputs should be those of changed down projections, in each batch by another share of a change.

    Batches are of the texts `sources`. Returns also the layer's experts.
    """
    if batches is None:
        batches = [batch["input_ids"] for batch in batches_of_texts()]
    named = [
        {"input_ids": rows, "source": source} for rows, source in zip(batches, sources, strict=True)
    ]
    _, experts, activations, entering = mixture_layer("llama4_text", named)
    states = HiddenStates(None, entering)
    targets = LayerTargets(activations, [], Correction("full", 0.0), states, experts=experts.module)
    down = experts.module.down_proj.data
    own = down.clone()
    direction = own.std() * torch.randn_like(own)
    wanted = activations.store()
    # It runs the layer on a batch when it is asked for the next one.
    outputs = targets.expert_targets()
    for change in changes:
        down.copy_(own + change * direction)
        wanted.append(next(outputs))
    down.copy_(own)
    return SmallerMixture(experts, activations, entering, wanted), experts


def test_an_expert_is_not_refitted_if_a_fit_to_the_other_texts_harms_one():
    """Most of the tokens want the change."""
    mixture, experts = mixture_that_should_change([1, 1, -0.5], ["a", "a", "b"])
    before = experts.module.down_proj.clone()

    refits = mixture.refit(lambda *_: pytest.fail("an expert was written"))

    assert refits == (0, 0, "")
    assert torch.equal(experts.module.down_proj, before)


def test_experts_are_not_refitted_to_a_single_text():
    mixture, experts = mixture_that_should_change([1, 1, 1], ["a", "a", "a"])
    before = experts.module.down_proj.clone()

    refits = mixture.refit(lambda *_: pytest.fail("an expert was written"))

    assert refits == (0, 0, "")
    assert torch.equal(experts.module.down_proj, before)


def test_a_refit_that_goes_too_far_for_a_text_is_shrunk(monkeypatch):
    """The second text wants 0.4 of the change that the first one wants: all of it is too much there, a half is not."""
    mixture, experts = mixture_that_should_change([1, 0.4, 1], ["a", "b", "a"])
    before = experts.module.down_proj.clone()
    error_before = mixture.errors().fitted
    written = {}

    refits = mixture.refit(written.__setitem__)

    assert refits == (4, 4, "")
    assert mixture.errors().fitted < error_before
    whole, other = mixture_that_should_change([1, 0.4, 1], ["a", "b", "a"])
    monkeypatch.setattr(
        mixture_refit, "refit_that_helps", lambda problems, _: refit_to_all(problems)
    )
    whole.refit(lambda *_: None)
    moved = (experts.module.down_proj - before).norm()
    assert 0.3 < moved / (other.module.down_proj - before).norm() < 0.7
    for number, operator in enumerate(mixture._down):
        assert torch.equal(written[number], operator.read())


def test_texts_that_want_the_same_change_are_refitted_whole():
    mixture, _ = mixture_that_should_change([1, 1, 1], ["a", "b", "c"])

    assert mixture.refit(lambda *_: None) == (4, 0, "")
    assert mixture.errors().fitted < 1e-3


def test_an_expert_that_tokens_of_one_text_reach_is_not_refitted():
    mixture, _ = mixture_that_should_change([1, 1, 1], ["a", "b", "c"])
    tokens_of = [assigned.tokens_of(0) for assigned in mixture._batches]
    # No token of the texts b and c counts for the expert 0: they become padding.
    for batch in (1, 2):
        mask = torch.ones(8, 32, dtype=torch.bool)
        mask.view(-1)[tokens_of[batch]] = False
        mixture._activations.token_masks[batch] = mask
    written = {}

    mixture.refit(written.__setitem__)

    (problem,) = mixture._problems_by_text(0)
    assert problem.statistics.num_tokens == len(tokens_of[0])
    assert sorted(written) == [1, 2, 3]


def test_held_out_batches_are_no_part_of_a_text():
    mixture, _ = mixture_that_should_change([1, 1, 1], ["a", "b", "c"])
    mixture._activations.held_out = [False, True, False]

    problems = mixture._problems_by_text(2)

    num_tokens = [problem.statistics.num_tokens for problem in problems]
    assert num_tokens == [len(mixture._batches[batch].tokens_of(2)) for batch in (0, 2)]


def test_experts_are_not_refitted_to_noise():
    """The targets are what the experts return already, and noise that no fit to other texts can know."""
    _, experts, activations, entering = mixture_layer("mixtral", batches_of_texts())
    outputs = LayerTargets(
        activations,
        [],
        Correction("full", 0.0),
        HiddenStates(None, entering),
        experts=experts.module,
    )
    generator = torch.Generator().manual_seed(0)
    wanted = activations.store()
    for output in outputs.expert_targets():
        wanted.append(output + torch.randn(output.shape, generator=generator))
    before = experts.module.down_proj.clone()
    mixture = SmallerMixture(experts, activations, entering, wanted)

    result = mixture.refit(lambda *_: pytest.fail("an expert was written"))

    assert result == (0, 0, "")
    assert torch.equal(experts.module.down_proj, before)


def test_experts_whose_outputs_pass_a_norm_are_not_refitted():
    _, experts, activations, entering = mixture_layer("mixtral")
    wanted = activations.store()
    for hidden in entering:
        wanted.append(hidden)
    mixture = SmallerMixture(experts, activations, entering, wanted)
    experts.module.has_post_expert_norm = True

    result = mixture.refit(lambda *_: None)

    assert result == (0, 0, "not refitted: a norm follows every expert")


def test_experts_that_are_called_twice_are_refused():
    _, experts, activations, entering = mixture_layer("mixtral")
    own = activations.layer.mlp.forward
    activations.layer.mlp.forward = lambda hidden: own(hidden) + own(hidden)
    states = HiddenStates(None, entering)
    targets = LayerTargets(activations, [], Correction("full", 0.0), states, experts=experts.module)

    with pytest.raises(
        UnsupportedArchitectureError, match="MixtralExperts is called 2 times in a forward pass"
    ):
        next(targets.expert_targets())
