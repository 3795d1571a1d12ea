"""`--measure` and `--protect`: the loss on held-out texts that the user names, before and after a run."""

import dataclasses
import json
import math
from contextlib import nullcontext
from functools import partial

import pytest
import small_reports
import torch
from rare_tokens import COMMON, RARE, bpe_tokenizer, save, text_of
from small_reports import measured_text, mixture_report
from tiny_llama import QUICK
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista import pruner as pruner_module
from optimum_fista.cli.main import main
from optimum_fista.folder.card import model_card
from optimum_fista.folder.checkpoint import read_report
from optimum_fista.folder.output import foreign_files
from optimum_fista.headlines import headlines
from optimum_fista.memory import size_text
from optimum_fista.origin import OriginReport
from optimum_fista.prune import measuring
from optimum_fista.solve.patterns import parse_pattern
from optimum_fista.text.loss import cut_stretches, tokenized_text
from optimum_fista.text.windows import first_token

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tokens that stay|belong to no token|bits per byte|rank-deficient|lost more than)"
)
# 4,096 tokens and more, most of them in words
COMMON_TEXT = text_of(COMMON, 5000)
RARE_TEXT = text_of(f"{RARE} {COMMON}", 6000)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model with a tokenizer; do not write to it."""
    return save(tmp_path_factory.mktemp("measuring") / "dense", spare=0)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with texts: sea.txt and zoo.txt to measure on, text.txt and sky.txt to calibrate on."""
    folder = tmp_path_factory.mktemp("private-folder")
    (folder / "sea.txt").write_text(COMMON_TEXT)
    (folder / "zoo.txt").write_text(RARE_TEXT)
    (folder / "text.txt").write_text(text_of(COMMON, 300))
    (folder / "sky.txt").write_text(text_of(RARE, 300))
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A dense model with four experts in each of three decoder layers, and a tokenizer; do not write to it."""
    folder = tmp_path_factory.mktemp("mixture") / "mixture"
    tokenizer = bpe_tokenizer()
    tiny_model("mixtral", vocab_size=len(tokenizer), num_hidden_layers=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokens_of_experts(folder, text: str) -> list[tuple[int, ...]]:
    """For each decoder layer of a mixture, how many tokens of the measured stretches reach each of four experts."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    counts = [torch.zeros(4, dtype=torch.int64) for _ in model.model.layers]

    def count(layer_number, _, arguments):
        _, chosen, _ = arguments
        counts[layer_number] += torch.bincount(chosen.flatten(), minlength=4)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(partial(count, number))
    tokenized = tokenized_text(
        cut_stretches(text),
        tokenizer,
        bos=first_token(tokenizer),
        longest=model.config.max_position_embeddings,
    )
    with torch.no_grad():
        for sequence in tokenized.sequences:
            model(torch.tensor([list(sequence)]))
    return [tuple(numbers.tolist()) for numbers in counts]


