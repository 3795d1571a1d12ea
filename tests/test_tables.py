"""The tables of the docs are what their commands print, or what is kept in benchmarks/results."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from optimum_fista import FistaPruningConfig
from optimum_fista.run.comparison.comparison import Comparison
from optimum_fista.run.config import RECIPES
from optimum_fista.run.speed.speed_report import SpeedReport

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ("calibration", "fresh", "other")


def kept_in(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def page_of(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("page", "name", "module", "table"),
    [
        ("howto/recover", "recovery", "recovery", "table"),
        ("howto/recover", "recovery_quick", "recovery", "table"),
        ("ablations", "recovery_seeds", "recovery", "table_of_seeds"),
        ("ablations", "recovery_seeds_small", "recovery", "table_of_seeds"),
        ("ablations", "heads", "heads", "table"),
        ("smaller", "smaller_smollm2_cpp", "llama_cpp", "table"),
        ("howto/elsewhere", "openvino_zeros", "openvino_zeros", "table"),
        ("reconstruction", "reconstruction", "reconstruction", "table"),
        ("penalty", "penalty_search", "penalty_search", "table"),
    ],
)
def test_a_table_of_the_docs_is_that_of_the_kept_rows(benchmark, page, name, module, table):
    assert "\n".join(getattr(benchmark(module), table)(kept_in(name)["rows"])) in page_of(page)


def test_estimates_of_large_models(benchmark):
    kept = kept_in("estimate")["models"]
    found = json.loads(json.dumps(benchmark("estimate").of_large_models()))
    assert "\n".join(benchmark("estimate").large_models_table(kept)) in page_of("scale")
    for name, model in kept.items():  # steps of methods differ a little between processors
        for place, peak in model["memory"].items():
            assert found[name]["memory"][place]["parts"] == pytest.approx(peak["parts"], rel=0.02)
        for stage, amounts in model["work"].items():
            assert found[name]["work"][stage] == pytest.approx(amounts, rel=0.02)
        assert found[name]["disk_bytes"] == model["disk_bytes"]


def test_recipes_in_the_quickstart(benchmark):
    """The measured rows are kept, and the estimates of large models are today's."""
    page = page_of("quickstart").split("### Recipes")[1].split("## 5.")[0]
    _, *kept = Comparison.read(RESULTS / "recipes.json").rows
    measured = {}
    for row in kept:
        pattern = {"sparsity": 0.5} if row.pattern == "0.5" else {"pattern": row.pattern}
        assert FistaPruningConfig.from_dict(row.config) == FistaPruningConfig.recipe(row.method, **pattern).resolved()
        perplexities = "/".join(f"{value:.2f}" for value in row.perplexity.values())
        measured[row.method] = f"{measured.get(row.method, '')} {perplexities} | {row.seconds['total']:.0f} |"
    assert len(measured) == 3
    assert all(f"| `{recipe}` |{cells}\n" in page for recipe, cells in measured.items())
    rows = [line.split("|")[1:-1] for line in page.split("| Llama-3-70B |")[1].splitlines() if line.startswith("| `")]
    shown = {cells[0].strip(" `"): [[float(n) for n in re.findall(r"[\d.]+", c)] for c in cells[2:]] for cells in rows}
    assert set(shown) == set(RECIPES)
    for recipe, numbers in shown.items():
        for name, (hours, device, host) in zip(("Llama-3-8B", "Llama-3-70B"), numbers, strict=True):
            model = benchmark("estimate").estimate_of(name, FistaPruningConfig.recipe(recipe))
            products = [sum(column) for column in zip(*model.work.values(), strict=True)]
            assert (products[0] / 100e12 + products[1] / 20e12) / 3600 == pytest.approx(hours, rel=0.06)
            found = [model.memory[place].total / 2**30 for place in ("device", "host")]
            assert found == pytest.approx([device, host], rel=0.06)


def unseen_factor(row: dict[str, float], to: dict[str, float]) -> float:
    """Geometric mean of the perplexities of texts that nothing was fitted to, over those of another row."""
    return math.prod(row[name] / to[name] for name in ("wikitext2-test", "lambada", "held out")) ** (1 / 3)


