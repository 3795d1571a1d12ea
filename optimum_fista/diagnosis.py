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
from pathlib import Path

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
# What to do with a device that computes otherwise, for the end of an error.
_DO_NOT_USE = "do not prune on this device, pass --device cpu, or update its driver and PyTorch"
_GIB = 2**30


def diagnose(say: Callable[[str], None]) -> int:
    """Describe this machine and prune a small model on every device; returns on how many devices that failed.

    `say`, such as `print`, is called with each line. No line has a path of the user's.
    """
    _describe_machine(say)
    failed = 0
    expected: list[Tensor] = []  # `_try_pruning` puts the weights here as the CPU pruned them
    for device in devices():
        say(f"\n{device}: {_describe(device)}")
        for name, text in _products(device):
            say(_line(f"  {name}", text))
        try:
            with warnings.catch_warnings(action="ignore"):  # the result is what counts
                text = _try_pruning(device, expected)
        except Exception as error:  # errors of drivers and libraries have any type
            failed += 1
            message = " ".join(str(error).split()).replace(str(Path.home()), "~")
            text = f"FAILED: {type(error).__name__}: {message[:400]}"
        say(_line("  pruning", text))
    return failed


def _describe_machine(say: Callable[[str], None]) -> None:
    """Call `say` with lines on the versions of libraries, the system, and how much memory and disk there is."""
    versions = [f"{name} {text}" for name, text in library_versions().items() if name != "gpu"]
    say(_line("versions", ", ".join(versions)))
    say(_line("system", f"{platform.system()} {platform.release()} {platform.machine()}"))
    free = available_bytes(torch.device("cpu")) or 0
    say(_line("memory", _free_of(free, psutil.virtual_memory().total)))
    disk = shutil.disk_usage(tempfile.gettempdir())
    say(_line("temporary folder", _free_of(disk.free, disk.total)))


def _line(name: str, text: str) -> str:
    """Write a line: the name with a colon, padded to a column, and the text."""
    return f"{name + ':':<18}{text}"


def devices() -> Iterator[torch.device]:
    """Yield the CPU, and then every accelerator that PyTorch finds (CUDA, ROCm, XPU, MPS and others)."""
    yield torch.device("cpu")
    if not torch.accelerator.is_available():
        return
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            yield torch.device(accelerator.type, index)


def _free_of(free: float, total: float) -> str:
    """Write two numbers of bytes in GiB."""
    return f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB"


def _describe(device: torch.device) -> str:
    """Say the name of a device; of the CPU also the threads, of others the memory and, for CUDA, the capability."""
    if device.type == "cpu":
        return f"{processor_name()}, {torch.get_num_threads()} threads"
    module = torch.get_device_module(device)
    parts = [device_name(device)]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        parts.append(f"compute capability {major}.{minor}")
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        parts.append(_free_of(free, total))
    return ", ".join(parts)


def _products(device: torch.device) -> Iterator[tuple[str, str]]:
    """Time matrix products on a device; yields names and texts of lines that say how fast they are.

    The first line has the rates by dtype. Two others say in which dtype a run multiplies the matrices of a model in
    bfloat16 or float16: "widened" means that each is copied to float32 first.
    """
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    try:
        rates = {dtype: _rate(device, dtype) for dtype in names}
    except Exception as error:  # of a driver or a library; the check that follows fails too
        yield "products", f"can't be timed ({type(error).__name__})"
        return

    shown = ", ".join(f"{names[dtype]} {_digits(rate)}" for dtype, rate in rates.items())
    yield "products", f"{shown} GFLOP/s"
    for stored in (torch.bfloat16, torch.float16):
        is_widened = choose_products("auto", device, stored) == "widened"
        used = torch.float32 if is_widened else stored
        other = stored if is_widened else torch.float32
        times_as_long = _digits(rates[used] / rates[other])
        yield (
            f"{names[stored]} model",
            f"a run multiplies in {names[used]}; {names[other]} would take {times_as_long} times as long",
        )


def _digits(number: float) -> str:
    """Write a number with at least two digits: `1,234`, `9.7`, `0.043`."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of products of square matrices of this dtype, in GFLOP/s (10**9 additions and products)."""
    for size in (512, 4096):
        square = torch.ones(size, size, device=device, dtype=dtype)
        timer = Timer(
            "torch.nn.functional.linear(square, square)",
            "import torch",
            globals={"square": square},
            num_threads=torch.get_num_threads(),
        )
        # One measurement, after a warm-up: the mean time of five products. `Timer` waits for the device.
        seconds = timer.timeit(5).median
        if seconds > 1e-3:  # otherwise the product is too small to tell the rate
            break
    operations = 2 * size**3
    return operations / seconds / 1e9


def _try_pruning(device: torch.device, expected: list[Tensor]) -> str:
    """Prune a random model of two decoder layers on a device, and compare it with the CPU's result.

    `expected` is empty for the CPU, which comes first: its pruned weights are put there, in one flat tensor. Returns a
    text with the time and the error. ValueError if a device differs from the CPU by more than rounding.
    """
    model, tokens = _small_model()
    torch.nn.Module.to(model, device)  # the method of Transformers has no types
    started = time.perf_counter()
    config = FistaPruningConfig(0.5, compute_dtype="float32")  # as exact as the CPU
    report = FistaPruner(config, progress=False).prune(model, tokens.split(4))
    seconds = time.perf_counter() - started

    parameters = [model.get_parameter(operator.name) for operator in report.operators]
    pruned = torch.cat([parameter.detach().cpu().flatten() for parameter in parameters])
    if not expected:
        expected.append(pruned)
    pruned_by_cpu = expected[0]
    is_alike = (pruned == 0) == (pruned_by_cpu == 0)  # of each weight: zero on both, or on none
    same_zeros = float(is_alike.float().mean())
    if same_zeros < _SAME_ZEROS:
        raise ValueError(
            f"only {same_zeros:.1%} of the pruned weights are zero or kept as on the CPU: {_DO_NOT_USE}"
        )
    distance = float((pruned - pruned_by_cpu).norm() / pruned_by_cpu.norm())
    if not distance <= _SAME_WEIGHTS:  # NaN included
        raise ValueError(
            f"the pruned weights have a relative distance of {distance:.2g} from the CPU's, and rounding makes at most "
            f"{_SAME_WEIGHTS}: {_DO_NOT_USE}"
        )

    error = report.totals["mean_fit_error"]
    text = f"{len(report.operators)} operators in {seconds:.1f} s, error {error:.4f}"
    if device.type != "cpu":
        text += f", {same_zeros:.2%} of the weights zero or kept as on the CPU"
    return text


def _small_model() -> tuple[LlamaForCausalLM, Tensor]:
    """Make a random model and random tokens [16, 32], always the same; the random state stays as it was."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        vocab_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Larger initial weights than usual: errors of the first layer must matter in the second.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        tokens = torch.randint(3, 128, (16, 32))
    return model, tokens