def bytes_of_weights(folder) -> int:
    """The bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def bits_of(folder, text: str) -> float:
    """Bits per byte of the measured stretches of a text, by the model and the tokenizer in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = 0.0
    num_bytes = 0
    longest = model.config.max_position_embeddings
    for stretch in cut_stretches(text):
        encoded = tokenizer(stretch, return_offsets_mapping=True, add_special_tokens=False)
        for start in range(0, len(encoded["input_ids"]), longest):
            ids = torch.tensor(encoded["input_ids"][start : start + longest])
            places = encoded["offset_mapping"][start : start + longest]
            if len(ids) < 2:
                continue
            with torch.no_grad():
                (logits,) = model(ids.unsqueeze(0)).logits
            nats += float(cross_entropy(logits[:-1], ids[1:], reduction="sum"))
            num_bytes += len(stretch[places[0][1] : places[-1][1]].encode())
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("pattern", ["2:4", "channels:0.25", "layers:0.5", "vocab:0.18"])
def test_with_every_pattern_report_card_and_output_state_the_loss_of_each_text(
    dense, texts, tmp_path, capsys, pattern
):
    output = tmp_path / "pruned"
    sizes = ["--device", "cpu"] if pattern.startswith("vocab:") else QUICK
    flags = ["--pattern", pattern, "--calibration", str(texts / "text.txt"), *sizes]
    flags += ["--measure", str(texts / "sea.txt"), "--measure", str(texts / "zoo.txt")]

    assert main(["prune", str(dense), "-o", str(output), *flags]) == 0

    report = read_report(output)
    assert [text.name for text in report.texts] == ["sea.txt", "zoo.txt"]
    for text, content in zip(report.texts, (COMMON_TEXT, RARE_TEXT), strict=True):
        assert text.dense == pytest.approx(bits_of(dense, content), rel=1e-4)
        assert text.pruned == pytest.approx(bits_of(output, content), rel=1e-4)
        for loops in (text.loops_dense, text.loops_pruned):
            assert (loops.num_prompts, loops.num_new_tokens) == (32, 32)

    said = capsys.readouterr()
    assert "sea.txt, " in said.err or pattern == "vocab:0.18"  # the plan, which other runs have
    printed = said.out
    card = (output / "README.md").read_text()
    for text in report.texts:
        assert (
            f"{text.name}: {text.dense:.3f} before and {text.pruned:.3f} bits per byte" in printed
        )
        assert f"| loss on {text.name} | {text.dense:.3f} before" in card
        loops = f"loops in {text.loops_dense.num_loops} of 32 greedy continuations before and in "
        assert f"{loops}{text.loops_pruned.num_loops} of 32 after" in printed
        assert loops in card
    assert "verdict: " in printed
    assert "| verdict | " in card
    files = [*output.rglob("*.json"), output / "README.md"]
    assert not any("private-folder" in file.read_text() for file in files)
    assert main(["verify", str(output)]) == 0
    assert foreign_files(output) == []  # so --overwrite replaces the folder


def test_a_run_that_removes_experts_counts_the_tokens_of_each_text_that_reach_each_expert(
    mixture, texts, tmp_path
):
    output = tmp_path / "pruned"
    flags = ["--pattern", "experts:0.25+layers:0.34", *QUICK]
    flags += ["--calibration", str(texts / "text.txt"), "--calibration", str(texts / "sky.txt")]
    flags += ["--measure", str(texts / "sea.txt"), "--measure", str(texts / "zoo.txt")]

    assert main(["prune", str(mixture), "-o", str(output), *flags]) == 0

    report = read_report(output)
    sources = [source["source"] for source in report.calibration["sources"]]
    assert sources == ["text.txt", "sky.txt"]
    layers_kept = report.model["layers_kept"]
    assert len(layers_kept) == len(report.mixtures) == 2
    of_sea = tokens_of_experts(mixture, COMMON_TEXT)
    of_zoo = tokens_of_experts(mixture, RARE_TEXT)
    for layer_number, part in zip(layers_kept, report.mixtures, strict=True):
        assert part.tokens_of_texts == (of_sea[layer_number], of_zoo[layer_number])
        of_both = [sum(numbers) for numbers in zip(*part.tokens_of_sources, strict=True)]
        assert of_both == list(part.expert_tokens)
        assert [sum(numbers) for numbers in part.tokens_of_sources] == [2 * 4 * 16] * 2
    for text, content in zip(report.texts, (COMMON_TEXT, RARE_TEXT), strict=True):
        assert text.dense == pytest.approx(bits_of(mixture, content), rel=1e-4)
        assert text.pruned == pytest.approx(bits_of(output, content), rel=1e-4)
    assert report.weight_bytes_before == bytes_of_weights(mixture)
    assert main(["report", str(output)]) == 0
    page = (output / "fista" / "report.html").read_text()
    assert "Weight files" in page
    assert size_text(bytes_of_weights(output)) in page
    assert page.count('<svg role="img"') == 4
    assert "<b>zoo.txt</b> (measured): removed experts had " in page


def test_a_loaded_mixture_counts_the_tokens_that_reach_its_experts_before_the_run(mixture):
    model = AutoModelForCausalLM.from_pretrained(mixture)
    tokens = torch.randint(3, 200, (4, 32))
    num_parameters = model.num_parameters()
    of_experts = sum(
        p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters()
    )

    report = FistaPruner(FistaPruningConfig(pattern="experts:0.25"), progress=False).prune(
        model, [tokens], measure={"sea": COMMON_TEXT}
    )

    of_sea = tokens_of_experts(mixture, COMMON_TEXT)
    assert [part.tokens_of_texts for part in report.mixtures] == [(numbers,) for numbers in of_sea]
    assert all(part.tokens_of_sources == () for part in report.mixtures)
    # A token uses two of four experts before, and two of three after; three routers of 32 inputs lose a row each.
    used_before = num_parameters - of_experts // 2
    assert report.model["active_parameters"] == {"before": used_before, "after": used_before - 96}