def test_what_a_recovery_gains():
    """What the page says of the table in multiples of the dense perplexity."""
    rows = kept_in("recovery")["rows"]
    page = page_of("howto/recover")
    found = {(row["folder"], row["row"]): row for row in rows}
    dense = found["s24", "dense"]["perplexity"]
    words = " ".join(page.split())
    for name, said in (
        (("s24", "all:311296@4e-4"), "2:4 model has {:.2f} times the dense perplexity after {:.0f} minutes"),
        (("s50", "all:131072"), "50% model has {:.2f} times after {:.0f} minutes"),
    ):
        row = found[name]
        assert said.format(unseen_factor(row["perplexity"], dense), row["recovery"]["seconds"] / 60) in words
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if "`recover`** for 12 minutes" in line)
    rows = (found["s50", "all:131072"], found["s24", "all:311296@4e-4"])
    shown = [row["perplexity"][text] for row in rows for text in ("wikitext2-test", "lambada")]
    assert [cell.strip(" *") for cell in line.split("|")[2:-1] if cell.strip()] == [f"{value:.1f}" for value in shown]
    of_49152 = [found["s24", f"{kind}:49152"]["perplexity"] for kind in ("all", "lora", "norms")]
    assert (
        "{:.2f} times, `lora` {:.2f} and `norms` {:.2f}".format(*(unseen_factor(p, dense) for p in of_49152)) in words
    )


def test_what_a_short_recovery_gains():
    """The factors that the page and the README say."""
    rows = kept_in("recovery_quick")["rows"]
    page = page_of("howto/recover")
    found = {(row["folder"], row["row"]): row["perplexity"] for row in rows}
    quick = [unseen_factor(found[f"{name}-bf16", "all:32768"], found[name, "pruned"]) for name in ("s50", "s70", "s24")]
    dense = unseen_factor(found["s50", "all:49152"], found["s50", "dense"])
    said = "falls to {:.2f} (50%), {:.2f} (70%) and {:.2f} (2:4) of the default's"
    words = " ".join(page.split())
    assert said.format(*quick) in words
    assert f"On 49,152 tokens the 50% model reaches {dense:.2f} times the dense perplexity" in words
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if "`recover`** on 32,768" in line)
    shown = [
        found[f"{name}-bf16", "all:32768"][text] for name in ("s50", "s24") for text in ("wikitext2-test", "lambada")
    ]
    assert [cell.strip(" *") for cell in line.split("|")[2:-1] if cell.strip()] == [f"{value:.1f}" for value in shown]


def test_estimates_beside_real_runs(benchmark):
    """docs/scale.md: within a factor of 1.25 (memory), and 25% (time)."""
    runs = kept_in("estimate")["runs"]
    assert "\n".join(benchmark("estimate").runs_table(runs)) in page_of("scale")
    assert len(runs) > 10
    for run in runs.values():
        assert 1 / 1.25 < run["estimated_bytes"] / run["measured_bytes"] < 1.25
        assert 0.75 < run["estimated_seconds"] / run["measured_seconds"] < 1.25


def rows_of_the_results(title):
    """Cells of the first table after a title of docs/results.md, by what is in front of the numbers."""
    section = page_of("results").split(f"## {title}\n")[1].split("\n## ")[0]
    table = section[section.index("\n|") :].strip().split("\n\n")[0]
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_perplexities_of_the_results_are_those_kept():
    kept = Comparison.read(RESULTS / "perplexity.json")
    (_, *titles), _, *lines = rows_of_the_results("Perplexity")
    patterns = [{"50%": "0.5", "60%": "0.6", "70%": "0.7"}.get(title, title) for title in titles]
    shown = {(p, method): cell for method, *cells in lines for p, cell in zip(patterns, cells, strict=True) if cell}
    found = {}
    for row in kept.rows:
        perplexities = [row.perplexity[text] for text in ("wikitext2-raw-test", "lambada", "held-out")]
        pattern = "0.5" if row.pattern == "-" else row.pattern  # the dense model stands in the first column
        found[pattern, row.method] = "/".join(f"{perplexity:.2f}" for perplexity in perplexities)
    assert shown == found
    assert len(shown) > 20


