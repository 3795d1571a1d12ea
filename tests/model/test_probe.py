import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.calibration import CalibrationBatch
from optimum_fista.model.hidden_states import record_inputs
from optimum_fista.model.paused import PausedForwards
from optimum_fista.model.probe import AnswerYes, Meter, Work, probe_layer
from optimum_fista.model.sharing import trace_groups

LENGTH = 16


def first_layer(model, device):
    layers = find_decoder_layers(model)
    ids = torch.arange(LENGTH, device=device)[None] % (VOCAB_SIZE - 4) + 4
    with torch.no_grad(), AnswerYes():
        recorded = record_inputs(model, layers, [CalibrationBatch(ids)])
    name, layer = next(iter(layers))
    return layer, find_operators(name, layer), recorded.calls[0][0], recorded.hidden_states[0]


def probed(family):
    real = tiny_model(family)
    real.config.pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real.config, dtype=torch.float32).eval().requires_grad_(False)
    return probe_layer(*first_layer(model, "meta"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learnt_without_weights_is_what_happens_with_them(family):
    found = probed(family)
    layer, operators, call, hidden = first_layer(tiny_model(family), "cpu")
    with torch.no_grad():
        groups, _ = trace_groups(layer, operators, call, hidden)
        assert [[o.name for o in group] for group in found.groups] == [[o.name for o in group] for group in groups]
        with Meter() as meter, PausedForwards(layer, [group[0].module for group in groups], [call], [hidden]) as passes:
            for stop in range(len(groups)):
                for inputs in passes.inputs(stop):
                    del inputs
                assert found.paused_bytes[stop] == pytest.approx(meter.held, rel=0.02)
                assert found.running_bytes[stop] == pytest.approx(meter.take_peak(), rel=0.4)
            passes.output(0)
        with FlopCounterMode(display=False) as counter:
            call.run(layer, hidden)
    linear = sum(2 * LENGTH * o.shape[0] * o.shape[1] for o in operators.values())
    assert found.forward.products == linear
    assert found.forward.products + found.forward.attention == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_gradients_flow_through_every_operator_once():
    found = probed("llama")
    linear = sum(2 * LENGTH * o.shape[0] * o.shape[1] for group in found.groups for o in group)
    assert found.backward.products == linear
    assert found.saved_bytes > max(found.running_bytes)


def test_meter_counts_products_traffic_and_bytes():
    left, right = torch.ones(4, 8), torch.ones(8, 2)
    with Meter() as meter:
        product = left @ right
        assert meter.held == 4 * 8
        product.add_(1)
        view = product.view(8)
        del product
        assert meter.held == 4 * 8
        del view
        assert meter.held == 0
    assert meter.work == Work(products=2 * 4 * 8 * 2, moved_bytes=2 * 4 * 8, operations=2)
    assert meter.take_peak() == 4 * 8
    assert meter.take_peak() == 0


def test_answers_are_for_meta_tensors_only():
    with AnswerYes():
        assert bool(torch.zeros(3, device="meta").isfinite().all())
        assert torch.equal(torch.zeros(3, device="meta"), torch.ones(3, device="meta"))
        assert not torch.equal(torch.zeros(3), torch.ones(3))
        assert float(torch.zeros(())) == 0.0
