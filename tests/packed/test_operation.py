"""The operation under autograd, torch.compile and torch.export, and its errors."""

import pytest
import torch
from torch.nn.functional import linear

from optimum_fista.packed import operation
from optimum_fista.packed.format import pack
from optimum_fista.packed.kernels import find_library, kernels
from optimum_fista.packed.linear import PackedLinear
from optimum_fista.packed.operation import packed_linear, row_starts


def problem(rows=40, columns=100, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    weight = torch.randn(rows, columns, generator=generator).masked_fill(~mask, 0).to(dtype)
    packed = pack(weight, mask)
    bias = torch.randn(rows, generator=generator).to(dtype)
    return weight, (packed.values, packed.mask, row_starts(packed.mask)), bias


def layer(dtype=torch.float32):
    weight, _, bias = problem(dtype=dtype)
    dense = torch.nn.Linear(100, 40, dtype=dtype)
    dense.load_state_dict({"weight": weight, "bias": bias})
    return PackedLinear(pack(dense.weight.detach()), dense.bias), dense


@pytest.fixture(params=["kernels", "none"])
def _with_and_without_kernels(request, monkeypatch):
    if request.param == "none":
        monkeypatch.setattr(operation, "kernels", lambda: None)


@pytest.mark.usefixtures("_with_and_without_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(100,), (1, 100), (2, 3, 100), (17, 100), (32, 100), (300, 100), (0, 100)]
)
def test_inputs_of_any_shape(shape, dtype):
    weight, packed, bias = problem(dtype=dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = {
        torch.float32: 1e-5,
        torch.float16: 4e-3,
        torch.bfloat16: 3e-2,
        torch.float64: 1e-12,
    }[dtype]
    for given in (None, bias):
        y = packed_linear(x, *packed, given)
        assert (y.shape, y.dtype) == ((*shape[:-1], 40), dtype)
        torch.testing.assert_close(y, linear(x, weight, given), rtol=tolerance, atol=tolerance)
    strided = torch.randn(100, 5).to(dtype).T
    torch.testing.assert_close(
        packed_linear(strided, *packed), linear(strided, weight), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("inputs", [33, 300])
def test_many_inputs_go_through_tiles(inputs, monkeypatch):
    monkeypatch.setattr(operation, "_TILE_BYTES", 64 * 70 * 4)
    weight, packed, bias = problem(200, 70)
    x = torch.randn(inputs, 70)
    torch.testing.assert_close(packed_linear(x, *packed, bias), linear(x, weight, bias))


@pytest.mark.usefixtures("_with_and_without_kernels")
@pytest.mark.parametrize("inputs", [1, 33])
def test_gradients_reach_the_input_and_the_bias(inputs):
    weight, packed, bias = problem()
    grads = []
    for product in (lambda x, b: packed_linear(x, *packed, b), lambda x, b: linear(x, weight, b)):
        x = torch.randn(inputs, 100, generator=torch.Generator().manual_seed(2), requires_grad=True)
        b = bias.clone().requires_grad_()
        product(x, b).square().sum().backward()
        grads.append((x.grad, b.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def assert_equal_derivatives(derivative, packed, dense):
    torch.testing.assert_close(derivative(packed), derivative(dense), rtol=1e-4, atol=1e-4)


def test_derivatives_of_every_kind():
    """Forward-mode and those of torch.func, alone, nested and beside gradients."""
    packed, dense = layer()
    x, direction = torch.randn(3, 100), torch.randn(3, 100)

    def dual(f):
        with torch.autograd.forward_ad.dual_level():
            y = f(torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), direction))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    def squared(f):
        return lambda x: f(x).square().sum()

    for derivative in (
        dual,
        lambda f: torch.func.jvp(f, (x,), (direction,)),
        lambda f: torch.func.grad(squared(f))(x),
        lambda f: torch.func.hessian(squared(f))(x[0]),
        lambda f: torch.func.vmap(torch.func.grad(squared(f)))(x),
        lambda f: torch.func.grad(lambda b: torch.func.functional_call(f, b, (x,)).square().sum())(
            {"bias": f.bias}
        ),
    ):
        assert_equal_derivatives(derivative, packed, dense)
    with torch.no_grad():
        assert_equal_derivatives(lambda f: torch.func.jvp(f, (x,), (direction,)), packed, dense)


@pytest.mark.usefixtures("_with_and_without_kernels")
@pytest.mark.parametrize("inputs", [1, 40])
def test_views_of_memory_with_other_strides_and_signs(inputs):
    weight, packed, bias = problem()
    x = torch.randn(inputs, 100)
    spread = torch.stack([bias, torch.full_like(bias, 1e6)], 1)[:, 0]
    negative = torch.view_as_complex(torch.stack([bias, -bias], 1)).conj().imag
    assert negative.is_neg()
    assert not spread.is_contiguous()
    for given_x, given in (
        (x, spread),
        (x, negative),
        (torch._neg_view(-x), bias),
        (x[:, ::1].T.contiguous().T, None),
    ):
        expected = linear(x, weight, None if given is None else bias)
        torch.testing.assert_close(packed_linear(given_x, *packed, given), expected)
        product = torch.ops.optimum_fista.packed_linear(given_x, *packed, given)
        torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_a_dense_layer(dtype):
    packed, dense = layer()
    x = torch.randn(3, 100)
    grads = []
    for module in (packed, dense):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = module(given)
            assert y.dtype == module(x.to(dtype)).dtype == dtype
            with torch.autocast("cpu", enabled=False):
                assert module(x).dtype == torch.float32
        y.float().square().sum().backward()
        grads.append((y, given.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype):
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), grads[1][0], rtol=2e-2, atol=2e-2)
        wide, _ = layer(torch.float64)
        assert wide(x.double()).dtype == torch.float64
        assert wide.to("meta")(x.double().to("meta")).shape == (3, 40)


def test_operations_are_registered_as_pytorch_wants_them():
    _, packed, bias = problem()
    x = torch.randn(3, 100, requires_grad=True)
    torch.library.opcheck(
        torch.ops.optimum_fista.packed_linear.default, (x, *packed, bias.requires_grad_())
    )
    torch.library.opcheck(torch.ops.optimum_fista.unpack.default, (*packed, 100))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks(backend):
    packed, dense = layer()
    compiled = torch.compile(packed, fullgraph=True, backend=backend)
    with torch.no_grad():
        for inputs in (1, 3):
            x = torch.randn(inputs, 100)
            torch.testing.assert_close(compiled(x), dense(x))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_with_any_number_of_inputs(strict):
    packed, dense = layer()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        packed, (torch.randn(3, 100),), dynamic_shapes=({0: batch},), strict=strict
    )
    assert "optimum_fista.packed_linear" in exported.graph_module.code
    x = torch.randn(21, 100)
    torch.testing.assert_close(exported.module()(x), dense(x))


def test_what_does_not_fit_is_said():
    _, packed, bias = problem()
    with pytest.raises(
        ValueError,
        match=r"x is torch\.float64, the weight torch\.float32: pass tensors of one dtype",
    ):
        packed_linear(torch.randn(1, 100).double(), *packed)
    with pytest.raises(ValueError, match=r"the bias torch\.float16"):
        packed_linear(torch.randn(1, 100), *packed, bias.half())
    with pytest.raises(
        ValueError, match=r"x has 30 columns, which a mask of shape \(40, 16\), .* do not fit"
    ):
        packed_linear(torch.randn(1, 30), *packed)
    with pytest.raises(ValueError, match=r"a bias of shape \(39,\) do not fit"):
        packed_linear(torch.randn(1, 100), *packed, bias[1:])
    values, mask, starts = packed
    for wrong in ((values, mask.int(), starts), (values, mask, starts.int())):
        for inputs, message in ((1, "do not fit"), (40, r"pass torch\.uint8 and torch\.int64")):
            with pytest.raises(ValueError, match=message):
                packed_linear(torch.randn(inputs, 100), *wrong)
    with pytest.raises(ValueError, match="must be contiguous"):
        packed_linear(torch.randn(1, 100), values.repeat(2)[::2], mask, starts)


@pytest.mark.skipif(find_library() is None, reason="the kernels are not compiled")
def test_bits_do_not_depend_on_how_it_is_called():
    _, packed, bias = problem(dtype=torch.bfloat16)
    x = torch.randn(4, 100).bfloat16()
    direct = kernels().linear(x, *packed, bias)
    assert torch.equal(packed_linear(x, *packed, bias), direct)
    assert torch.equal(torch.ops.optimum_fista.packed_linear(x, *packed, bias), direct)
