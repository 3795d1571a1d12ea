"""What this machine is, and whether it prunes: what `optimum-fista doctor` prints."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fista.config import FistaPruningConfig
from optimum_fista.environment import processor_name
from optimum_fista.memory import available_bytes
from optimum_fista.packed.kernels import kernels
from optimum_fista.packed.linear import PackedLinear
from optimum_fista.pruner import FistaPruner
from optimum_fista.report import library_versions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIDE = 512  # of matrices that are multiplied on the CPU
_SAME_ZEROS = 0.99  # rounding moves a few weights over the threshold
_GIB = 2**30


def diagnose(say: Callable[[str], None]) -> int:
    """Describe this machine and try its devices, in well under a minute.

    Args:
        say: Called with each line; none has a path of the user's.

    Returns:
        The number of checks that failed.
    """
    failed = 0

    def check(name: str, call: Callable[[], str]) -> None:
        nonlocal failed
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = call()
        except Exception as error:  # whatever a driver or a library raises is what is looked for
            failed += 1
            text = " ".join(str(error).split()).replace(str(Path.home()), "~")
            result = f"FAILED: {type(error).__name__}: {text[:400]}"
        say(f"{name + ':':<18}{result}")

    versions = library_versions()
    say(f"{'versions:':<18}{', '.join(f'{name} {version}' for name, version in versions.items() if name != 'gpu')}")
    say(f"{'torch built for:':<18}{_built_for()}")
    say(f"{'system:':<18}{platform.system()} {platform.release()} {platform.machine()}")
    free, total = available_bytes(torch.device("cpu")) or 0, psutil.virtual_memory().total
    say(f"{'memory:':<18}{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB")
    disk = shutil.disk_usage(tempfile.gettempdir())
    say(f"{'temporary folder:':<18}{disk.free / _GIB:.1f} GiB free of {disk.total / _GIB:.1f} GiB")
    say(f"{'compiler:':<18}{_compiler()}")
    check("packed kernels", _kernels)
    expected: list[Tensor] = []
    for device in devices():
        say(f"\n{device}: {_describe(device)}")
        for dtype in _DTYPES:
            check(f"  {str(dtype).removeprefix('torch.')}", partial(_rate, device, dtype))
        check("  packed product", partial(_try_packed, device))
        check("  pruning", partial(_try_pruning, device, expected))
    return failed


def devices() -> Iterator[torch.device]:
    """The CPU, and every accelerator that PyTorch finds (CUDA, ROCm, XPU, MPS and others)."""
    yield torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            yield torch.device(accelerator.type, index)


def _built_for() -> str:
    """What PyTorch could use if the machine had it."""
    found = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    named = [f"{name} {version}" for name, version in found.items() if version]
    return ", ".join(named + ["MPS"] * torch.backends.mps.is_built()) or "CPU only"


def _compiler() -> str:
    """The C++ compiler that builds the packed kernels."""
    program = next((p for p in (os.environ.get("CXX"), "c++", "g++", "clang++") if p and shutil.which(p)), None)
    if program is None:
        return "none (packed layers need one to be fast on the CPU)"
    printed = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    return printed.partition("\n")[0] or Path(program).name


def _kernels() -> str:
    found = kernels()
    return found.path if found else "not compiled"


def _describe(device: torch.device) -> str:
    """Name and memory of a device."""
    if device.type == "cpu":
        return f"{processor_name()}, {torch.get_num_threads()} threads"
    module = torch.get_device_module(device)
    parts = [module.get_device_name(device)] if hasattr(module, "get_device_name") else []
    if device.type == "cuda":
        parts.append("compute capability {}.{}".format(*torch.cuda.get_device_capability(device)))
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        parts.append(f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB")
    return ", ".join(parts) or "no description"


def _rate(device: torch.device, dtype: torch.dtype) -> str:
    """Floating-point operations a second in a product of two matrices."""
    side = _SIDE if device.type == "cpu" else 8 * _SIDE
    timer = Timer("float((m @ m)[0, 0])", globals={"m": torch.ones(side, side, device=device, dtype=dtype)})
    return f"{2 * side**3 / timer.blocked_autorange(min_run_time=0.02).median / 1e9:,.0f} GFLOP/s"


def _try_packed(device: torch.device) -> str:
    """Compare products with a packed weight, of one input and of many, with those of the dense weight."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 96, bias=False)
    weight = torch.randn(96, 256, generator=generator)
    linear.weight = nn.Parameter(weight * (weight.abs() > 0.7), requires_grad=False)
    packed = PackedLinear.from_linear(nn.Module.to(linear, device))
    for count in (1, 40):
        inputs = torch.randn(count, 256, generator=generator).to(device)
        _require_close(packed(inputs).cpu(), linear(inputs).cpu(), 1e-3)
    return "as the dense one"


def _try_pruning(device: torch.device, expected: list[Tensor]) -> str:
    """Prune a random model of two decoder layers and compare it with the CPU's result, which comes first."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        vocab_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        tokens = torch.randint(3, 128, (16, 32))
    nn.Module.to(model, device)
    started = time.perf_counter()
    report = FistaPruner(FistaPruningConfig(0.5), progress=False).prune(model, tokens.split(4))
    seconds = time.perf_counter() - started
    found = torch.cat([model.get_parameter(o.name).detach().cpu().flatten() for o in report.operators])
    if not expected:
        expected.append(found)
    same = float(((found == 0) == (expected[0] == 0)).float().mean())
    if same < _SAME_ZEROS:
        raise ValueError(f"only {same:.1%} of the weights are zero or kept as on the CPU")
    _require_close(found, expected[0], 0.05)
    error = report.totals["mean_fit_error"]
    text = f"{len(report.operators)} operators in {seconds:.1f} s, error {error:.4f}"
    return text if device.type == "cpu" else f"{text}, {same:.2%} of the weights zero or kept as on the CPU"


def _require_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    distance = float((found - expected).norm() / expected.norm())
    if not distance <= tolerance:  # NaN included
        raise ValueError(f"relative distance {distance:.2g}, but rounding makes at most {tolerance:g}")
