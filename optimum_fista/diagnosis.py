"""What this machine is, and whether it prunes: what `optimum-fista doctor` prints.

Every device prunes a small random model, and the result must be the CPU's but for rounding: a driver or a library that
computes wrongly is found here and not in a model that was pruned for hours.
"""

import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fista.config import FistaPruningConfig
from optimum_fista.environment import processor_name
from optimum_fista.memory import available_bytes
from optimum_fista.model.precision import choose_products
from optimum_fista.pruner import FistaPruner
from optimum_fista.versions import device_name, library_versions

_SAME_ZEROS = 0.99  # rounding moves a few weights over the threshold
_SAME_WEIGHTS = 0.05  # relative distance that rounding makes
_GIB = 2**30


def diagnose(say: Callable[[str], None]) -> int:
    """Say what this machine is, a line at a time and without paths of the user's; returns how many checks failed."""
    failed = 0

    def show(name: str, text: str) -> None:
        say(f"{name + ':':<18}{text}")

    def check(name: str, call: Callable[[], str]) -> None:
        nonlocal failed
        try:
            with warnings.catch_warnings(action="ignore"):  # what matters of them is in the result
                show(name, call())
        except Exception as error:  # whatever a driver or a library raises is what is looked for
            failed += 1
            text = " ".join(str(error).split()).replace(str(Path.home()), "~")
            show(name, f"FAILED: {type(error).__name__}: {text[:400]}")

    show(
        "versions",
        ", ".join(f"{name} {text}" for name, text in library_versions().items() if name != "gpu"),
    )
    show("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    show(
        "memory", _free_of(available_bytes(torch.device("cpu")) or 0, psutil.virtual_memory().total)
    )
    disk = shutil.disk_usage(tempfile.gettempdir())
    show("temporary folder", _free_of(disk.free, disk.total))
    expected: list[Tensor] = []  # weights as the CPU pruned them
    for device in devices():
        say(f"\n{device}: {_describe(device)}")
        for name, text in _products(device):
            show(f"  {name}", text)
        check("  pruning", partial(_try_pruning, device, expected))
    return failed


def devices() -> Iterator[torch.device]:
    """The CPU, and every accelerator that PyTorch finds (CUDA, ROCm, XPU, MPS and others)."""
    yield torch.device("cpu")
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            yield torch.device(accelerator.type, index)


def _free_of(free: float, total: float) -> str:
    return f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB"


def _describe(device: torch.device) -> str:
    """Name and memory of a device."""
    if device.type == "cpu":
        return f"{processor_name()}, {torch.get_num_threads()} threads"
    module = torch.get_device_module(device)
    parts = [device_name(device)]
    if device.type == "cuda":
        parts.append("compute capability {}.{}".format(*torch.cuda.get_device_capability(device)))
    if hasattr(module, "mem_get_info"):
        parts.append(_free_of(*module.mem_get_info(device)))
    return ", ".join(parts)


def _products(device: torch.device) -> Iterator[tuple[str, str]]:
    """Rates of matrix products, and in which dtype a run multiplies models of 16 bits."""
    names = {getattr(torch, name): name for name in ("float32", "bfloat16", "float16")}
    try:
        rates = {dtype: _rate(device, dtype) for dtype in names}
    except Exception as error:  # as above; the check that follows fails too
        yield "products", f"can't be timed ({type(error).__name__})"
        return
    yield (
        "products",
        ", ".join(f"{names[dtype]} {_digits(rate)}" for dtype, rate in rates.items()) + " GFLOP/s",
    )
    for stored in (torch.bfloat16, torch.float16):
        used, other = stored, torch.float32
        if choose_products("auto", device, stored) == "widened":
            used, other = other, used
        cost = f"{names[other]} would take {_digits(rates[used] / rates[other])} times as long"
        yield f"{names[stored]} model", f"a run multiplies in {names[used]}; {cost}"


def _digits(number: float) -> str:
    """Write a number with at least two digits: `1,234`, `9.7`, `0.043`."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of matrix products, in GFLOP/s."""
    for size in (512, 4096):
        square = torch.ones(size, size, device=device, dtype=dtype)
        options: Any = {"globals": {"square": square}, "num_threads": torch.get_num_threads()}
        seconds = (
            Timer("torch.nn.functional.linear(square, square)", "import torch", **options)
            .timeit(5)
            .median
        )
        if seconds > 1e-3:  # otherwise the product is too small to tell the rate
            break
    return 2 * size**3 / seconds / 1e9


def _try_pruning(device: torch.device, expected: list[Tensor]) -> str:
    """Prune a random model of two decoder layers and compare it with the CPU's result, which comes first."""
    shape: Any = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "vocab_size": 128,
    }
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        # Larger initial weights than usual: errors of the first layer must matter in the second.
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.2)).eval()
        tokens = torch.randint(3, 128, (16, 32))
    torch.nn.Module.to(model, device)
    started = time.perf_counter()
    config = FistaPruningConfig(0.5, compute_dtype="float32")  # as exact as the CPU
    report = FistaPruner(config, progress=False).prune(model, tokens.split(4))
    seconds = time.perf_counter() - started
    found = torch.cat(
        [model.get_parameter(o.name).detach().cpu().flatten() for o in report.operators]
    )
    if not expected:
        expected.append(found)
    same = float(((found == 0) == (expected[0] == 0)).float().mean())
    if same < _SAME_ZEROS:
        raise ValueError(f"only {same:.1%} of the weights are zero or kept as on the CPU")
    distance = float((found - expected[0]).norm() / expected[0].norm())
    if not distance <= _SAME_WEIGHTS:  # NaN included
        raise ValueError(
            f"relative distance {distance:.2g} from the CPU's, but rounding makes at most {_SAME_WEIGHTS}"
        )
    error = report.totals["mean_fit_error"]
    text = f"{len(report.operators)} operators in {seconds:.1f} s, error {error:.4f}"
    return (
        text
        if device.type == "cpu"
        else f"{text}, {same:.2%} of the weights zero or kept as on the CPU"
    )
