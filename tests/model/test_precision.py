"""Products are in bfloat16 in forward passes and sums over tokens, if the run says so, and nowhere else."""

import pytest
import torch
from pruning import prune
from tiny_llama import tiny_llama, tiny_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model import gram
from optimum_fista.model import precision as products
from optimum_fista.model.precision import (
    as_multiplied,
    choose_products,
    in_few_sizes,
    is_fast,
    products_as,
    quick_products,
)
from optimum_fista.prune import loop
from optimum_fista.solve.linalg import dtype_of_rounded_products

precision = torch.get_float32_matmul_precision
UNITS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("supported", [False, True])
@pytest.mark.parametrize("there", [None, *UNITS])
def test_bfloat16_is_fast_with_units_that_onednn_may_use(monkeypatch, supported, there):
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False
    )
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    for unit in UNITS:
        monkeypatch.setattr(torch.cpu, unit, lambda unit=unit: unit == there, raising=False)

    assert is_fast(torch.bfloat16, torch.device("cpu")) == (supported and there is not None)
    assert is_fast(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "stored", "fast", "chosen"),
    [
        ("cpu", torch.float32, True, "float32"),
        ("cpu", torch.bfloat16, True, "bfloat16"),
        ("cpu", torch.float16, True, "float32"),
        ("cpu", torch.bfloat16, False, "widened"),
        ("cpu", torch.float16, False, "widened"),
        ("cuda", torch.float32, True, "tf32"),
        ("cuda", torch.bfloat16, True, "tf32"),
        ("cuda", torch.bfloat16, False, "float32"),
    ],
)
def test_auto_chooses_products_by_the_device_and_the_dtype_of_the_checkpoint(
    monkeypatch, device, stored, fast, chosen
):
    monkeypatch.setattr(products, "is_fast", lambda *_: fast)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: fast)

    assert choose_products("auto", torch.device(device), stored) == chosen
    for given in ("float32", "bfloat16"):
        assert choose_products(given, torch.device(device), stored) == given


def test_bfloat16_rows_are_padded_with_zeros_to_few_sizes():
    sizes = set()
    for count in range(2049):
        rows = torch.ones(count, 1, dtype=torch.bfloat16)

        padded = in_few_sizes(rows)

        sizes.add(len(padded))
        assert padded.sum(dtype=torch.float32) == count
        assert count <= len(padded) <= max(count + 15, 1.25 * count)
        assert len(in_few_sizes(rows.float())) == count, "MKL keeps nothing"
    assert len(sizes) == 1 + 8 + 4 * 4  # none, up to 128, for each power of two


