"""Products are in bfloat16 in forward passes and sums over tokens, if the run says so, and nowhere else."""

import pytest
import torch
from pruning import prune
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista.model import gram as module
from optimum_fista.model.forward import compute_dtype_of, quick_products, quick_products_in
from optimum_fista.prune import loop

precision = torch.get_float32_matmul_precision


UNITS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@pytest.mark.parametrize("there", [None, *UNITS])
def test_auto_asks_the_device(monkeypatch, there):
    for unit in UNITS:
        monkeypatch.setattr(torch.cpu, unit, lambda unit=unit: unit == there, raising=False)
    assert compute_dtype_of("auto", torch.device("cpu")) == (torch.bfloat16 if there else torch.float32)
    assert compute_dtype_of("auto", torch.device("cuda")) == torch.bfloat16
    for given in ("float32", "bfloat16"):
        assert compute_dtype_of(given, torch.device("cpu")) == getattr(torch, given)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "highest"), ("bfloat16", "medium")])
def test_layers_and_sums_have_the_precision_asked_for_and_the_solver_float32(monkeypatch, dtype, expected):
    seen: dict[str, set[str]] = {"layer": set(), "gradient": set(), "sum": set(), "solver": set()}
    add_upper, solve = module._add_upper, loop.solve_group

    def note(place):
        seen[place].add(precision())

    monkeypatch.setattr(module, "_add_upper", lambda *given: (note("sum"), add_upper(*given))[1])
    monkeypatch.setattr(loop, "solve_group", lambda *given: (note("solver"), solve(*given))[1])
    model = tiny_llama()
    for layer in model.model.layers:
        hook = lambda *_: note("gradient" if torch.is_grad_enabled() else "layer")  # noqa: E731
        layer.mlp.act_fn.register_forward_hook(hook)
    prune(model, tiny_tokens().split(4), compute_dtype=dtype)
    traced = {"highest"}  # which operators are called, and how, is looked up on one batch
    assert seen.pop("layer") == {expected} | traced
    assert seen == {"gradient": {expected}, "sum": {expected}, "solver": {"highest"}}
    assert precision() == "highest"


def test_the_precision_comes_back_after_an_error():
    with quick_products_in(torch.bfloat16), pytest.raises(RuntimeError), quick_products():
        raise RuntimeError(precision())
    assert precision() == "highest"
    with quick_products():
        assert precision() == "highest"
