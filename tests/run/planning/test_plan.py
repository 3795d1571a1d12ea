import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live_memory import LiveMemory
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.errors import UnsupportedArchitectureError
from optimum_fista.run.planning.machine import MachineRates
from optimum_fista.run.planning.memory import Ledger
from optimum_fista.run.planning.model import planned_model
from optimum_fista.run.planning.plan import PruningPlan, plan_pruning
from optimum_fista.run.pruning import layer_finetuning

ROOT = Path(__file__).resolve().parents[3]
RATES = MachineRates.of(products=1e12, moved_bytes=1e11)


def planned(model=None, config=None, **options) -> PruningPlan:
    settings = {"num_samples": 8, "sequence_length": 16, "device": "cpu", "measure": False}
    model = tiny_llama().config if model is None else model
    return plan_pruning(model, config, **(settings | options))


def llama(**sizes) -> LlamaConfig:
    return LlamaConfig(**({"vocab_size": 256, "dtype": "bfloat16"} | sizes))


HUGE = llama(
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    vocab_size=128256,
)


@pytest.mark.parametrize(
    "config",
    [
        FistaPruningConfig(pattern="2:4", method="wanda"),
        FistaPruningConfig(0.3, method="magnitude", scope="row"),
        FistaPruningConfig(
            0.6, method="sparsegpt", exclude="*.0.*.down_proj", overrides={"*.k_proj": "1:4", "*.o_proj": 0}
        ),
    ],
    ids=lambda config: config.method,
)
def test_counts_are_those_of_the_run(config):
    plan = planned(config=config)
    model = tiny_llama()
    report = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))
    for last, group in plan.groups.items():
        found = [o for o in report.operators if o.name.endswith(f".{last}.weight")]
        assert group.operators == len(found)
        assert group.parameters == sum(o.shape[0] * o.shape[1] for o in found)
        assert group.zeros == sum(o.shape[0] * o.shape[1] - o.num_kept for o in found)
    assert sum(group.operators for group in plan.groups.values()) == len(report.operators)
    assert plan.left_dense == report.left_dense
    assert plan.other_parameters + sum(g.parameters for g in plan.groups.values()) == model.num_parameters()


def test_zeros_that_are_shared_add_up():
    plan = planned()
    report = FistaPruner(FistaPruningConfig(), progress=False).prune(tiny_llama(), tiny_tokens().split(4))
    kept = sum(operator.num_kept for operator in report.operators)
    assert sum(g.parameters - g.zeros for g in plan.groups.values()) == kept
    assert any("operators share the zeros" in note for note in plan.notes)


def test_a_model_of_405_billion_parameters_needs_no_weights():
    plan = planned(HUGE, num_samples=128, sequence_length=2048, device="cuda", storage_device="cpu")
    assert plan.model["num_parameters"] == 405_853_388_800
    gib = {place: peak.total / 2**30 for place, peak in plan.peaks.items()}
    assert 40 < gib["device"] < 200
    assert gib["host"] < plan.model["bytes"] / 2**30 / 4
    streams = plan.peaks["host"].parts
    assert streams["hidden states, dense"] == 2 * 128 * 2048 * 16384
    assert plan.seconds is None
    forward = 2 * 128 * 2048 * sum(group.parameters for group in plan.groups.values())
    assert 2 * forward < plan.stages["forward passes"].products < 2.6 * forward


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peaks_are_sums_of_their_parts(device):
    plan = planned(HUGE, device=device)
    assert set(plan.peaks) == ({"host"} if device == "cpu" else {"device", "host"})
    for peak in plan.peaks.values():
        assert peak.total == sum(peak.parts.values())
        assert all(size > 0 for size in peak.parts.values())
    if device == "cuda":
        assert "decoder layer" in plan.peaks["device"].parts
        assert "Python and libraries" not in plan.peaks["device"].parts


def test_hidden_states_wait_where_they_are_told_to():
    near = planned(HUGE, num_samples=128, sequence_length=2048, device="cuda")
    far = planned(HUGE, num_samples=128, sequence_length=2048, device="cuda", storage_device="cpu")
    assert near.peaks["device"].total > far.peaks["device"].total
    assert near.peaks["host"].total < far.peaks["host"].total


def test_hidden_states_on_the_way_to_the_gradients_wait_there_too(monkeypatch):
    held = {}

    def note(ledger, label, *passing):
        for name, _, *where in passing:
            if name == "hidden states between layers":
                held.setdefault(label, set()).add(*(where or ["device"]))

    monkeypatch.setattr(Ledger, "moment", note)
    planned(HUGE, device="cuda", storage_device="cpu")
    assert held == {"gradients of the loss": {"host"}, "loss": {"host"}}


