import time

import pytest
import torch
from layer_problems import WEIGHT_METHODS, example

from optimum_fista.run.config import FistaPruningConfig
from optimum_fista.run.estimate.work import CALL, Meter, measure_device, measure_method, work
from optimum_fista.solve.blocks import block_share, row_blocks
from optimum_fista.solve.patterns import Columns


@pytest.mark.parametrize("name", WEIGHT_METHODS)
@pytest.mark.parametrize("shape", [(384, 384), (96, 576)], ids=str)
def test_small_matrices_tell_what_larger_ones_take(name, shape):
    config = FistaPruningConfig(method=name, max_iterations=30 if name == "alps" else None).resolved()
    method, pattern = config.create_method("llama"), config.pattern_for("weight")
    problem = example(*shape, corrected=True, dtype=torch.float32).problem
    with Meter() as meter:
        method.prune(problem, pattern)
    (_, products, moved, *_, python), held = measure_method(method, pattern, shape[:1], shape[1], on_cpu=True)
    assert 1 / 1.3 < held / meter.peak_bytes < 1.3
    assert 1 / 1.5 < python / (meter.calls * CALL) < 1.5
    assert 1 / 1.3 < products / meter.products < 1.3
    assert 1 / 2.5 < moved / meter.moved_bytes < 2.5  # dsnot takes fewer steps on one than on the other


@pytest.mark.parametrize("name", ["obs_admm", "greedy_obs", "fista"])
@pytest.mark.parametrize("pattern", [Columns.keeping(288, 384), Columns.keeping(3, 6, 64)], ids=str)
def test_small_matrices_tell_what_whole_columns_take(name, pattern):
    """Those of heads are as many and narrower groups, those of channels fewer."""
    method = FistaPruningConfig(method=name, pattern="columns:0.25").resolved().create_method("llama")
    problem = example(96, 384, corrected=True, dtype=torch.float32).problem
    with Meter() as meter:
        method.prune(problem, pattern)
    (_, products, moved, *_), held = measure_method(method, pattern, [96], 384, on_cpu=True)
    assert 1 / 1.5 < held / meter.peak_bytes < 1.5
    assert 1 / 1.5 < products / meter.products < 1.5
    assert 1 / 3 < moved / meter.moved_bytes < 3


@pytest.mark.parametrize(
    ("pattern", "columns", "small"),
    [
        (Columns.keeping(7, 9, 64), 576, (Columns.keeping(7, 9, 21), 189)),
        (Columns.keeping(1152, 1536), 1536, (Columns.keeping(144, 192), 192)),
        (Columns.keeping(1, 1000), 1000, (Columns.keeping(1, 192), 192)),
        (Columns(0.25, width=128), 512, (Columns.keeping(3, 4, 48), 192)),
    ],
)
def test_columns_in_miniature(pattern, columns, small):
    assert pattern.in_miniature(columns, 192) == small


def test_operators_that_share_inputs_share_work():
    config = FistaPruningConfig().resolved()
    method, pattern = config.create_method("llama"), config.pattern_for("weight")
    alone, _ = measure_method(method, pattern, [64], 1024, on_cpu=True)
    both, _ = measure_method(method, pattern, [64, 64], 1024, on_cpu=True)
    assert alone[1] < both[1] < 1.5 * alone[1]  # factorisations are most of the work


def test_a_pattern_of_long_groups_is_tried_on_whole_groups():
    config = FistaPruningConfig(pattern="3:5", method="wanda").resolved()
    needs, held = measure_method(config.create_method(""), config.pattern_for("weight"), [100], 1000, on_cpu=True)
    assert needs[1] > 0
    assert held > 4 * 100 * 1000


def test_meter_counts_products_traffic_and_bytes():
    left, right = torch.ones(4, 8), torch.ones(8, 2)
    with Meter() as meter:
        product = left @ right
        product.add_(1)
        view = product.view(8)
        del product, view
        torch.ones(2)
    assert meter.products == 2 * 4 * 8 * 2
    assert meter.moved_bytes == 2 * 4 * 8 + 4 * 2
    assert meter.peak_bytes == 4 * 8


def test_meter_counts_what_makes_large_blocks_apart():
    kept = torch.ones(100)
    with Meter(large=400) as meter:
        kept.add_(1)  # makes none
        kept[:99] + 1
        kept + 1
    assert (meter.moved_bytes, meter.large_bytes) == (400 + 4 * (99 + 99) + 400, 800)
    config = FistaPruningConfig(method="wanda").resolved()
    method, pattern = config.create_method(""), config.pattern_for("weight")
    (apart, _), (all_of_them, _) = (measure_method(method, pattern, [100], 1000, True, n) for n in (300_000, 1))
    assert 0 < apart[3] < all_of_them[3]
    assert apart[2:4].sum() == pytest.approx(all_of_them[2:4].sum())


def test_blocks_of_a_small_matrix_are_those_of_a_large_one():
    with block_share(0.25):
        assert list(row_blocks(torch.empty(8, 3))) == [slice(i, i + 2) for i in range(0, 8, 2)]
        assert list(row_blocks(torch.empty(1, 3))) == [slice(0, 1)]
    assert list(row_blocks(torch.empty(8, 3))) == [slice(0, 8)]


def test_a_device_is_measured_in_numbers_that_make_sense(monkeypatch):
    monkeypatch.setattr("optimum_fista.run.estimate.work._SECONDS", 0.2)
    rates = measure_device(torch.device("cpu"), torch.float32, 256, "float32", 2**22)
    assert (rates[:5] > 1e6).all()
    assert float((2 * rates / rates).sum()) == 12.0
    assert list(work(file_bytes=3)) == [0, 0, 0, 0, 3, 0]


def test_small_operators_are_measured_no_longer_than_large_ones(monkeypatch):
    """Each of them takes a microsecond, so there are very many."""
    monkeypatch.setattr("optimum_fista.run.estimate.work._SECONDS", 1.2)
    started = time.process_time()
    measure_device(torch.device("cpu"), torch.float32, 16, "float32")
    assert time.process_time() - started < 5
