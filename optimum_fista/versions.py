"""Versions of the software, and the device, that a result depends on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

import torch

import optimum_fista


def library_versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries whose numbers or files depend on them."""
    libraries = ("torch", "transformers", "accelerate", "optimum", "safetensors", "huggingface-hub")
    versions = {"python": platform.python_version(), "optimum-fista": optimum_fista.__version__}
    for name in libraries:
        versions[name] = _version(name)
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            versions["gpu"] = device_name(accelerator)
    return versions


# The search for a package in the file system is slow.
_version = functools.cache(importlib.metadata.version)


def device_name(device: torch.device) -> str:
    """The name that a device gives itself; its type if it gives none."""
    module = torch.get_device_module(device)
    if hasattr(module, "get_device_name"):
        return str(module.get_device_name(device))
    return device.type