@pytest.mark.parametrize(
    ("title", "name", "count"), [("Four times the text", "more_text", 6), ("A rotated model", "rotated", 15)]
)
def test_what_windows_change_is_as_kept(title, name, count):
    rows = kept_in(name)["rows"]
    dense = {row["label"]: row["perplexity"]["held-out"] for row in rows if row["pattern"] == "-"}
    has_seconds = any(row["seconds"] for row in rows)
    kept = []
    for row in rows:
        perplexity, seconds = row["perplexity"], row["seconds"]
        zeros = {"0.5": "50%", "0.7": "70%"}.get(row["pattern"], row["pattern"])
        cells = [f"{perplexity[text]:.2f}" for text in ("wikitext2-test", "lambada")]
        cells.append(f"{perplexity['held-out'] / dense[row['label']]:.2f}")
        cells += [f"{seconds['total']:.0f}" if "total" in seconds else ""] * has_seconds
        kept += [[zeros, row["label"], *cells]] * (row["pattern"] != "-")
    assert rows_of_the_results(title)[2:] == kept
    assert len(kept) == count


def test_what_a_rotation_and_more_windows_gain():
    rows = kept_in("rotated")["rows"]
    found = {(row["label"], row["pattern"]): row["perplexity"] for row in rows}

    def factors(few, many):
        above_dense = [
            [
                {k.replace("-o", " o"): v / found[label, "-"][k] for k, v in found[label, "2:4"].items()}
                for label in labels
            ]
            for labels in [(f"{many}, seed {seed}", f"{few}, seed {seed}") for seed in range(3)]
        ]
        of_all = [unseen_factor(*pair) for pair in above_dense]
        of_two = [unseen_factor(*({**texts, "held out": 1} for texts in pair)) ** 1.5 for pair in above_dense]
        return *of_all, statistics.mean(of_all), *of_two

    words = " ".join(page_of("results").split())
    said = (
        "falls to {:.2f}, {:.2f} and {:.2f} times the default's ({:.2f} on average), that of WikiText-2 and LAMBADA to "
        "{:.2f}, {:.2f} and {:.2f} times."
    )
    assert said.format(*factors("24 windows", "128 windows, rotated")) in words
    said = "the mean of the three texts falls to {:.2f}, {:.2f} and {:.2f} times ({:.2f} on average)"
    assert said.format(*factors("24 windows, AMD", "224 windows of 512, rotated, AMD")) in words
    scaled = factors("24 windows, AMD", "384 windows of 256, rotated, scaled, AMD")
    assert "to {:.2f}, {:.2f} and {:.2f} times ({:.2f} on average)".format(*scaled) in words


def test_what_larger_groups_cost():
    rows = Comparison.read(RESULTS / "perplexity.json").rows
    found = {r.pattern: statistics.geometric_mean(r.perplexity.values()) for r in rows if r.method == "default"}
    factors = [found[pattern] / found["2:4"] for pattern in ("4:8", "8:16", "16:32")]
    said = "4:8 has {:.2f} times the perplexity of 2:4, 8:16 has {:.2f} times and 16:32 has {:.2f} times"
    assert said.format(*factors) in " ".join(page_of("results").split())
    assert f"8:16 has {factors[1]:.2f} times the perplexity of 2:4" in page_of("howto/two-of-four")


def test_accuracies_of_the_results_are_those_kept():
    kept = Comparison.read(RESULTS / "zero_shot.json")
    _, _, *lines = rows_of_the_results("Accuracy")
    for row, (zeros, method, perplexity, *cells) in zip(kept.rows, lines, strict=True):
        scores = [row.accuracy["arc_easy_lines"]["acc"], row.accuracy["arc_easy_lines"]["acc_norm"]]
        scores.append(row.accuracy["lambada_lines"]["acc"])
        assert ({"": "-", "50%": "0.5"}.get(zeros, zeros), method) == (row.pattern, row.method)
        assert perplexity == f"{row.perplexity['wikitext2-test']:.2f}"
        assert cells == [f"{100 * score.value:.1f}±{100 * score.stderr:.1f}" for score in scores]


def test_accuracies_on_whole_sets_are_those_kept():
    kept = kept_in("zero_shot_whole")["rows"]
    _, _, *lines = rows_of_the_results("Whole task sets")
    for row, (zeros, method, *cells) in zip(kept, lines, strict=True):
        assert row["documents"] == {"arc_easy_lines": 2376, "lambada_lines": 5153}
        assert (zeros, method) == (row["zeros"], row["method"])
        arc, lambada = row["results"]["arc_easy_lines"], row["results"]["lambada_lines"]
        scores = ((arc, "acc"), (arc, "acc_norm"), (lambada, "acc"))
        assert cells == [f"{100 * found[name]:.1f}±{100 * found[f'{name}_stderr']:.1f}" for found, name in scores]


