"""The simulated accelerator itself: it refuses what a GPU refuses, and its counters and limits say the truth."""

import pytest
import torch
from simulated_device.backend import counted, failing_allocation, memory_limit
from torch import nn

ONE = torch.device("simulated:0")
TWO = torch.device("simulated:1")


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
    x = torch.ones(3, 3, device=ONE)

    with pytest.raises(RuntimeError, match=r"device|generator"):
        operation(x)


def test_freed_storage_is_refused(bytes_before):
    x = torch.ones(4, device=ONE)
    view = x[1:]

    x.untyped_storage().resize_(0)

    assert torch.simulated.memory_allocated(ONE) == bytes_before[0]
    with pytest.raises(RuntimeError, match="freed"):
        view + 1


def test_new_memory_is_poisoned():
    x = torch.ones(4, device=ONE)
    view = x[1:]
    size = x.untyped_storage().nbytes()

    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(size)

    assert view.isnan().all()
    assert torch.empty(5, device=TWO).isnan().all()


def test_memory_is_accounted_for_by_device(bytes_before):
    kept = torch.ones(256, device=ONE)
    other = kept.to(TWO)[:1]
    (kept + kept).sum()

    assert torch.simulated.memory_allocated(ONE) == bytes_before[0] + 1024
    assert torch.simulated.memory_allocated(TWO) == bytes_before[1] + 1024
    assert torch.simulated.max_memory_allocated(ONE) == bytes_before[0] + 2048 + 4

    torch.simulated.reset_peak_memory_stats(ONE)
    del other

    assert torch.simulated.max_memory_allocated(ONE) == bytes_before[0] + 1024
    assert torch.simulated.memory_allocated(TWO) == bytes_before[1]


def test_a_memory_limit_raises_and_leaves_memory_as_it_was(bytes_before):
    limit = bytes_before[0] + 1000
    x = torch.ones(100, device=ONE)

    with memory_limit(limit, ONE):
        y = x + 1
        with pytest.raises(torch.OutOfMemoryError, match="simulated out of memory"):
            x + y
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(51).to(ONE)
        torch.ones(51).to(TWO)

        assert torch.simulated.memory_allocated(ONE) == bytes_before[0] + 800
        assert torch.simulated.mem_get_info(ONE) == (200, limit)

    x + y  # without the limit there is room


def test_the_chosen_allocation_fails_once():
    x = torch.ones(100, device=ONE)

    with failing_allocation(2, at_least=400) as failure:
        x[:50] + 1  # too small to count
        x + 1
        with pytest.raises(torch.OutOfMemoryError, match="told to fail"):
            torch.ones(100, device=TWO)
        x + 1

    assert failure.seen == 3


def test_an_allocation_that_never_comes_does_not_fail():
    x = torch.ones(100, device=ONE)

    with failing_allocation(9, at_least=400) as failure:
        x + 1

    assert failure.seen == 1


def test_operations_on_a_device_do_not_wait():
    x = torch.arange(4.0, device=ONE)
    mask = x > 1
    host = torch.empty(4, pin_memory=True)

    with counted() as counts:
        x.sum()
        x.sort()
        x.masked_fill_(mask, 0)
        x.to(TWO)
        host.copy_(x, non_blocking=True)
        x * torch.tensor(2)

    assert host.is_pinned()
    assert counts.waits.total() == 0


@pytest.mark.parametrize(
    ("operation", "cause"),
    [
        (lambda x, mask: x.sum().item(), "item"),
        (lambda x, mask: bool(mask.any()), "item"),
        (lambda x, mask: x[mask], "nonzero"),
        (lambda x, mask: x.__setitem__(mask, torch.ones(2, device=ONE)), "the size of a mask"),
        (lambda x, mask: mask.nonzero(), "nonzero"),
        (lambda x, mask: torch.equal(x, x), "equal"),
        (lambda x, mask: x.tolist(), "copy device to host"),
        (lambda x, mask: torch.empty(4).copy_(x, non_blocking=True), "copy device to host"),
        (lambda x, mask: x.copy_(torch.ones(4)), "copy host to device"),
        (lambda x, mask: torch.accelerator.synchronize(), "device"),
        (lambda x, mask: torch.simulated.current_stream().synchronize(), "stream"),
    ],
)
def test_synchronisations_are_counted_by_cause(operation, cause):
    x = torch.arange(4.0, device=ONE)
    mask = x > 1

    with counted() as counts:
        operation(x, mask)

    assert counts.waits == {cause: 1}


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
