"""PackedLinear behaves as the dense layer it stands for, and survives what modules go through."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

from optimum_fista.packed.format import PackedFormatError, pack
from optimum_fista.packed.linear import PackedLinear


def sparse_linear(rows=24, columns=80, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    mask = torch.rand(rows, columns) < 0.5
    linear.weight.data.masked_fill_(~mask, 0)
    return linear, mask


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_back(bias, dtype):
    linear, mask = sparse_linear(bias=bias, dtype=dtype)
    packed = PackedLinear(pack(linear.weight.detach(), mask), linear.bias)
    assert torch.equal(packed.weight, linear.weight)
    assert packed.bias is linear.bias
    assert list(packed.state_dict()) == (["bias"] if bias else []) + [
        "weight_values",
        "weight_mask",
        "weight_layout",
    ]
    x = torch.randn(5, 80).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(packed(x), linear(x), rtol=tolerance, atol=tolerance)


def test_tensors_that_make_no_layer_are_refused():
    packed = pack(torch.eye(80))
    with pytest.raises(PackedFormatError, match="but the mask keeps"):
        PackedLinear(dataclasses.replace(packed, values=packed.values[1:]))
    with pytest.raises(PackedFormatError, match="needs a matrix"):
        PackedLinear(pack(torch.ones(2, 3, 4)))


def test_a_state_of_another_mask_is_never_computed_with_old_row_starts():
    (first, one), (second, two) = sparse_linear(), sparse_linear(rows=24, seed=1)
    layer, other = (
        PackedLinear(pack(first.weight.detach(), one), first.bias),
        PackedLinear(pack(second.weight.detach(), two), second.bias),
    )
    layer.weight_values, layer.weight_mask = other.weight_values, other.weight_mask
    layer.bias = other.bias
    with pytest.raises(ValueError, match=r"do not fit|PackedLinear\.prepare finds them"):
        layer(torch.eye(80))
    layer.prepare()
    torch.testing.assert_close(layer(torch.eye(80)), second(torch.eye(80)))


def test_copies_and_pickles():
    linear, mask = sparse_linear()
    layer = PackedLinear(pack(linear.weight.detach(), mask), linear.bias)
    x = torch.randn(2, 80)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.weight_values.data_ptr() != layer.weight_values.data_ptr()


def test_dtypes_and_devices():
    linear, mask = sparse_linear()
    layer = PackedLinear(pack(linear.weight.detach(), mask), linear.bias)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        moved = copy.deepcopy(layer).to(dtype)
        assert moved.weight_layout.dtype == moved.weight_starts.dtype == torch.int64
        assert moved.weight_mask.dtype == torch.uint8
        assert torch.equal(moved.weight, linear.weight.to(dtype))
        assert moved(torch.ones(1, 80, dtype=dtype)).dtype == dtype
    on_meta = copy.deepcopy(layer).to("meta")
    assert on_meta(torch.ones(3, 80, device="meta")).shape == (3, 24)


def test_the_bias_alone_is_trained():
    linear, mask = sparse_linear()
    layer = PackedLinear(pack(linear.weight.detach(), mask), linear.bias)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_transposed_in_place():
    linear, mask = sparse_linear(bias=False)
    layer = PackedLinear(pack(linear.weight.detach(), mask), linear.bias)
    layer.transpose_()
    assert (layer.in_features, layer.out_features) == (24, 80)
    assert torch.equal(layer.weight, linear.weight.T)
    assert torch.equal(layer(torch.eye(24)), linear.weight.detach())


@pytest.mark.parametrize("columns", [79, 81, 96])
def test_inputs_of_another_width_are_refused(columns):
    """Also those that fill the same words of a mask as the layer's do."""
    linear, mask = sparse_linear()
    layer = PackedLinear(pack(linear.weight.detach(), mask), linear.bias)
    with pytest.raises(
        ValueError, match=rf"x has shape \(3, {columns}\): pass one of shape \(\.\.\., 80\)"
    ):
        layer(torch.ones(3, columns))


def test_inputs_on_another_device_are_refused():
    linear, mask = sparse_linear()
    with pytest.raises(
        ValueError, match="x is on meta, the packed weight on cpu: bring them to one device"
    ):
        PackedLinear(pack(linear.weight.detach(), mask), linear.bias)(
            torch.ones(1, 80, device="meta")
        )