def test_layer_problems_of_the_results_are_those_kept():
    rows = kept_in("solvers")["rows"]
    (_, *titles), _, *lines = rows_of_the_results("Layer problems")
    patterns = ["0.5", "0.6", "0.7", "2:4", "4:8", "8:16", "16:32"]
    assert titles[:7] == ["50%", "60%", "70%", "2:4", "4:8", "8:16", "16:32"]
    assert {method for method, *_ in lines} == {row["method"] for row in rows}
    for method, *cells in lines:
        found = {pattern: [r for r in rows if (r["method"], r["pattern"]) == (method, pattern)] for pattern in patterns}
        for pattern, cell in zip(patterns, cells[:7], strict=True):
            errors = [statistics.geometric_mean(r[text] for r in found[pattern]) for text in TEXTS]
            assert [float(shown) for shown in cell.split("/")] == pytest.approx([100 * e for e in errors], abs=0.0051)
        seconds = [sum(row["seconds"] for row in found[pattern]) for pattern in ("0.5", "2:4")]
        assert cells[7:9] == [f"{total:.1f}" for total in seconds]
        assert cells[9] == f"{sum(row['flops'] for row in found['0.5']) / 1e9:.0f}"


@pytest.mark.parametrize("name", ["decoding", "decoding_avx2", "decoding_smollm2", "decoding_smollm2_avx2"])
def test_decoding_speeds(name):
    """Rates of the first variant, then how many times those the others have; each variant is a row of the page."""
    report = SpeedReport.from_dict(kept_in(name))
    page = page_of("speed")
    first, *others = report.variants.values()
    cells = [f"{first.tokens_per_second[n]:.1f}/s" if n in first.tokens_per_second else "" for n in (1, 4, 16)]
    cells += [f"{first.prefill_tokens_per_second:.1f}/s", f"{first.memory_bytes / 2**20:,.0f} MiB", ""]
    assert shown_row(next(iter(report.variants)), cells) in page
    for label, found in list(report.variants.items())[1:]:
        rates = {n: found.tokens_per_second[n] / first.tokens_per_second[n] for n in found.tokens_per_second}
        cells = [f"{rates[n]:.2f}x" if n in rates else "" for n in (1, 4, 16)]
        cells.append(f"{found.prefill_tokens_per_second / first.prefill_tokens_per_second:.2f}x")
        cells.append(f"{found.memory_bytes / first.memory_bytes:.2f}x")
        cells.append("" if found.same_tokens is None else f"{found.same_tokens:.0%}")
        assert shown_row(label, cells) in page
    assert len(others) in (2, 3)
    for found in report.variants.values():
        for size, speed in found.tokens_per_second.items():
            median = statistics.median(found.seconds[f"batch {size}"])
            assert speed == pytest.approx(size * report.settings.new_tokens / median)


def test_smaller_models():
    """Perplexities, and speeds of smaller models as many times those of the dense ones."""
    page = page_of("smaller")
    decoder = 30 * 3_540_096  # weights of the decoder layers of SmolLM2-135M
    for name in ("smaller", "smaller_8"):
        for row in Comparison.read(RESULTS / f"{name}.json").rows:
            cells = [f"`{row.pattern}`" if row.config else "", f"`{row.method}`"]
            cells += [f"{row.perplexity[text]:.2f}" for text in ("wikitext2-test", "lambada", "openwebtext-rest")]
            assert shown_row(f"{row.totals.get('num_removed', 0) / decoder:.1%}", cells) in page
    for name, label in (("smaller_llama", "1.1B, Transformers"), ("smaller_smollm2", "SmolLM2-135M, Transformers")):
        values = kept_in(name)
        dense, smaller = SpeedReport.from_dict(values).variants.values()
        ratios = [smaller.tokens_per_second[n] / dense.tokens_per_second[n] for n in (1, 4, 16)]
        ratios.append(smaller.prefill_tokens_per_second / dense.prefill_tokens_per_second)
        ratios += [smaller.memory_bytes / dense.memory_bytes, smaller.weight_bytes / dense.weight_bytes]
        assert shown_row(label, [f"{ratio:.2f}x" for ratio in ratios]) in page
    for name, label in (("smaller_llama_cpp", "1.1B"), ("smaller_layers_cpp", "SmolLM2-135M")):
        dense, smaller = kept_in(name)["rows"]
        decode, prefill = (statistics.median(smaller[k]) / statistics.median(dense[k]) for k in ("decode", "prefill"))
        memory, weights = (smaller[k] / dense[k] for k in ("memory_bytes", "file_bytes"))
        cells = [f"{decode:.2f}x", "", "", *(f"{ratio:.2f}x" for ratio in (prefill, memory, weights))]
        assert shown_row(f"{label}, llama.cpp", cells) in page


