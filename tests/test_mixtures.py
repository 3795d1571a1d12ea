"""The mixtures of benchmarks/mixtures.py begin as the dense model, are trained, and resume."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokenizer, tiny_tokens
from transformers import AutoModelForCausalLM

SPLIT = {"experts": 4, "expert_channels": 8, "seed": 0}  # of 48 channels, 16 are shared


@pytest.fixture
def dense():
    return tiny_llama(num_hidden_layers=4, tie_word_embeddings=True)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=tiny_tokens()).logits


def router_inputs(model):
    """What enters the first router of a model, [tokens, hidden]."""
    inputs = []
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    logits_of(model)
    handle.remove()
    return inputs[0].flatten(0, -2)


def test_a_split_mixture_with_all_experts_at_equal_weights_is_the_dense_model(benchmark, dense):
    mixture = benchmark("mixture_start").split(dense, tiny_tokens(), active=4, **SPLIT)
    for layer in mixture.model.layers:
        layer.mlp.gate.weight.data.zero_()

    torch.testing.assert_close(logits_of(mixture), logits_of(dense), rtol=1e-4, atol=1e-5)


def test_a_copied_mixture_begins_as_the_dense_model(benchmark, dense):
    options = {"experts": 4, "active": 2, "dense_layers": 2, "seed": 0}

    mixture = benchmark("mixture_start").copied(dense, tiny_tokens(), **options)

    torch.testing.assert_close(logits_of(mixture), logits_of(dense), rtol=1e-4, atol=1e-5)
    are_mixtures = [hasattr(layer.mlp, "experts") for layer in mixture.model.layers]
    assert are_mixtures == [False, False, True, True]
    assert mixture.model.layers[2].mlp.gate.weight.std() > 0


def test_the_router_of_a_split_mixture_prefers_the_experts_with_the_largest_outputs(
    benchmark, dense
):
    mixture = benchmark("mixture_start").split(dense, tiny_tokens(32), active=2, **SPLIT)
    block = mixture.model.layers[0].mlp
    inputs = router_inputs(mixture)
    norms = []
    with torch.no_grad():
        for expert in range(4):
            chosen = torch.full((len(inputs), 1), expert)
            output = block.experts(inputs, chosen, torch.ones(len(inputs), 1))
            norms.append(output.norm(dim=-1))
        _, weights, chosen = block.gate(inputs)

    norms_of_all = torch.stack(norms, dim=1)
    assert norms_of_all.gather(1, chosen).mean() > 1.1 * norms_of_all.mean()
    torch.testing.assert_close(weights.sum(1), torch.full((len(inputs),), 2.0))


def test_the_shared_expert_has_the_channels_that_contribute_most(benchmark):
    dense = tiny_llama()
    strong = [3, 5, 8, 13, 21, 34, 40, 41, 0, 1, 2, 4, 6, 7, 9, 47]
    mlp = dense.model.layers[0].mlp
    mlp.down_proj.weight.data[:, strong] *= 100

    mixture = benchmark("mixture_start").split(dense, tiny_tokens(), active=4, **SPLIT)

    shared = mixture.model.layers[0].mlp.shared_experts.up_proj.weight
    rows = {tuple(row) for row in shared.tolist()}
    assert rows == {tuple(row) for row in mlp.up_proj.weight[strong].tolist()}


def test_channels_that_leave_no_shared_expert_are_refused(benchmark, dense):
    options = SPLIT | {"experts": 6}

    with pytest.raises(SystemExit, match="leave 0 of 48 channels"):
        benchmark("mixture_start").split(dense, tiny_tokens(), active=4, **options)


def test_clusters_are_of_equal_size_and_hold_similar_rows(benchmark):
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3).repeat(1, 4)
    points = directions.repeat_interleave(5, 0) + 0.1 * torch.randn(15, 12, generator=generator)

    clusters = benchmark("mixture_start").balanced_clusters(points, 3, seed=1).view(3, 5)

    assert sorted(clusters[:, 0].tolist()) == [0, 1, 2]
    assert (clusters == clusters[:, :1]).all()


def test_experts_as_channels_are_the_experts_one_by_one(benchmark, dense):
    benchmark("mixtures")  # registers this implementation
    mixture = benchmark("mixture_start").split(dense, tiny_tokens(), active=2, **SPLIT)
    results = []

    for implementation in ("eager", "channels"):
        mixture.set_experts_implementation(implementation)
        mixture.zero_grad()
        ids = tiny_tokens()
        output = mixture(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = [parameter.grad.clone() for parameter in mixture.parameters()]
        results.append([output.logits.detach(), *gradients])

    for one_by_one, as_channels in zip(*results, strict=True):
        torch.testing.assert_close(as_channels, one_by_one, rtol=1e-4, atol=1e-6)


def test_balancing_makes_a_favoured_expert_rarer(benchmark, dense):
    script = benchmark("mixtures")
    mixture = benchmark("mixture_start").split(dense, tiny_tokens(), active=1, **SPLIT)
    mixture.model.layers[0].mlp.gate.e_score_correction_bias[2] = 0.5
    watch = script.RouterWatch(mixture)
    shares = []

    for _ in range(600):
        logits_of(mixture)
        shares.append(watch.counts[0, 2] / watch.counts[0].sum())
        watch.balance()

    # All tokens go to this expert at first; an even share would be 0.25.
    assert shares[0] == 1
    assert shares[-1] < 0.4


def test_the_penalty_is_one_for_even_use_and_has_a_gradient(benchmark, dense):
    script = benchmark("mixtures")
    options = {"experts": 4, "active": 2, "dense_layers": 2, "seed": 0}
    mixture = benchmark("mixture_start").copied(dense, tiny_tokens(), **options)
    watch = script.RouterWatch(mixture)

    mixture(input_ids=tiny_tokens())
    first, second = watch.penalties
    (first + second).backward()

    assert len(watch.routers) == 2
    assert first > 1
    assert mixture.model.layers[3].mlp.gate.weight.grad.abs().max() > 0


def test_the_information_is_zero_for_equal_use_and_highest_for_experts_apart(benchmark):
    same = torch.full((3, 1, 6), 1 / 6)
    apart = torch.zeros(3, 1, 6)
    for domain in range(3):
        apart[domain, 0, 2 * domain : 2 * domain + 2] = 0.5

    information = benchmark("mixtures").information

    assert information(same).item() == pytest.approx(0, abs=1e-6)
    assert information(apart).item() == pytest.approx(math.log2(3))


def test_the_rate_rises_stays_and_falls(benchmark):
    share = benchmark("mixtures").rate_share

    shares = [share(step, 100) for step in range(100)]

    assert shares[:3] == [0.5, 1, 1]
    assert shares[69:71] == [1, 1]
    assert shares[71] == pytest.approx(29 / 30)
    assert shares[99] == pytest.approx(1 / 30)


def test_a_shorter_order_is_the_start_of_a_longer_one(benchmark):
    order = benchmark("mixtures").training_order

    long = order(5, 12, seed=3)

    assert order(5, 7, seed=3).tolist() == long[:7].tolist()
    assert sorted(long[:5].tolist()) == sorted(long[5:10].tolist()) == list(range(5))


def test_german_pages_lose_translators_and_doubles(benchmark):
    script = benchmark("mixture_texts")
    pages = {f"page{number}.1.gz": f"NAME\nSeite {number}\n" for number in range(60)}
    pages["ls.1.gz"] = "NAME\nlisten\n\nÜBERSETZUNG\nvon vielen\n"
    pages["dir.1.gz"] = "NAME\nlisten\n"

    trained, held_out = script.split_pages(pages)

    both = trained + held_out
    assert both.count("listen") == 1
    assert "von vielen" not in both
    assert len(trained) > 4 * len(held_out) > 0


@pytest.fixture
def make(benchmark, tmp_path, monkeypatch):
    """`make(folder, "--flag", ...)` runs mixtures.py on a tiny model and texts of its own."""
    script = benchmark("mixtures")
    texts = benchmark("mixture_texts")
    digits = "".join(str(number) for number in range(900))
    pages = {f"{number}.gz": f"die see ist tief {number} " * 8 for number in range(40)}
    monkeypatch.setattr(texts, "split_web", lambda text: (text, text[:400]))
    monkeypatch.setattr(
        texts, "python_texts", lambda *_, **__: ({"a.py": digits}, {"b.py": digits[:400]})
    )
    monkeypatch.setattr(texts, "german_pages", lambda: pages)
    save_tiny_folder(tmp_path / "dense")
    (tmp_path / "web.txt").write_text(TEXT)

    def run(folder, *flags):
        given = ["--web", str(tmp_path / "web.txt"), "--folder", str(tmp_path / folder)]
        given += ["--sequence-length", "32", "--max-windows", "2", "--every", "4"]
        given += ["--tokens", str(7 * 2 * 3 * 32), "--save-minutes", "0"]
        monkeypatch.setattr(sys, "argv", ["mixtures.py", str(tmp_path / "dense"), *given, *flags])
        script.main()
        return tmp_path / folder

    return run


KINDS = {
    "split": ["--kind", "split", "--experts", "4", "--active", "2", "--expert-channels", "8"],
    "copied": ["--kind", "copied", "--experts", "4", "--active", "2"],
}


@pytest.mark.parametrize("kind", [*KINDS])
def test_an_interrupted_training_resumes_with_the_same_bits(benchmark, make, monkeypatch, kind):
    script = benchmark("mixtures")
    whole = make("whole", *KINDS[kind])
    divergence = script.divergence
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 11:  # in the sixth step
            raise KeyboardInterrupt
        return divergence(*arguments, **options)

    monkeypatch.setattr(script, "divergence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make("resumed", *KINDS[kind])
    resumed = make("resumed", *KINDS[kind])

    for name in ("model/model.safetensors", "use.json", "texts/texts.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    logs = [json.loads((folder / "log.json").read_text()) for folder in (whole, resumed)]
    for log in logs:
        for row in log["rows"]:
            row.pop("seconds", None)
    assert logs[0] == logs[1]
    # Ten passes that ended, the interrupted one, and those of the two steps that were left.
    assert len(calls) == 10 + 1 + 4


@pytest.mark.parametrize("kind", [*KINDS])
def test_a_trained_mixture_is_written_with_its_log_and_its_use(make, kind):
    folder = make("run", *KINDS[kind], "--relative-step", "0.01")

    rows = json.loads((folder / "log.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 4, 7]
    assert rows[2]["tokens"] == 7 * 2 * 3 * 32
    for domain in ("web", "python", "german"):
        assert rows[2]["held_out"][domain] < rows[0]["held_out"][domain]
    use = json.loads((folder / "use.json").read_text())
    assert use["losses"] == pytest.approx(rows[2]["held_out"], rel=0.02)
    shares = torch.tensor(use["shares"]["german"])
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.dtype == torch.bfloat16
    expected = {"split": "Glm4MoeForCausalLM", "copied": "Ernie4_5_MoeForCausalLM"}
    assert type(model).__name__ == expected[kind]


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_files_of_a_mixture_are_as_servers_expect_them(benchmark, dense, tmp_path, kind):
    script = benchmark("mixtures")
    start = benchmark("mixture_start")
    if kind == "split":
        mixture = start.split(dense, tiny_tokens(), active=2, **SPLIT)
    else:
        options = {"experts": 4, "active": 2, "dense_layers": 2, "seed": 0}
        mixture = start.copied(dense, tiny_tokens(), **options)
    mixture.set_experts_implementation("channels")

    script.save_model(mixture, tiny_tokenizer(), tmp_path / "model")

    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["model.layers.3.mlp.experts.1.down_proj.weight"].dtype == torch.bfloat16
    biases = [name for name in weights if name.endswith("e_score_correction_bias")]
    assert len(biases) == {"split": 4, "copied": 2}[kind]
    assert all(weights[name].dtype == torch.float32 for name in biases)
    assert "lm_head.weight" not in weights
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_theta"] == dense.config.rope_parameters["rope_theta"]
    assert config.get("partial_rotary_factor") == {"split": 1.0, "copied": None}[kind]
    assert "channels" not in config.values()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded.set_experts_implementation("eager")
    for parameter in mixture.parameters():
        parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(logits_of(loaded), logits_of(mixture), rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_run_is_refused(make):
    make("run", *KINDS["split"])

    with pytest.raises(SystemExit, match="other settings"):
        make("run", *KINDS["split"], "--label-share", "0.25")
