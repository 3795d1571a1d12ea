"""Versions of the software, and the device, that a result depends on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

import torch

import optimum_fista


def library_versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that a result depends on, by their names.

    Names are those of the packages, such as "huggingface-hub". If there is an accelerator, "gpu" is its name.
    """
    libraries = ("torch", "transformers", "accelerate", "optimum", "safetensors", "huggingface-hub")
    versions = {"python": platform.python_version(), "optimum-fista": optimum_fista.__version__}
    for name in libraries:
        versions[name] = _version(name)
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            versions["gpu"] = device_name(accelerator)
    return versions


# The version of an installed package by its name. The search for it in the file system is slow, so it is done once.
_version = functools.cache(importlib.metadata.version)


def device_name(device: torch.device) -> str:
    """Return the name that a device gives itself, such as "NVIDIA H100"; its type, such as "mps", if it gives none."""
    module = torch.get_device_module(device)
    if hasattr(module, "get_device_name"):
        return str(module.get_device_name(device))
    return device.type