def test_what_costs_more_is_planned_to_cost_more():
    config = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    small = planned(config, FistaPruningConfig(method="wanda"), rates=RATES)
    for options in ({"num_samples": 32}, {"sequence_length": 64}):
        more = planned(config, FistaPruningConfig(method="wanda"), rates=RATES, **options)
        assert more.products > small.products
        assert sum(more.seconds.values()) > sum(small.seconds.values())
        assert more.peaks["host"].total > small.peaks["host"].total
    for method in ("sparsegpt", "obs_admm", "fista", "alps"):
        other = planned(config, FistaPruningConfig(method=method), rates=RATES)
        assert other.stages["solving"].products > small.stages["solving"].products
        assert other.peaks["host"].total > small.peaks["host"].total
    none = planned(config, FistaPruningConfig(method="wanda", error_correction="none"))
    assert none.stages["forward passes"].products < 0.6 * planned(config).stages["forward passes"].products


@pytest.mark.parametrize("method", ["wanda", "obs_admm"])
def test_held_out_sequences_cost_memory_and_products(method):
    config = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    without, held_out = (
        planned(config, FistaPruningConfig(method=method, held_out=n), num_samples=64, rates=RATES) for n in (0, 8)
    )
    assert held_out.peaks["host"].total > without.peaks["host"].total
    assert held_out.stages["statistics"].products > without.stages["statistics"].products
    assert held_out.seconds["statistics"] > without.seconds["statistics"]
    assert held_out.stages["solving"].products == without.stages["solving"].products
    assert "64 x 16 calibration tokens (8 sequences held out)" in str(held_out)
    assert "held out" not in str(without)


def test_tokens_held_out_do_not_count_against_rank_deficiency():
    notes = planned(config=FistaPruningConfig(held_out=7), num_samples=9).notes
    assert any(note.startswith("32 calibration tokens for 48 inputs") for note in notes)


def test_self_sampling_and_rank_deficiency_are_told():
    plan = planned(calibration="self")
    assert any("--calibration self" in note for note in plan.notes)
    assert plan.stages["calibration text"].products > 0
    assert any("rank-deficient" in note for note in planned(num_samples=1).notes)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_patterns_that_match_nothing_are_named_as_by_the_run(family):
    config = FistaPruningConfig(
        method="magnitude",
        include=("*.layers.*", "*.nowhere"),
        exclude=("lm_head", "*.0.self_attn.q_proj", "*.experts.1.down_proj", "*.mlp.gate"),
        overrides={"*.experts.0.*": 0.25, "*.up_proj.weight": 0.5},
    )
    model = tiny_model(family)
    notes = [note for note in planned(model.config, config).notes if "matches no linear operator" in note]
    with pytest.warns(UserWarning, match="matches no linear operator"):
        report = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))
    assert notes == [warning for warning in report.warnings if "matches no linear operator" in warning]
    assert [note.partition(":")[0] for note in notes] == ["include", "exclude", "overrides"]
    assert ("experts" in "".join(notes)) == (family == "llama")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_fused_experts_are_counted_as_by_the_run(family):
    config = FistaPruningConfig(
        method="magnitude",
        scope="row",
        exclude=("*.experts.1.down_proj", "*.k_proj"),
        overrides={"*.experts.0.*": 0.25, "*.up_proj": "2:4"},
    )
    model = tiny_model(family)
    plan = planned(model.config, config)
    report = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))
    assert set(plan.groups) == {
        operator.name.removesuffix(".weight").rsplit(".", 1)[-1] for operator in report.operators
    }
    for last, group in plan.groups.items():
        found = [o for o in report.operators if o.name.endswith((f".{last}", f".{last}.weight"))]
        assert group.operators == len(found)
        assert group.parameters == sum(o.shape[0] * o.shape[1] for o in found)
        assert group.zeros == sum(o.shape[0] * o.shape[1] - o.num_kept for o in found)
    assert plan.left_dense == report.left_dense
    assert plan.other_parameters + sum(g.parameters for g in plan.groups.values()) == model.num_parameters()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_operators_of_an_expert_fill_its_matrix(family):
    """Also where matrices are stored as [in, out]."""
    found = planned_model(tiny_model(family).config, FistaPruningConfig(), 1, 16).experts
    assert len(found) == 2 * 2
    for experts in found:
        assert len(experts.pruned) == experts.count == 4
        for operators in experts.pruned:
            assert {columns for _, (_, columns) in operators} == {experts.shape[1]}
            assert sum(rows for _, (rows, _) in operators) == experts.shape[0]