def test_a_loaded_model_is_measured_before_and_after(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    pruner = FistaPruner(FistaPruningConfig(method="wanda", allocation="uniform"), progress=False)
    tokens = torch.randint(3, 200, (4, 32))

    report = pruner.prune(model, [tokens], measure={"sea": COMMON_TEXT}, protect={"sea": 1000.0})
    pruner.save_pretrained(model, tmp_path / "pruned", AutoTokenizer.from_pretrained(dense))

    (text,) = report.texts
    assert text.dense == pytest.approx(bits_of(dense, COMMON_TEXT), rel=1e-4)
    assert text.pruned == pytest.approx(bits_of(tmp_path / "pruned", COMMON_TEXT), rel=1e-4)
    assert not report.unprotected
    assert read_report(tmp_path / "pruned").texts == report.texts


def test_a_run_that_breaks_its_promise_is_kept_and_not_called_good(dense, texts, tmp_path, capsys):
    output = tmp_path / "pruned"
    flags = ["--pattern", "vocab:0.18", "--calibration", str(texts / "text.txt")]
    flags += ["--protect", f"{texts / 'zoo.txt'}=1", "--protect", f"{texts / 'sea.txt'}=3"]

    assert main(["prune", str(dense), "-o", str(output), *flags]) == 1

    printed = capsys.readouterr()
    assert "error: not good: zoo.txt lost more than was allowed" in printed.err
    assert "The folder is kept" in printed.err
    report = read_report(output)
    assert [text.name for text in report.unprotected] == ["zoo.txt"]
    assert "not good: zoo.txt" in (output / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "smaller"),
    [
        ("experts:0.25", None, "experts:0.12"),  # half of the rise is allowed: 1 of 8 experts
        ("channels:0.25/64", None, "channels:0.12/64"),
        ("unstructured", 0.5, "25% unstructured"),
        ("2:4", None, None),
        ("heads:0.25+channels:0.25", None, None),
        ("vocab:0.25", None, None),
        ("unstructured", 0.01, None),  # less than 1% would be left
        ("unstructured", 0.58, "29% unstructured"),  # half of 58 as a float is less than 29
    ],
)
def test_a_smaller_share_is_named_if_a_text_lost_too_much(pattern, sparsity, smaller):
    report = mixture_report()
    report.config = {"pattern": pattern, "sparsity": sparsity}
    report.model["parts_counted"] = {
        "experts": {"before": 8, "after": 6, "router_groups": 1},
        "channels": {"before": 1536, "after": 1152, "router_groups": 1},
    }
    report.texts = [
        measured_text("sea.txt", 1.0, 1.2, at_most=1.1),  # half of the rise is allowed
        measured_text("sky.txt", 1.0, 1.4, at_most=1.3),  # three quarters of it are
        measured_text("zoo.txt", 1.0, 1.9, at_most=2.0),
    ]

    assert measuring.pattern_within_limits(report) == smaller


def test_no_smaller_share_is_named_if_all_texts_keep_to_their_limits():
    report = mixture_report()
    report.texts = [measured_text("sea.txt", 1.0, 1.2, at_most=1.2), measured_text("sky.txt", 1, 9)]

    assert measuring.pattern_within_limits(report) is None


def test_what_an_earlier_run_has_cost_counts_for_the_smaller_share():
    report = mixture_report()
    report.texts = [measured_text("sea.txt", 1.2, 1.6, at_most=1.4)]
    report.origin = OriginReport(texts={"sea.txt": 1.0})
    report.model["parts_counted"]["experts"] = {"before": 8, "after": 6, "router_groups": 1}

    # From 1.2 to 1.4, and not to 1.6: half of the share.
    assert measuring.pattern_within_limits(report) == "experts:0.12"