def test_a_trained_mixture_without_experts():
    """Losses on what was held out, in nats a token; a random choice is the mean of three, with its deviation."""
    page = page_of("howto/experts")
    rows = Comparison.read(RESULTS / "experts.json").rows
    usual = ["default", "default:expert_refit=false", "default:expert_saliency=frequency:expert_refit=false"]
    random = [f"default:expert_saliency=random:expert_refit=false:seed={seed}" for seed in range(3)]
    found = {(row.pattern, row.method): {t: math.log(p) for t, p in row.perplexity.items()} for row in rows}
    assert len(found) == 1 + 4 * 6
    for text, losses in found["-", "dense"].items():
        assert shown_row(f"{text} | none", [f"{losses:.3f}", "", "", ""]) in page
        for number in (1, 2, 4, 6):
            pattern = f"experts:{number / 8:g}"
            cells = [f"{found[pattern, method][text]:.3f}" for method in usual]
            others = [found[pattern, method][text] for method in random]
            cells.append(f"{statistics.fmean(others):.3f} ± {statistics.stdev(others):.3f}")
            assert shown_row(f"{text} | {number} of 8", cells) in page
    training = kept_in("train_small")
    last = training["rows"][-1]
    assert f"{training['parameters'] / 1e6:.1f}M parameters" in page
    assert f"{last['step'] * 4 * 512 / 1e6:.1f} million tokens" in " ".join(page.split())


def shown_row(label: str, cells: list[str]) -> str:
    return f"| {label} |" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"


def test_single_products(benchmark):
    lines = kept_in("kernels")["lines"]
    assert "\n".join(benchmark("packed_kernels").table(lines, threads=2)) in page_of("speed")


def test_solver_ablations():
    rows = kept_in("solver_ablations")["rows"]
    section = page_of("solver").split("## What each part")[1].split("## ")[0]
    lines = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    assert len(lines[2:]) == len({row["method"] for row in rows})
    for _, method, *cells in lines[2:]:
        found = [row for row in rows if row["method"] == method]
        for text, cell in zip(TEXTS, cells, strict=True):
            assert f"{statistics.geometric_mean(row[text] for row in found):.5f}"[1:] == cell


def test_ablations(benchmark):
    first, second = kept_in("ablations"), kept_in("ablations_small")
    page = page_of("ablations")
    assert set(first) == set(benchmark("ablations").STUDIES)
    for study in (*first.values(), *second.values(), kept_in("temperature")):
        assert "\n".join(benchmark("ablations").table(study)) in page


def test_what_a_temperature_gains():
    rows = kept_in("temperature")["rows"]
    mean = {(r["label"], r["pattern"], r["seed"]): statistics.geometric_mean(r["perplexity"].values()) for r in rows}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if "temperature" in row:
            label, pattern, seed = row["label"], row["pattern"], row["seed"]
            lost = 1 - mean[label, pattern, seed] / mean[label.removesuffix(", scaled"), pattern, seed]
            found.setdefault((label, pattern), []).append((100 * lost, row["temperature"]["value"]))
    gains = {key: [f"{gain:.1f}" for gain in sorted(g for g, _ in values)] for key, values in found.items()}
    values = {key: [f"{value:.2f}" for value in sorted(v for _, v in pairs)] for key, pairs in found.items()}
    few = "16 windows, scaled"
    said = (
        f"at most {gains[few, '2:4'][-1]}% at 2:4, and {gains[few, '0.7'][0]} to {gains[few, '0.7'][-1]}% at 70%. The "
        f"temperatures are {values[few, '0.5'][-1]}, {values[few, '2:4'][0]} to {values[few, '2:4'][-1]}, and "
        f"{values[few, '0.7'][0]} to {values[few, '0.7'][-1]}."
    )
    words = " ".join(page_of("ablations").split())
    assert said in words
    assert max(float(gain) for gain in gains[few, "0.5"]) <= 0.1
    more = "192 windows, scaled", "2:4"
    said = "is {0} to {2} there, and the perplexity falls by {3} to {5}%."
    assert said.format(*values[more], *gains[more]) in words


