"""Tensors in a store are read back as they were appended, wherever they are kept."""

import gc
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from optimum_fista.model.activations import ActivationStore

CPU = torch.device("cpu")


def activations() -> list[torch.Tensor]:
    """Tensors of several shapes, dtypes and strides, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 7), (1, 3, 7), (0, 4), (3, 8, 7), (2, 1)]
    first, second, empty, transposed, last = (
        torch.randn(shape, generator=generator) for shape in shapes
    )
    return [first.bfloat16(), second, empty, transposed.mT, last.half(), torch.arange(5)]


@pytest.fixture(params=["device", "file", "staged", "staged file"])
def store(request, tmp_path) -> ActivationStore:
    storage = tmp_path if "file" in request.param else CPU
    return ActivationStore(storage, CPU, staged="staged" in request.param)


def mapped_files() -> str:
    """The files that this process maps into memory."""
    gc.collect()
    return Path("/proc/self/maps").read_text()


def opened_files() -> str:
    """The files that this process holds open, deleted ones too."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of the list itself
            links.append(os.readlink(link))
    return "\n".join(links)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [5, 0, 0, 3, 4, 2, 1]])
def test_what_was_appended_is_read_back_in_any_order(store, order):
    wanted = activations()
    for tensor in wanted:
        store.append(tensor)

    assert len(store) == len(store.stored_tensors()) == 6
    for index in order:
        assert store[index].dtype == wanted[index].dtype
        assert torch.equal(store[index], wanted[index])
    assert all(map(torch.equal, store, wanted))
    assert all(map(torch.equal, store.stored_tensors(), wanted))
    with pytest.raises(IndexError):
        store[6]


def test_a_store_can_be_read_and_appended_to_in_turn(store):
    wanted: list[torch.Tensor] = []
    for tensor in activations() * 3:
        store.append(tensor)
        wanted.append(tensor)
        assert torch.equal(store[len(wanted) // 2], wanted[len(wanted) // 2])
    assert all(map(torch.equal, store, wanted))


def test_a_store_that_was_cleared_is_empty_and_takes_tensors(store):
    first, second, *_ = activations()
    store.append(first)

    store.clear()

    assert len(store) == 0

    store.append(second)
    assert torch.equal(store[0], second)


@pytest.mark.parametrize("staged", [False, True])
def test_a_copy_is_not_changed_by_what_happens_to_the_tensor(tmp_path, staged):
    for storage in (CPU, tmp_path):
        store = ActivationStore(storage, CPU, staged=staged)
        tensor = torch.ones(1000)
        store.append(tensor, copy=True)

        tensor.zero_()

        assert torch.equal(store[0], torch.ones(1000))


@pytest.mark.parametrize("staged", [False, True])
def test_writing_to_a_tensor_that_was_read_changes_the_store_only_if_it_is_in_memory(
    tmp_path, staged
):
    for storage in (CPU, tmp_path):
        store = ActivationStore(storage, CPU, staged=staged)
        store.append(torch.ones(1000))

        store[0].zero_()

        is_unchanged = bool(store[0].all())
        returns_copies = staged or storage != CPU
        assert is_unchanged == returns_copies


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="no list of mapped files on this system"
)
@pytest.mark.parametrize("staged", [False, True])
def test_a_store_in_a_folder_is_one_nameless_file_that_is_mapped_only_while_it_is_read(
    tmp_path, staged
):
    store = ActivationStore(tmp_path, CPU, staged=staged)
    for _ in range(3):
        store.append(torch.ones(5000))
    assert [float(tensor.sum()) for tensor in store] == [5000] * 3
    store.append(torch.ones(0))
    assert len(store[3]) == 0

    store.append(torch.ones(0))  # waits for what is read ahead, which opens the file once more
    assert not [*tmp_path.iterdir()]
    assert opened_files().count(str(tmp_path)) == 1

    kept = store.stored_tensors()
    assert mapped_files().count(str(tmp_path)) == 3
    del kept
    assert str(tmp_path) not in mapped_files()

    del store
    gc.collect()

    assert str(tmp_path) not in opened_files()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("folder", [True, False])
def test_tensors_of_a_gpu_come_back_to_it_as_they_were_appended(tmp_path, folder):
    device = torch.device("cuda")
    store = ActivationStore(tmp_path if folder else CPU, device)
    wanted = [torch.randn(64, 128, 256, device=device) for _ in range(6)]
    for tensor in wanted:
        store.append(tensor * 2)
        tensor.add_(0)  # work that the copies must not get mixed up with
    for index, tensor in enumerate(store):
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor, wanted[index] * 2)
    assert all(tensor.device.type == "cpu" for tensor in store.stored_tensors())
