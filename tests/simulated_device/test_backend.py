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
        lambda x: torch.ones(3, 3) + x,
        lambda x: torch.ones(3, 3).add_(x),
        lambda x: torch.ones(()).add_(x.sum()),
        lambda x: x @ torch.ones(3, 3, device=TWO),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.where(torch.ones(3, 3, dtype=torch.bool), x, x),
        lambda x: nn.functional.linear(x, torch.ones(2, 3), None),
        lambda x: nn.functional.linear(x, torch.ones(2, 3, device=ONE), torch.ones(2)),
        lambda x: x.index_select(0, torch.tensor([1])),
        lambda x: x[torch.tensor([1], device=TWO)],
        lambda x: nn.functional.conv1d(x, torch.ones(3, 3, 1)),
        lambda x: torch.linalg.solve_triangular(x, torch.ones(3, 3), upper=True),
        lambda x: torch.rand(3, device=ONE, generator=torch.Generator(TWO)),
    ],
)
def test_operations_that_mix_devices_are_refused(operation):
    with pytest.raises(RuntimeError, match=r"device|generator"):
        operation(torch.ones(3, 3, device=ONE))


def test_numbers_and_indices_may_come_from_the_cpu():
    x = torch.arange(9.0, device=ONE).view(3, 3)
    assert torch.equal((x * torch.tensor(2.0)).cpu(), x.cpu() * 2)
    assert torch.equal(torch.where(x > 4, x, torch.tensor(0.0)).cpu()[0], torch.zeros(3))
    assert torch.equal(x[torch.tensor([2, 0])].cpu(), x.cpu()[[2, 0]])
    assert torch.equal((torch.arange(9, device=ONE) // 4).cpu(), torch.arange(9) // 4)
    x[torch.tensor([1])] = torch.tensor(7.0)
    assert torch.equal(x[1].cpu(), torch.full((3,), 7.0))


def test_operations_equal_the_cpus():
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    spd = x @ x.T + torch.eye(6)
    for operation in (
        torch.linalg.cholesky,
        torch.linalg.eigvalsh,
        lambda t: t.sort(descending=True).values,
        lambda t: t.topk(3).indices,
        lambda t: t.t()[1:3].reshape(-1),
        lambda t: t.unfold(1, 2, 2).sum(-1),
        lambda t: t.view(torch.int32),
        lambda t: torch.view_as_real(torch.fft.fft(t)),
        lambda t: torch.stack(t.unbind(1)).cumsum(0),
        lambda t: t.bfloat16().softmax(-1),
        lambda t: t.clone().index_add_(0, torch.tensor([1, 1], device=t.device), t[:2]),
        lambda t: torch._foreach_mul([t, t], 2.0)[1],
        lambda t: nn.functional.scaled_dot_product_attention(t[None, None], t[None, None], t[None, None]),
        lambda t: nn.functional.conv1d(t[None], t[:, None, :3], groups=6),
    ):
        found = operation(spd.to(TWO))
        assert found.device == TWO
        torch.testing.assert_close(found.cpu(), operation(spd))


def test_gradients_equal_the_cpus_on_both_devices():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(28, 5), nn.LayerNorm(5))
    x = torch.randn(2, 4, 9)
    model(x).sin().sum().backward()  # the gradient of a layer norm's squares is all rounding
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model[0].to(ONE), model[2:].to(TWO)
    model[2:](model[:2](x.to(ONE)).to(TWO)).sin().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad.device == parameter.device
        torch.testing.assert_close(parameter.grad.cpu(), gradient)


def test_the_current_device_is_the_default():
    assert torch.ones(1, device="simulated").device == ONE
    with torch.get_device_module("simulated").device(1):
        assert torch.accelerator.current_device_index() == 1
        assert torch.ones(1, device="simulated").device == torch.ones(1).to("simulated").device == TWO
        assert (torch.ones(1, device=ONE) + 1).device == ONE
    assert torch.accelerator.current_device_index() == 0
    assert torch.accelerator.current_accelerator(check_available=True).type == "simulated"


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
    modules = torch.get_device_module("simulated"), torch.accelerator
    assert [module.memory_allocated(0) for module in modules] == [before[0]] * 2
    kept = torch.ones(256, device=ONE)
    other = kept.to(TWO)[:1]
    (kept + kept).sum()
    for module in modules:
        assert module.memory_allocated(ONE) == before[0] + 1024
        assert module.memory_allocated(TWO) == before[1] + 1024
        assert module.max_memory_allocated(ONE) == before[0] + 2048 + 4
        module.reset_peak_memory_stats(ONE)
        assert module.max_memory_allocated(ONE) == before[0] + 1024
        (kept + kept).sum()
    free, total = torch.simulated.mem_get_info(ONE)
    assert total - free == before[0] + 1024
    del other
    assert torch.accelerator.memory_allocated(TWO) == before[1]


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
    assert (failure.seen, failure.happened) == (3, True)
    with failing_allocation(9, at_least=400) as failure:
        x + 1
    assert (failure.seen, failure.happened) == (1, False)


def test_synchronisations_are_counted_by_cause():
    x = torch.arange(4.0, device=ONE)
    mask = x > 1
    host = torch.empty(4, pin_memory=True)
    assert host.is_pinned()
    with counted() as counts:
        x.sum(), x.sort(), x.masked_fill_(mask, 0), x.to(TWO), host.copy_(x, non_blocking=True), x * torch.tensor(2)
    assert counts.synchronisations == 0
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


def test_each_device_has_a_generator():
    torch.manual_seed(5)
    first = [torch.rand(3, device=device).cpu() for device in (ONE, TWO)]
    host = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3, device=ONE).cpu(), first[0])
    state = torch.simulated.get_rng_state(TWO)
    nn.functional.dropout(torch.ones(100, device=TWO), 0.5)
    assert not torch.equal(torch.simulated.get_rng_state(TWO), state)
    torch.simulated.set_rng_state(state, TWO)
    assert torch.equal(torch.rand(3, device=TWO).cpu(), first[1])
    with torch.random.fork_rng(devices=[0, 1], device_type="simulated"):
        torch.rand(3, device=TWO)
        inside = torch.simulated.get_rng_state(TWO)
    assert not torch.equal(torch.simulated.get_rng_state(TWO), inside)
    generator = torch.Generator(TWO).manual_seed(1)
    again = torch.Generator(TWO).manual_seed(1)
    drawn = torch.randperm(20, device=TWO, generator=generator)
    assert torch.equal(drawn, torch.randperm(20, device=TWO, generator=again))
    assert not torch.equal(drawn, torch.randperm(20, device=TWO, generator=again))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), host)  # devices draw nothing from the CPU's generator