def test_processors():
    """The same rows on two kinds: what differs, as docs/ablations.md says it."""
    rows = kept_in("processors")["rows"]
    section = page_of("ablations").split("## Processors")[1].split("\n## ")[0]
    differences = {}
    for row in rows:
        one, other = (statistics.geometric_mean(found.values()) for found in row["perplexity"].values())
        differences.setdefault(row["pattern"], []).append(100 * abs(other / one - 1))
    assert f"{len(rows)} rows" in section
    studies = kept_in("ablations").values()
    kept = [row["perplexity"] for study in studies for row in study["rows"]]
    assert all(row["perplexity"]["Intel Xeon"] in kept for row in rows if row["pattern"] == "2:4")
    (widest,) = [r["perplexity"] for r in rows if (r["method"], r["pattern"]) == ("default:error_correction=0", "2:4")]
    assert " and ".join(f"{found['wikitext2-test']:.1f}" for found in widest.values()) in section
    for pattern in ("0.5", "0.7", "2:4"):
        found = differences[pattern]
        assert f"| {pattern} | {len(found)} | {statistics.median(found):.1f}% | {max(found):.1f}% |" in section


def test_heads_that_gradients_miss():
    rows = kept_in("heads")["rows"]
    largest, *others = sorted(rows, key=lambda row: -row["measured"])
    assert largest["measured"] > 1e6 * largest["predicted"]
    assert all(row["measured"] < 100 * row["predicted"] for row in others)
    ratios = [row["measured"] / row["predicted"] for row in rows]
    counts = sum(0.1 <= r <= 10 for r in ratios), sum(r < 0.1 for r in ratios), sum(r > 10 for r in ratios)
    assert counts == (186, 81, 3)


def test_two_ranks_against_two_threads():
    values = kept_in("ranks")
    medians = {way: statistics.median(run["seconds"] for run in runs) for way, runs in values["runs"].items()}
    _, threads, together = medians.values()
    page = page_of("ranks")
    assert f"take {together / threads:.2f} times as long" in page
    for seconds in medians.values():
        assert f"{seconds:.1f} s" in page.replace("\n", " ")


@pytest.mark.parametrize("name", ["streaming", "streaming_wanda"])
def test_files_against_memory(name):
    values = kept_in(name)
    medians = [statistics.median(run["seconds"] for run in runs) for runs in values["runs"].values()]
    page = page_of("streaming").replace("\n", " ")
    in_memory, from_files = medians
    assert f"{from_files / in_memory:.2f} times" in page
    assert f"({from_files:.1f} s against {in_memory:.1f} s" in page


def test_fine_tuning_of_decoder_layers():
    rows = kept_in("reconstruction")["rows"]
    page = page_of("reconstruction")
    found = {row["row"]: row for row in rows}
    for name, row in found.items():
        if "+" in name:
            errors = [layer["finetuning"] for layer in row["layers"] if layer["finetuning"]]
            assert len(errors) == 10
            assert all(error["error"] <= error["error_before"] for error in errors)

    def gains(name: str) -> list[float]:
        before, after = found[name]["perplexity"], found[f"{name}+32"]["perplexity"]
        return [100 * (1 - after[text] / before[text]) for text in before]

    assert f"gains {min(gains('default')):.0f} to {max(gains('default')):.0f}% for twice" in page
    assert f"After Wanda it gains {min(gains('wanda')):.0f} to {max(gains('wanda')):.0f}%" in page
    means = {name: statistics.geometric_mean(row["perplexity"].values()) for name, row in found.items()}
    seconds = {name: row["processor_seconds"] for name, row in found.items() if name != "dense"}
    text = f"from {means['default']:.1f} to {means['default@32']:.1f} in {seconds['default@32']:.0f} seconds, with "
    text += f"fine-tuning to {means['default+32']:.1f} in {seconds['default+32']:.0f}."
    assert text in page.replace("\n ", "")
    assert seconds["default"] < seconds["wanda+32"]
    for text in found["default"]["perplexity"]:
        assert found["default"]["perplexity"][text] < found["wanda+32"]["perplexity"][text]
