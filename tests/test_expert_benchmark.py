"""benchmarks/experts.py: criteria and repairs of mixtures that lose experts are what they say, on tiny models."""

import importlib
import json
import math
import sys

import pytest
import torch
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows, evaluation_windows

KINDS = ("split", "copied")


def tiny_mixture(kind):
    """A mixture of six experts a layer, three for a token, whose experts differ."""
    start = importlib.import_module("mixture_start")
    dense = tiny_llama(num_hidden_layers=4, intermediate_size=64, tie_word_embeddings=True)
    if kind == "split":
        return start.split(dense, tiny_tokens(), experts=6, expert_channels=8, active=3, seed=0)
    mixture = start.copied(dense, tiny_tokens(), experts=6, active=3, dense_layers=2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in mixture.named_parameters():
        if ".experts." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
    return mixture


class Setting:
    """The last mixture of a tiny model: its view, and what it takes to make it smaller."""

    def __init__(self, kind):
        self.kind = kind
        experts = importlib.import_module("experts")
        self.view_module = importlib.import_module("expert_view")
        self.model = tiny_mixture(kind)
        self.removals = experts.Removals(self.model)
        self.plan = self.removals.plan("0.34")
        # Two texts that are alike, so that what helps on one helps on the other.
        windows = {"web": tiny_tokens(16, 32), "python": tiny_tokens(16, 32).flip(0)}
        self.draw = experts.Draw(self.removals.layers, windows, is_of_several=True)
        # The last mixture: no router after it could choose others if its output changes.
        *_, self.part = self.plan.parts.values()
        *_, self.gradients = self.draw.gradients(list(self.plan.parts.values()))

    def mixture(self):
        return self.model.get_submodule(self.part.name.removesuffix(".experts"))

    def inputs(self):
        """What enters the mixture in the dense model, [tokens, hidden] of each batch."""
        seen = []
        hook = self.mixture().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.no_grad():
            for batch in self.draw.batches:
                self.model(input_ids=batch.input_ids)
        hook.remove()
        return [states.flatten(0, 1) for states in seen]

    def view(self):
        from optimum_fista.model.experts import FusedExperts

        module = self.mixture().experts
        experts = FusedExperts(self.part.name, module)
        batches = []
        with torch.no_grad():
            for states in self.inputs():
                _, weights, chosen = self.mixture().gate(states)
                batches.append(experts.assigned(states, chosen, weights))
            return self.view_module.MixtureView.of(
                experts,
                self.mixture().gate,
                batches,
                gradients=self.gradients,
                parts=self.draw.parts,
            )


@pytest.fixture(params=KINDS)
def setting(request):
    return Setting(request.param)


def routed_outputs(setting, view, weights):
    """The sum of the experts with these weights [tokens, experts], by the module of the experts itself."""
    every = torch.arange(view.num_experts).expand(len(weights), -1)
    with torch.no_grad():
        return setting.mixture().experts(view.hidden_states, every, weights)


def test_an_expert_that_is_left_out_costs_what_the_mixture_without_it_says(benchmark, setting):
    view = setting.view()
    full = routed_outputs(setting, view, view.weights)

    scores = benchmark("expert_criteria").left_out(view, 0)

    router = setting.mixture().gate
    for expert in range(view.num_experts):
        bias_holder = getattr(router, "moe_statics", router)
        bias = bias_holder.e_score_correction_bias.data.view(-1)
        old_bias = bias[expert].clone()
        bias[expert] = -1e9  # never chosen
        with torch.no_grad():
            _, weights, chosen = router(view.hidden_states)
        bias[expert] = old_bias
        again = torch.zeros_like(view.weights).scatter(1, chosen, weights)
        change = routed_outputs(setting, view, again) - full
        assert scores[expert].item() == pytest.approx(change.square().sum().item(), rel=1e-3)


def test_the_gradient_says_how_the_loss_changes_with_the_weight_of_an_expert(setting):
    view = setting.view()
    step = 1e-2

    def loss(factor):
        """Summed loss of all tokens if the weights of expert 1 of the mixture are multiplied."""

        def multiply(_, given):
            states, chosen, weights = given
            return states, chosen, torch.where(chosen == 1, factor * weights, weights)

        hook = setting.mixture().experts.register_forward_pre_hook(multiply)
        total = 0.0
        with torch.no_grad():
            for batch in setting.draw.batches:
                result = setting.model(input_ids=batch.input_ids, labels=batch.input_ids)
                total += float(result.loss) * batch.input_ids[:, 1:].numel()
        hook.remove()
        return total

    measured = (loss(1 + step) - loss(1 - step)) / (2 * step)

    predicted = (view.weights[:, 1] * view.slopes[:, 1]).sum().item()
    assert predicted == pytest.approx(measured, rel=0.05, abs=0.2)


def test_removing_experts_together_counts_those_that_are_gone_already(benchmark, setting):
    view = setting.view()
    criteria = benchmark("expert_criteria")
    tokens = torch.arange(len(view.weights))

    order = criteria.together(view, 0)

    def error(removed):
        changes = view.weights_without(removed, tokens) - view.weights
        return float(setting.view_module.squared_norms(view.grams, changes).sum())

    first, second, third = order.argsort().tolist()[:3]
    assert order.tolist().count(math.inf) == view.rule.top_k
    others = set(range(view.num_experts)) - {first, second}
    assert error([first]) == pytest.approx(min(error([e]) for e in range(view.num_experts)))
    best = min(others, key=lambda expert: error([first, second, expert]))
    assert error([first, second, third]) == pytest.approx(error([first, second, best]))


@pytest.fixture
def smaller(benchmark, setting):
    """A smaller copy of the last layer, as repairs get it."""
    from optimum_fista.model.inputs import LayerActivations
    from optimum_fista.removal.experts import experts_of
    from optimum_fista.removal.smaller_modules import smaller_copy

    repairs = benchmark("expert_repairs")
    view = setting.view()
    name = setting.part.name.removesuffix(".mlp.experts")
    index = int(name.rpartition(".")[2])
    layer = setting.model.get_submodule(name)
    states = []
    hook = layer.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with torch.no_grad():
        for batch in setting.draw.batches:
            setting.model(input_ids=batch.input_ids)
    hook.remove()
    kept = (0, 2, 3, 5)
    copy = smaller_copy(setting.plan, name, layer, {setting.part.name: kept})
    activations = LayerActivations(
        layer=copy,
        calls=setting.draw.recorded.calls[index],
        token_masks=setting.draw.recorded.token_masks,
        storage=torch.device("cpu"),
        sources=setting.draw.recorded.sources,
    )
    targets = activations.store()
    full = routed_outputs(setting, view, view.weights)
    for target in full.split(setting.draw.batches[0].input_ids.numel()):
        targets.append(target.view(*setting.draw.batches[0].input_ids.shape, -1))
    return repairs.SmallerLayer(
        view=view,
        kept=kept,
        all_experts=experts_of(setting.part, name, layer),
        experts=experts_of(setting.part, name, copy),
        router=setting.view_module.router_of(copy),
        activations=activations,
        hidden_states=states,
        targets=targets,
    )


def mixture_error(layer, setting):
    """The squared error of the whole mixture, with the shared expert, against that of the dense model."""
    name_in_layer = "mlp"
    copy = layer.activations.layer.get_submodule(name_in_layer)
    states = layer.view.hidden_states[None]
    with torch.no_grad():
        return float((copy(states) - setting.mixture()(states)).square().sum())


def test_the_routers_problem_has_the_errors_of_the_smaller_mixture(benchmark, setting, smaller):
    problem = benchmark("expert_repairs")._RouterProblem(smaller)
    every = torch.ones_like(smaller.view.parts, dtype=torch.bool)

    error = problem.error(smaller.router.weight.float(), every)

    assert error == pytest.approx(mixture_error(smaller, setting), rel=1e-3)


def test_a_step_of_the_router_solves_its_least_squares_problem(benchmark, smaller, monkeypatch):
    repairs = benchmark("expert_repairs")
    monkeypatch.setattr(repairs, "_CONJUGATE_STEPS", 300)
    monkeypatch.setattr(repairs, "_ROUTER_RIDGE", 1e-6)
    problem = repairs._RouterProblem(smaller)
    matrix = smaller.router.weight.detach().float()
    every = torch.ones_like(smaller.view.parts, dtype=torch.bool)

    step = problem.step(matrix, every)

    # The same by derivatives of the outputs, with the choice of experts held.
    kept = list(smaller.kept)
    outputs = smaller.view.outputs[:, kept].float()
    chosen = smaller.router_weights() > 0

    def output(change):
        logits = smaller.view.hidden_states @ (matrix + change).T
        scores = logits.sigmoid() if problem._rule.is_sigmoid else logits.exp()
        scores = scores * chosen
        weights = problem._rule.total * scores / scores.sum(1, keepdim=True)
        return (weights[:, None, :] @ outputs).squeeze(1)

    jacobian = torch.func.jacfwd(output)(torch.zeros_like(matrix)).flatten(2).flatten(0, 1)
    residual = (smaller.all_targets() - output(torch.zeros_like(matrix))).flatten()
    # At the least error, what is left is orthogonal to all that a step can change.
    gradient_before = jacobian.T @ residual
    gradient_after = jacobian.T @ (residual - jacobian @ step.flatten())
    assert gradient_after.norm() < 1e-2 * gradient_before.norm()


@pytest.mark.parametrize(
    "names", ["router", "refit", "shared", "router+refit", "router+shared+refit"]
)
def test_repairs_lessen_the_error_of_the_mixture(benchmark, setting, smaller, names):
    before = mixture_error(smaller, setting)
    dense = {name: tensor.clone() for name, tensor in setting.model.state_dict().items()}

    with torch.no_grad():
        benchmark("expert_repairs").repair(names, smaller)

    changes_nothing = names == "shared" and setting.kind == "copied"  # without a shared expert
    if changes_nothing:
        assert mixture_error(smaller, setting) == before
    else:
        assert mixture_error(smaller, setting) < before
    for name, tensor in setting.model.state_dict().items():
        assert torch.equal(tensor, dense[name])


def test_merged_experts_are_means_weighted_by_use(benchmark, setting, smaller):
    view = smaller.view
    products = view.grams.sum(0)
    use = view.weights.sum(0)
    dense = setting.mixture().experts.down_proj.detach()

    benchmark("expert_repairs").repair("merge", smaller)

    kept = list(smaller.kept)
    members = {expert: [expert] for expert in kept}
    for expert in {*range(6)} - {*kept}:
        norms = (products.diagonal()[kept] * products[expert, expert]).sqrt()
        members[kept[int((products[expert, kept] / norms).argmax())]].append(expert)
    merged = smaller.experts.module.down_proj
    for place, expert in enumerate(kept):
        shares = use[members[expert]] / use[members[expert]].sum()
        expected = (shares[:, None, None] * dense[members[expert]]).sum(0)
        torch.testing.assert_close(merged[place], expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def measured(benchmark, tmp_path, monkeypatch, capsys):
    """`measured(kind, "--flag", ...)` runs the script on a tiny mixture; returns what it shows and its record."""
    script = benchmark("experts")
    texts = tmp_path / "texts"
    texts.mkdir()
    for domain, shift in {"web": 3, "python": 40, "german": 6}.items():
        for role in ("trained", "held-out"):
            (texts / f"{domain}-{role}.txt").write_text(TEXT[shift:] + TEXT[:shift][::-1])
    output = tmp_path / "rows.json"
    usual = ["--text-folder", str(texts), "--output", str(output), "--dtype", "float32"]
    usual += ["--num-samples", "6", "--sequence-length", "32", "--max-windows", "2"]

    def run(kind, *flags):
        folder = tmp_path / kind
        if not folder.exists():
            tiny_mixture(kind).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        monkeypatch.setattr(sys, "argv", ["experts.py", str(folder), *usual, *flags])
        script.main()
        return capsys.readouterr().out, json.loads(output.read_text())

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", ["pruned", "dense"])
def test_rows_of_reap_are_what_the_package_gives(measured, tmp_path, kind, stream):
    # All domains, because experts are refitted to several texts only.
    flags = ["--shares", "0.34", "--calibrations", "all", "--criteria", "reap"]
    flags += ["--streams", stream]
    options = {} if stream == "pruned" else {"error_correction": "none"}

    _, record = measured(kind, *flags, "--repairs", "none,refit")

    dense, *rows = record["rows"]
    texts = tmp_path / "texts"
    tokenizer = tiny_tokenizer()
    windows = evaluation_windows(
        tokenizer, load_text(str(texts / "german-held-out.txt"), "test"), 32, 2
    )
    batches = []
    for domain in ("web", "python", "german"):
        text = load_text(str(texts / f"{domain}-trained.txt"), "calibration")
        ids = calibration_windows(tokenizer, text, 2, 32, 0)
        batches.append({"input_ids": ids, "source": domain})
    for row, refits in zip(rows, (False, True), strict=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
        config = FistaPruningConfig(pattern="experts:0.34", expert_refit=refits, **options)
        report = FistaPruner(config, progress=False).prune(model, batches)
        assert any(mixture.num_refitted for mixture in report.mixtures) == refits
        loss = math.log(evaluate_perplexity(model, windows, progress=False).perplexity)
        assert row["losses"]["german"] == pytest.approx(loss, abs=2e-4)
        assert row["losses"]["german"] != pytest.approx(dense["losses"]["german"], abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_that_may_not_choose_experts_computes_what_a_layer_without_them_does(
    benchmark, measured, kind, monkeypatch
):
    script = benchmark("experts")
    # Equal counts in all layers, which a smaller model can have, too.
    monkeypatch.setattr(
        script,
        "kept_by_layer",
        lambda scores, num_kept, fewest: {
            layer: script.experts_to_keep(of_layer, num_kept // len(scores))
            for layer, of_layer in scores.items()
        },
    )

    flags = ["--shares", "0.34", "--calibrations", "all", "--streams", "dense", "--repairs", "none"]
    _, record = measured(kind, *flags, "--criteria", "gradient,gradient_by_layer")

    dense, removed, kept_from_choosing = (row["losses"] for row in record["rows"])
    for domain, loss in removed.items():
        assert kept_from_choosing[domain] == pytest.approx(loss, abs=1e-5)
        assert abs(loss - dense[domain]) > 1e-4


def test_counts_by_layer_keep_the_best_of_the_model_and_enough_of_each_layer(benchmark):
    scores = {
        "first": torch.tensor([5.0, 1.0, 2.0, 6.0]),
        "second": torch.tensor([0.1, 0.4, 0.2, 0.3]),
    }

    kept = benchmark("experts").kept_by_layer(scores, num_kept=5, fewest=2)

    assert kept == {"first": (0, 2, 3), "second": (1, 3)}


def test_the_benchmark_of_experts_resumes_and_its_table_is_shown_again(
    benchmark, measured, tmp_path, monkeypatch, capsys
):
    flags = ["--shares", "0.34", "--calibrations", "web,all", "--repairs", "none"]
    _, first = measured("split", *flags, "--criteria", "reap,gradient")
    first["rows"][2]["losses"]["web"] = 99.0  # shows that this row is not measured again
    (tmp_path / "rows.json").write_text(json.dumps(first))

    shown, second = measured("split", *flags, "--criteria", "reap,gradient,ranks,random")

    assert second["rows"][:5] == first["rows"]
    assert [row["criterion"] for row in second["rows"][5:]] == ["ranks", "random"] * 2
    assert "| pruned | web | 0.34 | reap | none | 1 |" in shown
    dense = first["rows"][0]["losses"]["web"]
    of_reap = (99.0 - dense) / (first["rows"][1]["losses"]["web"] - dense)
    assert (
        f"| pruned | web | 0.34 | gradient | none | 1 | {99 - dense:.3f} | {of_reap:.2f} |" in shown
    )

    monkeypatch.setattr(sys, "argv", ["experts.py", str(tmp_path / "rows.json")])
    benchmark("experts").main()
    assert shown.endswith(capsys.readouterr().out)