class SeesProducts(TorchDispatchMode):
    """Notes the dtypes of all matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.name() for word in ("::mm", "::bmm", "::addmm", "attention")):
            self.dtypes |= {
                v.dtype
                for v in tree_leaves(args)
                if isinstance(v, torch.Tensor) and v.is_floating_point()
            }
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("options", [{}, {"pattern": "layers:0.5"}])
def test_a_16_bit_model_is_multiplied_in_float32_where_its_dtype_is_slow(
    monkeypatch, stored, options
):
    monkeypatch.setattr(products, "is_fast", lambda *_: False)
    model = tiny_llama().to(stored)
    tokens = tiny_tokens()
    batches = [*tokens.split(4), {"input_ids": tokens[:2], "held_out": True}]

    with SeesProducts() as seen:  # records inputs, gradients, decoder layers, held-out text
        report = prune(model, batches, **options)

    assert seen.dtypes == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {stored}
    assert report.environment["products"] == "widened"
    expected = prune(
        tiny_llama().to(stored), batches, compute_dtype="float32", **options
    ).perplexity
    assert report.perplexity["dense"] == pytest.approx(expected["dense"], rel=0.01)
    assert report.perplexity["pruned"] == pytest.approx(expected["pruned"], rel=0.1)


def test_a_large_matrix_is_widened_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(products, "WEIGHTS_WIDENED_TOGETHER", 4 * 32)
    head = torch.nn.Linear(32, 11, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    inputs = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn(2, 5, 11, dtype=torch.bfloat16)
    sizes = []  # of the matrices that are made in float32

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (32,):
                    sizes.append(tensor.numel() if tensor.dtype == torch.float32 else 0)
            return result

    with products_as("widened"), Watch():
        outputs = head(inputs)
        (gradient,) = torch.autograd.grad(outputs, inputs, slope)

    wide = inputs.detach().float()
    expected = torch.nn.functional.linear(wide, head.weight.float())
    expected_gradient = slope.float() @ head.weight.float()
    torch.testing.assert_close(outputs, expected.bfloat16())
    torch.testing.assert_close(gradient, expected_gradient.bfloat16())
    assert 4 * 32 in sizes
    assert max(sizes) == wide.numel() < head.weight.numel()


def test_widened_products_are_those_of_float32_rounded_once():
    left = torch.randn(3, 40, dtype=torch.bfloat16)
    right = torch.randn(40, 5, dtype=torch.bfloat16)

    with products_as("widened"):
        results = [
            left @ right,
            torch.nn.functional.linear(left, right.T),
            torch.einsum("ij,jk->ik", left, right),
        ]
        assert (left.float() @ right.float()).dtype == torch.float32

    for product in results:
        assert torch.equal(product, (left.float() @ right.float()).bfloat16())


def test_as_multiplied_rounds_values_as_tf32_does():
    values = torch.tensor(
        [1.0, 1 + 2**-11, 1 + 2**-10 + 2**-12, -(1 + 2**-9), 3e38, float("nan"), float("-inf")]
    )
    halves = values[:5].bfloat16()

    with products_as("tf32"):
        rounded = as_multiplied(values)
        rounded_halves = as_multiplied(halves)

    assert torch.equal(rounded_halves, halves.float())
    expected = torch.tensor(
        [1.0, 1 + 2**-10, 1 + 2**-10, -(1 + 2**-9), 3e38, float("nan"), float("-inf")]
    )
    torch.testing.assert_close(rounded, expected, rtol=2**-11, atol=0, equal_nan=True)
    assert torch.equal(rounded[:4], expected[:4])


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "highest"), ("bfloat16", "medium")])
def test_layers_and_sums_have_the_precision_asked_for_and_the_solver_float32(
    monkeypatch, dtype, expected
):
    layers, gradients, sums, solvers = set(), set(), set(), set()  # precisions that they had
    add_upper = gram.add_upper_half
    solve_groups = loop.solve_groups

    def watched_sum(*arguments):
        sums.add(precision())
        return add_upper(*arguments)

    def watched_solver(*arguments):
        solvers.add(precision())
        return solve_groups(*arguments)

    def see_layer(*_):
        has_gradients = torch.is_grad_enabled()
        (gradients if has_gradients else layers).add(precision())

    monkeypatch.setattr(gram, "add_upper_half", watched_sum)
    monkeypatch.setattr(loop, "solve_groups", watched_solver)
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(see_layer)

    prune(model, tiny_tokens().split(4), compute_dtype=dtype)

    # "highest" on one batch, to see which operators are called, and how
    assert layers == {expected, "highest"}
    assert gradients == {expected}
    assert sums == {expected}
    assert solvers == {"highest"}
    assert precision() == "highest"


def test_the_precision_comes_back_after_an_error():
    with products_as("bfloat16"), pytest.raises(RuntimeError), quick_products():
        raise RuntimeError(precision())
    assert precision() == "highest"
    with quick_products():
        assert precision() == "highest"


def test_a_run_from_files_multiplies_as_one_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(products, "is_fast", lambda *_: False)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    pruner.prune(model, tiny_tokens().split(4))
    report = pruner.prune(
        str(tmp_path / "source"), tiny_tokens().split(4), output_dir=tmp_path / "out", device="cpu"
    )

    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert report.environment["products"] == "widened"
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    errors = [operator.fit_error for operator in pruner.result(model)[0].operators]
    assert [operator.fit_error for operator in report.operators] == errors


def test_methods_may_round_products_if_the_device_has_units_for_it():
    allowed = {}
    for name in ("float32", "tf32", "bfloat16", "widened"):
        with products_as(name):
            allowed[name] = dtype_of_rounded_products()

    assert allowed == {
        "float32": None,
        "tf32": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "widened": None,
    }
    assert dtype_of_rounded_products() is None
