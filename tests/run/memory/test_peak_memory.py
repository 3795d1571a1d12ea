import time

import psutil
import pytest
import torch

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.memory.peak_memory import MemoryPeak, PeakMemory

CPU = torch.device("cpu")
SIZE = 64 << 20


def test_what_was_freed_again_is_seen():
    before = psutil.Process().memory_info().rss
    with PeakMemory(CPU) as memory:
        held = torch.ones(SIZE // 4)
        ends = time.monotonic() + 60  # it looks 50 times a second, if the machine lets it
        while memory.peak.resident_bytes < before + 0.9 * SIZE and time.monotonic() < ends:
            time.sleep(0.02)
        del held
    assert memory.peak.resident_bytes >= before + 0.9 * SIZE
    assert memory.peak.device_bytes is None
    if memory.peak.anonymous_bytes is not None:
        assert 0.9 * SIZE <= memory.peak.anonymous_bytes <= memory.peak.resident_bytes
    with PeakMemory(CPU) as later:
        pass
    assert later.peak.resident_bytes < memory.peak.resident_bytes


def test_it_ends_with_an_error(monkeypatch):
    memory = PeakMemory(CPU)
    with pytest.raises(KeyboardInterrupt), memory:
        raise KeyboardInterrupt
    assert not memory._thread.is_alive()


def test_the_thread_of_a_context_that_was_never_left_ends_as_well():
    memory = PeakMemory(CPU)
    memory.__enter__()
    thread = memory._thread
    del memory
    thread.join(60)
    assert not thread.is_alive()


def test_on_cuda_the_count_of_pytorch_starts_anew(monkeypatch):
    peaks = {"now": 5}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks["now"])
    with PeakMemory(torch.device("cuda:1")) as memory:
        peaks["now"] = 3
    assert memory.peak.device_bytes == 3


@pytest.mark.parametrize("from_files", [False, True])
def test_every_layer_of_a_report_has_its_peak(llama, tokens, tiny_folder, tmp_path, from_files):
    pruner = FistaPruner(FistaPruningConfig(method="wanda", exclude="*.layers.1.*"), progress=False)
    options = {"output_dir": tmp_path / "pruned"} if from_files else {}
    report = pruner.prune(tiny_folder if from_files else llama, tokens.split(4), **options)
    first, last = (layer.memory for layer in report.layers)
    assert isinstance(first, MemoryPeak)
    assert first.resident_bytes > 1 << 20
    assert last is None