def test_experts_that_stay_dense_cost_no_solving():
    model = tiny_model("mixtral")
    plan = planned(model.config)
    dense = planned(model.config, FistaPruningConfig(exclude=("*.experts*",)))
    half = planned(model.config, FistaPruningConfig(exclude=("*.experts.[01].*",)))
    assert set(dense.groups) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(dense.left_dense.values()) == {"exclude"}
    for stage in ("statistics", "solving"):
        whole, some, none = (p.stages[stage].products for p in (plan, half, dense))
        assert none < some < whole
        assert whole - some == pytest.approx((whole - none) / 2)
    assert dense.stages["forward passes"].products == plan.stages["forward passes"].products


@pytest.mark.parametrize("options", [{"include": ("*.experts.*",)}, {"exclude": ("*.self_attn.*",)}])
def test_experts_alone(options):
    config = FistaPruningConfig(method="magnitude", **options)
    model = tiny_model("mixtral")
    plan = planned(model.config, config)
    report = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))
    assert sum(group.operators for group in plan.groups.values()) == len(report.operators) == 2 * 4 * 3
    assert plan.left_dense == report.left_dense


def test_experts_in_an_unknown_form_are_refused_as_by_the_run(monkeypatch):
    monkeypatch.setattr("optimum_fista.model.architecture.can_be_split", lambda _: False)
    model = tiny_model("mixtral")
    for run in (planned, lambda _: FistaPruner(progress=False).prune(model, tiny_tokens().split(4))):
        with pytest.raises(UnsupportedArchitectureError, match=r"in a form that can't be pruned.*pass exclude"):
            run(model.config)
    assert "down_proj" not in planned(model.config, FistaPruningConfig(exclude=("*.experts",))).groups


def test_plain_values_and_text():
    plan = planned(rates=RATES)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["peaks"]["host"]["total"] == plan.peaks["host"].total
    assert values["products"] == pytest.approx(sum(s["products"] for s in values["stages"].values()))
    text = str(plan)
    for part in ("q_proj", "peak memory, host", "decoder layer", "TFLOP", "solving", "disk"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: pass at least 1"),
        ({"batch_size": 0}, "batch_size=0: pass at least 1"),
        ({"config": FistaPruningConfig(held_out=8)}, "held_out=8: of num_samples=8 sequences none is left"),
        ({"config": FistaPruningConfig(pattern="2:5")}, "which 2:5 does not divide"),
        ({"config": FistaPruningConfig(include="*.nothing")}, "no linear operator to prune"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(options, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        planned(**options)


def test_a_gpu_that_is_not_here_is_planned_without_times():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    plan = planned(device="cuda", measure=True)
    assert plan.seconds is None
    assert any("time is not estimated" in note for note in plan.notes)
    assert plan.products > 0


def test_a_quantized_model_is_refused():
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantized by 'gptq'"):
        planned(config)


def test_a_real_run_keeps_to_its_plan(tmp_path):
    output = tmp_path / "plan.json"
    command = [sys.executable, "benchmarks/plan.py", "--cases", "small", "--seconds", "4", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(output.read_text())["cases"]
    assert case["memory_ratio"] == pytest.approx(1, abs=0.2)
    assert 0.5 < case["time_ratio"] < 2
    above_imports = case["measured"]["peak_bytes"] - case["measured"]["import_bytes"]
    assert case["planned_bytes"] - case["measured"]["import_bytes"] == pytest.approx(above_imports, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuning_is_planned_as_it_runs(dtype, monkeypatch):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    config = FistaPruningConfig(0.5, method="magnitude", finetune="layer", finetune_steps=6)
    train, seen = layer_finetuning.reconstruct, []

    def watched(*arguments, **options):
        with FlopCounterMode(display=False) as products, LiveMemory() as memory:
            made = train(*arguments, **options)
        seen.append((products.get_total_flops(), memory.peak))
        return made

    monkeypatch.setattr(layer_finetuning, "reconstruct", watched)
    ids = torch.randint(4, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    FistaPruner(config, progress=False).prune(tiny_llama(**sizes).to(dtype), ids.split(2))
    (products, memory), *_ = seen
    plan = planned(
        tiny_llama(**sizes).config, config, num_samples=8, sequence_length=32, batch_size=2, dtype=dtype, rates=RATES
    )
    without = planned(tiny_llama(**sizes).config, dataclasses.replace(config, finetune=None))
    assert plan.stages["fine-tuning"].products == pytest.approx(products, rel=0.1)
    assert "fine-tuning" not in without.stages
    assert plan.peaks["host"].moment == "fine-tuning"
    parts = plan.peaks["host"].parts
    foretold = parts["trained weights, their gradients and moments"] + parts["activations of one batch"]
    assert 0.8 < foretold / memory < 1.25
