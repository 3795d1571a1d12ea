"""Whatever numerical environment the caller is in, a run has its own, and the caller finds theirs as it was."""

from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from pruning import same, weights
from safetensors.torch import load_file
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista import FistaPruner, PruningCallback
from optimum_fista.environment import numerical_environment
from optimum_fista.solve.methods import create_method
from optimum_fista.solve.patterns import Unstructured
from optimum_fista.solve.problem import InputStatistics, LayerProblem


@contextmanager
def set_to(get, set_, value):
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


cuda = torch.backends.cuda.matmul
AROUND = {
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "dtype": partial(set_to, torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": partial(set_to, lambda: None, torch.set_default_device, "meta"),
    "device context": partial(torch.device, "meta"),
    "inference mode": torch.inference_mode,
    "precision": partial(
        set_to, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "newer precision": partial(
        set_to, lambda: cuda.fp32_precision, partial(setattr, cuda, "fp32_precision"), "tf32"
    ),
}


@contextmanager
def all_at_once():
    with ExitStack() as stack:
        for around in AROUND.values():
            stack.enter_context(around())
        yield


def surroundings():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


class Inside(PruningCallback):
    """Keeps what surrounds the solver, as `surroundings` returns it."""

    def on_operator_end(self, operator):
        self.surroundings = surroundings()


def prune_in_memory(inside, batches, given, tmp_path):
    FistaPruner(progress=False, callbacks=[inside]).prune(given, batches)
    return weights(given)


def prune_files(inside, batches, given, tmp_path):
    given.save_pretrained(tmp_path / "dense")
    FistaPruner(progress=False, callbacks=[inside]).prune(
        tmp_path / "dense", batches, output_dir=tmp_path / "out"
    )
    tensors = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def solve(inside, batches, given, tmp_path):
    generator = torch.Generator().manual_seed(0)
    with numerical_environment(), torch.no_grad():
        weight = torch.randn(16, 32, generator=generator)
        inputs = torch.randn(90, 32, generator=generator)
        problem = LayerProblem(weight, InputStatistics(inputs.T @ inputs, 90, inputs.mean(0)))
        solution = create_method("fista").prune(problem, Unstructured(0.5))
        inside.surroundings = surroundings()
    return {"weight": solution.weight, "mask": solution.mask}


RUNS = [prune_in_memory, prune_files, solve]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {
        run: run(Inside(), tiny_tokens().split(4), tiny_llama(), tmp_path_factory.mktemp("x"))
        for run in RUNS
    }


@pytest.mark.parametrize(
    ("run", "around"),
    [
        (prune_in_memory, all_at_once),
        *((solve, around) for around in AROUND.values()),
        (prune_files, all_at_once),
    ],
)
def test_a_run_sets_its_own_environment_and_restores_the_callers(
    around, run, undisturbed, tmp_path
):
    model = tiny_llama()
    tokens = tiny_tokens()
    inside = Inside()

    with around():
        outside = surroundings()
        batches = [batch.clone() for batch in tokens.split(4)]
        result = run(inside, batches, model, tmp_path)
        assert surroundings() == outside

    assert same(result, undisturbed[run])
    assert inside.surroundings == (
        False,
        torch.float32,
        torch.device("cpu"),
        False,
        False,
        "ieee",
        "ieee",
    )


def test_weights_that_change_are_not_cached_by_the_callers_autocast():
    layer = torch.nn.Linear(4, 4, bias=False)
    outputs = []

    with torch.autocast("cpu", torch.bfloat16), numerical_environment():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(layer(torch.ones(1, 4)))
            layer.weight.data.mul_(2)

    assert torch.equal(outputs[1], 2 * outputs[0])


def test_a_model_of_inference_mode_is_refused():
    with torch.inference_mode():
        model = tiny_llama()

        with pytest.raises(ValueError, match="loaded in inference mode"):
            FistaPruner(progress=False).prune(model, tiny_tokens().split(4))


def test_the_callers_environment_is_restored_after_an_error():
    with torch.autocast("cpu", torch.bfloat16):
        outside = surroundings()

        with pytest.raises(ValueError, match="no batch"):
            FistaPruner(progress=False).prune(tiny_llama(), [])

        assert surroundings() == outside
