"""The Triton kernel: right under Triton's interpreter, compiled for three generations of GPUs, right on one."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from optimum_fista.packed import triton_kernel
from optimum_fista.packed.linear import PackedLinear

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_CHECK = """
import torch
from optimum_fista.packed.format import pack
from optimum_fista.packed.operation import row_starts
from optimum_fista.packed.triton_kernel import multiply_one
generator = torch.Generator().manual_seed(0)
for rows, columns, kept in ((3, 64, 0.5), (5, 130, 0.3), (4, 1000, 0.9), (2, 513, 0.0), (7, 600, 1.0)):
    mask = torch.rand(rows, columns, generator=generator) < kept
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        weight = torch.randn(rows, columns, generator=generator).masked_fill(~mask, 0).to(dtype)
        x = torch.randn(columns, generator=generator).to(dtype)
        for bias in (None, torch.randn(rows, 2, generator=generator).to(dtype)[:, 0]):
            packed = pack(weight, mask)
            y = multiply_one(x, packed.values, packed.mask, row_starts(packed.mask), bias)
            expected = weight.double() @ x.double() + (0 if bias is None else bias.double())
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
            assert y.dtype == dtype
print("equal")
"""


@needs_triton
def test_products_are_right_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "equal", done.stderr


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here, it does not compile")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("generation", [80, 90, 100])
def test_it_compiles_without_a_gpu(generation, dtype, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    number = f"*{dtype}"
    types = {"values": number, "mask": "*u8", "starts": "*i64", "x": number, "bias": number, "y": number}
    constants = {"words": 64, "at_once": 8, "has_bias": True}
    types |= {"columns": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=triton_kernel._multiply_one, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32))
    assert f".target sm_{generation}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_right_on_a_device(dtype, batch):
    linear = torch.nn.Linear(1000, 300)
    mask = torch.rand(300, 1000) < 0.5
    linear.weight.data.masked_fill_(~mask, 0)
    linear, x = linear.to("cuda", dtype), torch.randn(batch, 1000, device="cuda", dtype=dtype)
    layer = PackedLinear.from_linear(linear, mask.cuda())
    assert torch.equal(layer.weight, linear.weight)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(layer(x), linear(x), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_of_four_becomes_semi_structured():
    linear = torch.nn.Linear(256, 128, device="cuda", dtype=torch.float16)
    mask = (torch.arange(256, device="cuda") % 4 < 2).expand(128, 256)
    linear.weight.data.masked_fill_(~mask, 0)
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    sparse = PackedLinear.from_linear(linear, mask, (2, 4)).to_semi_structured()
    torch.testing.assert_close(sparse(x), linear(x), rtol=2e-3, atol=2e-3)