@pytest.mark.parametrize(
    ("asked", "before", "after", "smaller", "options"),
    [
        # 0.95 of the experts that went, rounded down: 1, 4 and 7
        ("experts:0.25", 8, 6, "experts:0.12", {}),
        ("experts:0.31", 16, 11, "experts:0.25", {}),
        ("experts:0.13", 60, 52, "experts:0.12", {}),
        # 7 would stay, which is no multiple of 2
        ("experts:0.25", 8, 6, None, {"keep_divisible": 2}),
        ("experts:0.31", 16, 11, "experts:0.25", {"keep_divisible": 4}),
        ("experts:0.12", 8, 7, None, {}),
        # each of 4 groups of the router loses one expert, and not two
        ("experts:0.5", 16, 8, "experts:0.25", {"router_groups": 4}),
        ("experts:0.25", 16, 12, None, {"router_groups": 4}),
        # 0.95 of the 384 channels that went are 364. The next number that a run removes is 320, a multiple of 64.
        ("channels:0.25", 1536, 1152, "channels:0.21", {}),
        ("channels:0.25/16", 1536, 1152, "channels:0.23/16", {}),
        ("channels:0.25", 40, 30, "channels:0.22", {}),
        ("heads:0.5", 8, 4, "heads:0.38", {}),
        ("heads:0.5", 2, 1, None, {}),
        ("layers:0.5", 6, 3, "layers:0.33", {}),
        ("layers:0.17", 6, 5, None, {}),
    ],
)
def test_the_smaller_share_removes_fewer_parts_and_as_many_as_a_run_takes(
    asked, before, after, smaller, options
):
    kind = asked.partition(":")[0]
    router_groups = options.get("router_groups", 1)
    keep_divisible = options.get("keep_divisible")
    report = small_reports.report()
    report.config = {"pattern": asked, "keep_divisible": keep_divisible}
    report.model["parts_counted"] = {
        kind: {"before": before, "after": after, "router_groups": router_groups}
    }
    report.texts = [measured_text("sea.txt", 1.0, 2.0, at_most=1.95)]

    named = measuring.pattern_within_limits(report)

    assert named == smaller
    if named is not None:
        (share,) = parse_pattern(named, None).shares
        share = dataclasses.replace(share, divisible_by=keep_divisible)
        assert after < share.num_kept(before, router_groups) < before


@pytest.mark.parametrize("parts", ["experts:0.5", "layers:0.5"])
def test_a_run_counts_the_parts_from_which_the_smaller_share_is_found(parts):
    # two decoder layers with 8 experts in two groups of the router
    model = tiny_model("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=2)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))

    report = FistaPruner(FistaPruningConfig(pattern=parts), progress=False).prune(model, [tokens])

    kind = parts.partition(":")[0]
    expected = {
        "experts": {"before": 8, "after": 4, "router_groups": 2},
        "layers": {"before": 2, "after": 1, "router_groups": 1},
    }
    assert report.model["parts_counted"] == {kind: expected[kind]}


def test_after_two_runs_the_loss_before_is_that_of_the_first_dense_model(
    dense, texts, tmp_path, capsys
):
    flags = ["--calibration", str(texts / "text.txt"), "--measure", str(texts / "sea.txt")]
    first = tmp_path / "first"
    second = tmp_path / "second"

    assert main(["prune", str(dense), "-o", str(first), "--pattern", "vocab:0.18", *flags]) == 0
    flags += ["--pattern", "channels:0.25", *QUICK]
    assert main(["prune", str(first), "-o", str(second), *flags]) == 0

    report = read_report(second)
    (text,) = report.texts
    (of_first_run,) = read_report(first).texts
    assert text.sha256 == of_first_run.sha256
    assert report.first_bits_per_byte(text) == of_first_run.dense
    assert report.times_of(text) == text.pruned / of_first_run.dense
    assert f"{of_first_run.dense:.3f} of the dense model" in capsys.readouterr().out


def test_a_size_by_two_runs_is_measured_against_the_dense_model(dense, texts, tmp_path):
    output = tmp_path / "sized"
    flags = ["--target-size", "0.8", "--calibration", str(texts / "text.txt"), *QUICK]
    flags += ["--measure", str(texts / "sea.txt")]

    assert main(["prune", str(dense), "-o", str(output), *flags]) == 0

    report = read_report(output)
    (text,) = report.texts
    assert report.first_bits_per_byte(text) == pytest.approx(bits_of(dense, COMMON_TEXT), rel=1e-4)
    assert text.pruned == pytest.approx(bits_of(output, COMMON_TEXT), rel=1e-4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        (b"", "is empty"),
        (b"\xff\xfe\xff", "is not UTF-8"),
        (b"a few words", "is too short"),
    ],
)
def test_a_text_that_cant_be_measured_is_refused_before_the_run(
    dense, texts, tmp_path, capsys, content, words
):
    file = tmp_path / "held.txt"
    if content is not None:
        file.write_bytes(content)
    flags = ["--calibration", str(texts / "text.txt"), "--measure", str(file), *QUICK]

    assert main(["prune", str(dense), "-o", str(tmp_path / "out"), *flags]) == 1

    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("size", [[], ["--target-size", "0.9"]], ids=["pattern", "size"])
