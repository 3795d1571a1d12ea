"""Devices and dtypes that a user names in options, as PyTorch knows them; what can't be used is refused."""

import tempfile
from pathlib import Path

import torch

from optimum_fista.model.activations import Storage


def default_device() -> str:
    """Return the type of this machine's accelerator, such as "cuda", if there is one; otherwise "cpu".

    MPS (Apple) is not chosen, because it has no float64. Changes nothing.
    """
    if not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type == "mps":
        return "cpu"
    return accelerator.type


def usable_device(device: str | None) -> torch.device:
    """Return a device by name, such as "cuda:1"; `None` is `default_device()`. ValueError if it can't be used.

    `device` is the user's option. An accelerator is initialised by the question.
    """
    name = device or default_device()
    try:
        # Making a tensor shows whether the device works. For "cuda" it also gives the number of the current device.
        usable = torch.empty(0, device=name).device
        if usable.type == "meta":
            raise RuntimeError("it holds no values")  # becomes the error below
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(
            f"device={name!r} can't be used: {error}. Pass 'cpu', 'cuda' or 'cuda:N'."
        ) from error
    return usable


def storage_place(name: str | torch.device | Path | None) -> Storage | None:
    """Return the device or the folder in which activations wait, by the user's option `storage_device`.

    `name` is a device such as "cpu", or a folder. "disk" is the temporary folder of the system, and `None` stays
    `None`. ValueError if `name` is neither a device that can be used nor a folder that exists. Creates nothing.
    """
    if name is None:
        return None
    if name == "disk":
        return Path(tempfile.gettempdir())
    try:
        return usable_device(str(name))
    except ValueError as error:
        # It is a folder only if it is no device: a folder called `cpu` must be given as `./cpu`.
        if Path(str(name)).is_dir():
            return Path(str(name))
        raise ValueError(
            f"storage_device={str(name)!r}: pass a device such as 'cpu', 'disk', or a folder that exists ({error})"
        ) from error


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a dtype by name, such as "bfloat16"; ValueError if it has less than 16 bits or is not floating point.

    `dtype` is the user's option; a dtype of PyTorch is checked and returned.
    """
    # PyTorch has names that are no dtypes, so the result is checked below
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    # A model of 8 bits (1 byte) can't run: sums are not computed in them.
    if not isinstance(named, torch.dtype) or not named.is_floating_point or named.itemsize < 2:
        raise ValueError(f"dtype={dtype!r}: pass 'auto', 'float32', 'bfloat16' or 'float16'.")
    return named
