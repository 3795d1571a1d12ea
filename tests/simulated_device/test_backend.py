"""The simulated accelerator itself: it refuses what a GPU refuses, and its counters and limits say the truth."""

import gc

import pytest
import torch
from simulated_device.backend import counted, failing_allocation, memory_limit
from torch import nn

ONE, TWO = torch.device("simulated:0"), torch.device("simulated:1")


@pytest.fixture(scope="module", autouse=True)
def _nothing_on_the_devices():
    gc.collect()  # models of other tests


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(3, 3),
        lambda x: torch.ones(()).add_(x.sum()),
        lambda x: x @ torch.ones(3, 3, device=TWO),
        lambda x: torch.where(torch.ones(3, 3, dtype=torch.bool), x, x),
        lambda x: nn.functional.linear(x, torch.ones(2, 3, device=ONE), torch.ones(2)),
        lambda x: x[torch.tensor([1], device=TWO)],
        lambda x: torch.linalg.solve_triangular(x, torch.ones(3, 3), upper=True),
        lambda x: torch.rand(3, device=ONE, generator=torch.Generator(TWO)),
    ],
)
def test_operations_that_mix_devices_are_refused(operation):
    with pytest.raises(RuntimeError, match=r"device|generator"):
        operation(torch.ones(3, 3, device=ONE))


@pytest.fixture
def before():
    """Bytes that tests before have left on each device, once nothing more can be collected."""
    gc.collect()
    torch.accelerator.reset_peak_memory_stats(0)
    return torch.simulated.memory_allocated(ONE), torch.simulated.memory_allocated(TWO)


def test_freed_storage_is_refused_and_poisoned(before):
    x = torch.ones(4, device=ONE)
    view, size = x[1:], x.untyped_storage().nbytes()
    x.untyped_storage().resize_(0)
    assert torch.simulated.memory_allocated(ONE) == before[0]
    with pytest.raises(RuntimeError, match="freed"):
        view + 1
    x.untyped_storage().resize_(size)
    assert view.isnan().all()
    assert torch.empty(5, device=TWO).isnan().all()


def test_memory_is_accounted_for_by_device(before):
    kept = torch.ones(256, device=ONE)
    other = kept.to(TWO)[:1]
    (kept + kept).sum()
    assert torch.simulated.memory_allocated(ONE) == before[0] + 1024
    assert torch.simulated.memory_allocated(TWO) == before[1] + 1024
    assert torch.simulated.max_memory_allocated(ONE) == before[0] + 2048 + 4
    torch.simulated.reset_peak_memory_stats(ONE)
    assert torch.simulated.max_memory_allocated(ONE) == before[0] + 1024
    del other
    assert torch.simulated.memory_allocated(TWO) == before[1]


def test_a_memory_limit_raises_and_leaves_memory_as_it_was(before):
    limit = before[0] + 1000
    x = torch.ones(100, device=ONE)
    with memory_limit(limit, ONE):
        y = x + 1
        with pytest.raises(torch.OutOfMemoryError, match="simulated out of memory"):
            x + y
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(51).to(ONE)
        torch.ones(51).to(TWO)
        assert torch.simulated.memory_allocated(ONE) == before[0] + 800
        assert torch.simulated.mem_get_info(ONE) == (200, limit)
    x + y


def test_the_chosen_allocation_fails_once():
    x = torch.ones(100, device=ONE)
    with failing_allocation(2, at_least=400) as failure:
        x[:50] + 1, x + 1
        with pytest.raises(torch.OutOfMemoryError, match="told to fail"):
            torch.ones(100, device=TWO)
        x + 1
    assert failure.seen == 3
    with failing_allocation(9, at_least=400) as failure:
        x + 1
    assert failure.seen == 1


def test_synchronisations_are_counted_by_cause():
    x = torch.arange(4.0, device=ONE)
    mask = x > 1
    host = torch.empty(4, pin_memory=True)
    assert host.is_pinned()
    with counted() as counts:
        (
            x.sum(),
            x.sort(),
            x.masked_fill_(mask, 0),
            x.to(TWO),
            host.copy_(x, non_blocking=True),
            x * torch.tensor(2),
        )
    assert counts.waits.total() == 0
    for operation, cause in (
        (lambda: x.sum().item(), "item"),
        (lambda: bool(mask.any()), "item"),
        (lambda: x[mask], "nonzero"),
        (lambda: x.__setitem__(mask, torch.ones(2, device=ONE)), "the size of a mask"),
        (lambda: mask.nonzero(), "nonzero"),
        (lambda: torch.equal(x, x), "equal"),
        (lambda: x.tolist(), "copy device to host"),
        (lambda: torch.empty(4).copy_(x, non_blocking=True), "copy device to host"),
        (lambda: x.copy_(torch.ones(4)), "copy host to device"),
        (lambda: torch.accelerator.synchronize(), "device"),
        (lambda: torch.simulated.current_stream().synchronize(), "stream"),
    ):
        with counted() as counts:
            operation()
        assert counts.waits == {cause: 1}, cause


def test_copies_and_operations_are_counted():
    x = torch.ones(10, dtype=torch.float64)
    with counted() as counts:
        y = x.to(ONE, torch.float32)
        z = y.to(TWO)
        (z + z).cpu()
        y.clone()
        y.view(2, 5).t()
    assert counts.copies == {"host to device": 1, "device to device": 1, "device to host": 1}
    assert counts.bytes == {"host to device": 40, "device to device": 40, "device to host": 40}
    assert counts.runs == {"add": 1, "copy_": 1}
