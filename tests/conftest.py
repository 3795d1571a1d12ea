"""Every test runs on one thread and with the same instructions, so that results hardly depend on the machine."""

import gc
import importlib
import os
import signal
from pathlib import Path

import pytest

PINNED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
"""Instructions that PyTorch, oneDNN and MKL use; read when they compute for the first time."""


def pytest_configure(config):
    """The process that only hands tests to others need not import PyTorch, for which they would wait."""
    os.environ.update({name: os.environ.get(name, value) for name, value in PINNED.items()})
    # A shell that starts the tests in the background has Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        import torch

        torch.set_num_threads(1)
        config.pluginmanager.import_plugin("saved_models")


def pytest_collection_finish():
    """A search for garbage, of which a run makes some, passes over what the imports have made and nobody frees."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Random tensors don't depend on the tests that ran before in the same process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def no_gradients():
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def benchmark():
    """`benchmark(name)` imports a script of benchmarks/."""
    return importlib.import_module


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The dense Llama and its tokenizer, saved; do not write to it."""
    from tiny_llama import save_tiny_folder

    return save_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def enough_tokens():
    """No expert of a mixture is under-calibrated, however few tokens it gets."""
    from optimum_fista.prune import loop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "UNDER_CALIBRATED_TOKENS", 0)
        yield