def test_a_text_that_is_calibrated_on_is_refused_as_a_measured_text(
    dense, texts, tmp_path, capsys, size
):
    flags = ["--calibration", str(texts / "sea.txt"), "--measure", str(texts / "sea.txt"), *QUICK]
    flags += size

    assert main(["prune", str(dense), "-o", str(tmp_path / "out"), *flags]) == 1

    assert "is among the calibration text" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["zoo.txt", "zoo.txt=much", "=1.02", "zoo.txt=0.9", "zoo.txt=nan"])
def test_a_protected_text_needs_a_number_of_at_least_1(dense, tmp_path, capsys, flag):
    assert main(["prune", str(dense), "-o", str(tmp_path / "out"), "--protect", flag]) == 1

    assert "--protect" in capsys.readouterr().err


def test_bad_names_limits_and_contents_of_measured_texts_are_refused(dense, tmp_path):
    pruner = FistaPruner(progress=False)
    wrong = [
        ({"measure": {"a": COMMON_TEXT}, "protect": {"b": 1.1}}, "protect has 'b'"),
        ({"measure": {"a": COMMON_TEXT}, "protect": {"a": 0.5}}, "protect has 0.5"),
        ({"measure": {"/x/a": COMMON_TEXT, "/y/a": COMMON_TEXT}}, "two texts that are called 'a'"),
        ({"measure": {"a": " "}}, "is empty"),
        ({"measure": {"a": tmp_path}}, "pass the text itself"),
    ]
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            pruner.prune(str(dense), [], output_dir=tmp_path / "out", **options)


def test_the_origin_in_the_configuration_has_no_texts_if_none_were_measured(dense, texts, tmp_path):
    flags = ["--calibration", str(texts / "text.txt"), *QUICK]

    assert main(["prune", str(dense), "-o", str(tmp_path / "out"), *flags]) == 0

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "texts" not in config["fista_pruning"]["origin"]


def test_two_limits_for_one_protected_text_are_refused(dense, tmp_path, capsys):
    flags = ["--protect", "zoo.txt=1.02", "--protect", "zoo.txt=1.5"]

    assert main(["prune", str(dense), "-o", str(tmp_path / "out"), *flags]) == 1

    assert "'zoo.txt' with 1.02 and with 1.5: pass one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt, "stopped by Ctrl-C"),
        (OSError(28, "No space left on device"), r"OSError: \[Errno 28\] No space left on device"),
    ],
)
def test_a_run_whose_texts_cant_be_measured_to_the_end_is_finished_and_says_so(
    dense, texts, tmp_path, capsys, monkeypatch, error, reason
):
    output = tmp_path / "pruned"
    flags = ["--pattern", "2:4", "--calibration", str(texts / "text.txt"), *QUICK]
    flags += ["--protect", f"{texts / 'sea.txt'}=1.02"]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(measuring, "losses_of_folder", fail)
    with pytest.warns(match=rf"the loss on sea\.txt is not known \({reason}\)\."):
        status = main(["prune", str(dense), "-o", str(output), *flags])

    assert status != 0
    printed = capsys.readouterr().err
    assert "give the same command again" not in printed
    if error is KeyboardInterrupt:
        finished = f"the model in {output} is finished, and its texts were not measured to the end"
        assert f"\ninterrupted: {finished}\n" in printed
    assert read_report(output).texts_not_measured == ["sea.txt"]
    assert "the loss is not known on sea.txt" in (output / "README.md").read_text()
    assert foreign_files(output) == []


