"""Every path of the kernels, every dtype and batch, on shapes that fill no register, against float64."""

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from optimum_fista.packed import kernels as module
from optimum_fista.packed.format import pack
from optimum_fista.packed.kernels import PATHS, Kernels, find_library, kernels
from optimum_fista.packed.operation import row_starts

SOURCES = Path(module.__file__).parent / "csrc"
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = [(1, 1), (5, 33), (17, 130), (64, 64), (9, 257), (3, 1000), (21, 63)]
COMPILER = shutil.which("g++") or shutil.which("clang++")

needs_library = pytest.mark.skipif(find_library() is None, reason="the kernels are not compiled")


def paths():
    found = find_library()
    best = Kernels(found).path if found else "portable"
    return PATHS[: PATHS.index(best) + 1]


def problem(rows, columns, dtype, kept=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < kept
    if rows > 2:
        mask[1], mask[-1] = False, True
    weight = torch.randn(rows, columns, generator=generator).masked_fill(~mask, 0).to(dtype)
    return weight, mask, torch.randn(rows, generator=generator).to(dtype)


def assert_within_rounding(y, x, weight, bias):
    """One rounding of the result, and float32 sums of products whose factors were exact."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    absolute = linear(*(None if t is None else t.abs() for t in wide))
    allowed = EPSILON[y.dtype] * linear(*wide).abs() + 4e-7 * absolute + 1e-7
    assert bool(((y.double() - linear(*wide)).abs() <= allowed).all())


@needs_library
@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right(path, dtype, shape):
    compiled = Kernels(find_library(), path)
    weight, mask, bias = problem(*shape, dtype)
    packed = pack(weight, mask)
    starts = row_starts(packed.mask)
    for batch in range(1, 18):
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch)).to(dtype)
        for given in (None, bias):
            y = compiled.linear(x, packed.values, packed.mask, starts, given)
            assert y.dtype == dtype
            assert_within_rounding(y, x, weight, given)


@needs_library
@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("shape", [(1, 1), (7, 513), (50, 1100), (150, 64), (100, 575)])
def test_products_of_many_inputs_are_right(path, shape):
    """Blocks of rows, columns and inputs that are full and that are not, and more inputs than are taken at a time."""
    compiled = Kernels(find_library(), path)
    weight, mask, bias = problem(*shape, torch.bfloat16)
    packed = pack(weight, mask)
    for batch in (16, 31, 32, 33, 48, 49, 96, 515):
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch)).bfloat16()
        for given in (None, bias):
            y = compiled.linear(x, packed.values, packed.mask, row_starts(packed.mask), given)
            assert_within_rounding(y, x, weight, given)


@needs_library
@pytest.mark.parametrize("path", paths())
def test_products_of_a_matrix_that_no_cache_holds(path):
    """From 4 MiB of values up, one input is multiplied by fewer rows at a time."""
    weight, mask, bias = problem(1501, 3001, torch.bfloat16)
    packed = pack(weight, mask)
    assert packed.values.nbytes > 4 << 20
    x = torch.randn(1, 3001, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = Kernels(find_library(), path).linear(
        x, packed.values, packed.mask, row_starts(packed.mask), bias
    )
    assert_within_rounding(y, x, weight, bias)


@needs_library
@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("kept", [0.0, 0.02, 1.0])
def test_empty_and_full_matrices(path, kept):
    weight, mask, bias = problem(2, 200, torch.bfloat16, kept)
    packed = pack(weight, mask)
    x = torch.randn(3, 200).bfloat16()
    y = Kernels(find_library(), path).linear(
        x, packed.values, packed.mask, row_starts(packed.mask), bias
    )
    assert_within_rounding(y, x, weight, bias)
    if kept == 0:
        assert torch.equal(y, bias.expand(3, 2))


@needs_library
@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("batch", [1, 3, 16, 40])
def test_threads_compute_the_same_bits(path, batch, openmp, monkeypatch):
    """With rows whose share of kept weights differs widely, over OpenMP and over std::thread."""
    if not openmp:
        monkeypatch.setattr(
            Kernels,
            "_use_threads_of_torch",
            lambda self: self._library.optimum_fista_use_openmp(0, 0, 0),
        )
    compiled = Kernels(find_library(), path)
    weight, mask, bias = problem(700, 650, torch.bfloat16)
    mask[:600] &= torch.rand(600, 650, generator=torch.Generator().manual_seed(5)) < 0.1
    packed = pack(weight.masked_fill(~mask, 0), mask)
    x = torch.randn(batch, 650).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                compiled.linear(x, packed.values, packed.mask, row_starts(packed.mask), bias)
            )
    finally:
        torch.set_num_threads(before)
        monkeypatch.undo()
        assert Kernels(find_library()).uses_openmp == kernels().uses_openmp
    assert_within_rounding(results[0], x, weight.masked_fill(~mask, 0), bias)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-2, atol=1e-2)


@needs_library
@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("shape", [*SHAPES, (700, 650)])
def test_rows_are_unpacked_bit_for_bit(path, dtype, shape):
    weight, mask, _ = problem(*shape, dtype)
    packed = pack(weight, mask)
    first, last = shape[0] // 3, shape[0]
    dense = torch.full((last - first, shape[1]), 7, dtype=dtype)
    Kernels(find_library(), path).unpack_rows(
        packed.values, packed.mask, row_starts(packed.mask), first, dense
    )
    assert torch.equal(dense, weight[first:last])


@needs_library
def test_numbers_out_of_range_are_rounded_as_pytorch_does():
    """Overflow, subnormal results, infinities and NaN, through an identity in float16 and bfloat16."""
    for dtype, path in ((d, p) for d in (torch.float16, torch.bfloat16) for p in paths()):
        every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        every = every[every.isfinite() & ((every.abs() > 1e-37) | (every == 0))]
        packed = pack(torch.ones(1, 1, dtype=dtype))
        starts = row_starts(packed.mask)
        one = Kernels(find_library(), path).linear(
            every[:, None].contiguous(), packed.values, packed.mask, starts, None
        )
        assert torch.equal(one[:, 0], every)
        double = pack(torch.full((1, 2), 0.7, dtype=dtype))
        x = torch.stack([every, every * 0.3], 1)
        y = Kernels(find_library(), path).linear(
            x, double.values, double.mask, row_starts(double.mask), None
        )
        expected = linear(x.float(), torch.full((1, 2), 0.7, dtype=dtype).float()).to(dtype)
        assert (
            (y == expected)
            | ((y.double() - expected.double()).abs() <= EPSILON[dtype] * expected.abs())
        ).all()
        for bad in (float("nan"), float("inf"), float("-inf")):
            x = torch.tensor([[bad]], dtype=dtype)
            y = Kernels(find_library(), path).linear(x, packed.values, packed.mask, starts, None)
            torch.testing.assert_close(y, x, equal_nan=True)


@needs_library
@pytest.mark.parametrize("inputs", [1, 40])
@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("row", [3, 90])
def test_masks_that_are_not_those_of_the_starts_are_refused(path, row, inputs):
    """Bits after the columns would be written after the last row; others would move all values that follow."""
    compiled, columns = Kernels(find_library(), path), 60
    packed = pack(torch.ones(100, columns).bfloat16())
    starts, x = row_starts(packed.mask), torch.ones(inputs, columns).bfloat16()
    for bit in (0, 63):
        mask = packed.mask.clone()
        mask[row, bit // 8] ^= 1 << bit % 8
        for given in (starts, row_starts(mask)) if bit == 63 else (starts,):
            values = torch.ones(int(given[-1])).bfloat16()
            with pytest.raises(ValueError, match="mask keeps other numbers of weights"):
                compiled.linear(x, values, mask, given, None)
            with pytest.raises(ValueError, match="mask keeps other numbers of weights"):
                compiled.unpack_rows(values, mask, given, 0, torch.empty(100, columns).bfloat16())
    wild = starts.clone()
    wild[row] = 2**62
    with pytest.raises(ValueError, match="mask keeps other numbers of weights"):
        compiled.linear(x, packed.values, packed.mask, wild, None)


@needs_library
@pytest.mark.parametrize("path", paths())
def test_sizes_are_compared_where_they_are_used(path):
    compiled, packed = Kernels(find_library(), path), pack(torch.ones(4, 64))
    starts, x, bias = row_starts(packed.mask), torch.ones(2, 64), torch.ones(4)
    good = (x, packed.values, packed.mask, starts, bias)
    for place, wrong in enumerate((torch.ones(2, 65), bias, packed.mask[:3], starts[1:], bias[1:])):
        with pytest.raises(ValueError, match=r"x has 6. columns, which .* do not fit"):
            compiled.linear(*good[:place], wrong, *good[place + 1 :])
    for first, shape in ((0, (4, 65)), (1, (4, 64)), (-1, (1, 64)), (5, (0, 64))):
        with pytest.raises(ValueError, match=r"x has 6. columns, which .* do not fit"):
            compiled.unpack_rows(packed.values, packed.mask, starts, first, torch.ones(shape))
    assert torch.equal(compiled.linear(*good), linear(x, torch.ones(4, 64), bias))


@needs_library
def test_paths_are_chosen_by_name(monkeypatch):
    with pytest.raises(ValueError, match="path='sse': this CPU has portable"):
        Kernels(find_library(), "sse")
    for value, path in (("portable", "portable"), ("", paths()[-1])):
        monkeypatch.setenv("OPTIMUM_FISTA_KERNELS", value)
        assert kernels.__wrapped__().path == path
    monkeypatch.setenv("OPTIMUM_FISTA_KERNELS", "none")
    assert kernels.__wrapped__() is None
    monkeypatch.setenv("OPTIMUM_FISTA_KERNELS", "fast")
    with pytest.raises(ValueError, match="OPTIMUM_FISTA_KERNELS='fast'"):
        kernels.__wrapped__()


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (None, "were not compiled"),
        (Path(__file__), "could not be loaded"),
        (Path(torch._C.__file__), "could not be loaded .*undefined symbol"),
    ],
    ids=["none", "broken", "of another version"],
)
def test_missing_kernels_are_said_once(library, reason, monkeypatch):
    monkeypatch.setattr(module, "find_library", lambda: library)
    kernels.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=f"CPU kernels of packed linear layers {reason}.*C.*17 compiler"
        ):
            assert kernels() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels() is None
    finally:
        kernels.cache_clear()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The kernels with a driver in C++, compiled with the sanitizers."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("driver") / "driver"
    flags = [
        "-std=c++17",
        "-O1",
        "-pthread",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    source = Path(__file__).parent / "kernels_driver.cpp"
    command = [COMPILER, *flags, f"-I{SOURCES}", str(source), "-o", str(program)]
    build = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -l" in build.stderr or "cannot find lib" in build.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert build.returncode == 0, build.stderr

    def run(*arguments):
        done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("right: ")

    return run


def test_kernels_are_clean_under_the_sanitizers(driver):
    """Buffers of exact size: every path, dtype, batch, thread count and kind of tail."""
    driver()


def test_damaged_matrices_are_refused_by_every_path(driver):
    driver(2, 0)