def test_a_run_that_is_killed_while_texts_are_measured_leaves_a_report_that_says_so(
    dense, texts, tmp_path, monkeypatch
):
    output = tmp_path / "pruned"
    flags = ["--pattern", "2:4", "--calibration", str(texts / "text.txt"), *QUICK]
    flags += ["--protect", f"{texts / 'sea.txt'}=1.02"]
    states = []
    measure = measuring.losses_of_folder

    def look_at_the_folder(*arguments, **options):
        """What a kill would leave: the report and the card in the folder at this moment."""
        states.append((read_report(output).verdict_of_texts, (output / "README.md").read_text()))
        return measure(*arguments, **options)

    monkeypatch.setattr(measuring, "losses_of_folder", look_at_the_folder)
    main(["prune", str(dense), "-o", str(output), *flags])

    assert len(states) == 2  # before the dense model is measured, and before the pruned one is
    for verdict, card in states:
        assert verdict == "no verdict: the loss is not known on sea.txt"
        assert verdict in card
    report = read_report(output)
    assert report.texts_not_measured == []
    assert [text.name for text in report.texts] == ["sea.txt"]
    assert "the loss is not known" not in (output / "README.md").read_text()
    assert foreign_files(output) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(5, "Input/output error"), "OSError"), (KeyboardInterrupt(), "stopped by Ctrl-C")],
)
def test_a_loaded_model_that_cant_be_measured_after_the_run_stays_pruned(
    dense, monkeypatch, error, reason
):
    model = AutoModelForCausalLM.from_pretrained(dense)
    config = FistaPruningConfig(method="wanda", allocation="uniform")
    measure_before = pruner_module.losses_of

    def fail_after_the_run(*arguments, label, **others):
        if label == "Measuring after":
            raise error
        return measure_before(*arguments, label=label, **others)

    monkeypatch.setattr(pruner_module, "losses_of", fail_after_the_run)
    tokens = torch.randint(3, 200, (4, 32))
    pruner = FistaPruner(config, progress=False)
    is_interrupted = isinstance(error, KeyboardInterrupt)
    expectation = (
        pytest.raises(measuring.MeasuringInterrupted, match="LlamaForCausalLM is pruned")
        if is_interrupted
        else nullcontext()
    )
    with pytest.warns(UserWarning, match=f"the loss on sea is not known .{reason}"), expectation:
        pruner.prune(model, [tokens], measure={"sea": COMMON_TEXT})

    report, _ = pruner.result(model)
    assert report.texts_not_measured == ["sea"]
    assert (model.model.layers[0].mlp.down_proj.weight == 0).float().mean() > 0.4


def test_the_card_of_a_retrained_model_calls_its_losses_those_before_retraining(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    pruner = FistaPruner(FistaPruningConfig(method="wanda", allocation="uniform"), progress=False)
    tokens = torch.randint(3, 200, (4, 32))
    report = pruner.prune(model, [tokens], measure={"sea": COMMON_TEXT})

    trained = dataclasses.replace(report, retrained=True)

    card = model_card(trained, str(dense))
    assert "| loss on sea, before retraining | " in card
    assert "| verdict, before retraining | " in card
    names = [headline.name for headline in headlines(trained)]
    assert "Bits per byte of sea, before retraining" in names


@pytest.mark.parametrize("pattern", ["2:4", "vocab:0.18"])
def test_a_run_that_is_killed_before_texts_are_measured_leaves_a_report_that_says_so(
    dense, texts, tmp_path, monkeypatch, pattern
):
    def killed(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr("optimum_fista.pruner.measure_folder", killed)
    output = tmp_path / "pruned"
    sizes = ["--device", "cpu"] if pattern.startswith("vocab:") else QUICK
    flags = ["--pattern", pattern, "--calibration", str(texts / "text.txt"), *sizes]
    flags += ["--measure", str(texts / "sea.txt")]

    assert main(["prune", str(dense), "-o", str(output), *flags]) != 0

    report = read_report(output)
    assert report.texts_not_measured == ["sea.txt"]
    assert "the loss is not known on sea.txt" in (output / "README.md").read_text()
