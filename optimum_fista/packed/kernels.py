"""The compiled kernels: found beside this file, called through ctypes, with PyTorch's own threads.

The library does not use Python, so it works with every version of PyTorch; an extension would not. But it gets only
addresses. So it also gets the size of every buffer, and refuses sizes that do not fit before it reads.
"""

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from optimum_fista.installing import install_command

PATHS = ("portable", "avx2", "avx512")
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ENVIRONMENT = "OPTIMUM_FISTA_KERNELS"


class Kernels:
    """Products with packed matrices, one bit a weight, on the CPU.

    `path` is `"portable"`, `"avx2"` or `"avx512"`; `None`: the best one of this CPU.
    """

    def __init__(self, library: Path, path: str | None = None) -> None:
        self._library = ctypes.CDLL(str(library))
        # Without these types ctypes would cut addresses to 32 bits.
        number, size, buffer = ctypes.c_int, ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int64)
        matrix: list[Any] = [
            number,
            number,
            size,
            *buffer,
            *buffer,
            *buffer,
        ]  # path, dtype, columns, three tensors
        self._linear = self._library.optimum_fista_multiply
        self._linear.argtypes = [*matrix, *buffer, *buffer, *buffer, number]
        self._unpack = self._library.optimum_fista_unpack
        self._unpack.argtypes = [*matrix, size, *buffer, number]
        best = self._library.optimum_fista_best_path()
        if path is not None and path not in PATHS[: best + 1]:
            raise ValueError(f"path={path!r}: this CPU has {', '.join(PATHS[: best + 1])}.")
        self.path = PATHS[best] if path is None else path
        self._path = PATHS.index(self.path)
        self._use_threads_of_torch()

    def linear(
        self, x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Product y = W x + b of contiguous tensors on the CPU, as in `operation.packed_linear`.

        `x`, values and bias are of one dtype, float32, float16 or bfloat16; sums are taken in float32.
        """
        *leading, columns = x.shape
        y = torch.empty(
            (*leading, mask.shape[0]), dtype=x.dtype
        )  # every row is written, or the call is refused
        matrix = (
            values.data_ptr(),
            values.nbytes,
            mask.data_ptr(),
            mask.nbytes,
            starts.data_ptr(),
            starts.nbytes,
        )
        others = (
            x.data_ptr(),
            x.nbytes,
            *((None, 0) if bias is None else (bias.data_ptr(), bias.nbytes)),
        )
        path, dtype, threads = self._path, _TYPES[x.dtype], torch.get_num_threads()
        failed = self._linear(
            path, dtype, columns, *matrix, *others, y.data_ptr(), y.nbytes, threads
        )
        return y if not failed else _refuse(failed, columns, values, mask, starts, bias)

    def unpack_rows(
        self, values: Tensor, mask: Tensor, starts: Tensor, first: int, dense: Tensor
    ) -> Tensor:
        """Write rows from `first` on into `dense`, [count, columns] of the values' dtype; raises as `linear` does."""
        matrix = (
            values.data_ptr(),
            values.nbytes,
            mask.data_ptr(),
            mask.nbytes,
            starts.data_ptr(),
            starts.nbytes,
        )
        path, dtype, threads = self._path, _TYPES[values.dtype], torch.get_num_threads()
        failed = self._unpack(
            path, dtype, dense.shape[1], *matrix, first, dense.data_ptr(), dense.nbytes, threads
        )
        return dense if not failed else _refuse(failed, dense.shape[1], values, mask, starts, None)

    def _use_threads_of_torch(self) -> None:
        """Use the same OpenMP library as PyTorch; if it has none, std::thread is used."""
        # A second OpenMP would have its own threads, which compete with the spinning threads of PyTorch.
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        try:
            torch_cpu = ctypes.CDLL(
                str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")))
            )
            functions = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in names]
        except (StopIteration, OSError, AttributeError):
            functions = [ctypes.c_void_p(None)] * 3
        self.uses_openmp = functions[0].value is not None
        self._library.optimum_fista_use_openmp(*functions)


def find_library() -> Path | None:
    """The library that was compiled when this package was installed."""
    library = Path(__file__).with_name("_kernels.so")
    return library if library.exists() else None


@functools.cache
def kernels() -> Kernels | None:
    """The kernels of this installation; `None`, with one warning, if they were not compiled.

    The environment variable OPTIMUM_FISTA_KERNELS chooses a path: portable, avx2, avx512, or none.
    """
    wanted = os.environ.get(_ENVIRONMENT) or None
    if wanted == "none":
        return None
    if wanted is not None and wanted not in PATHS:
        raise ValueError(
            f"{_ENVIRONMENT}={wanted!r}: set it to one of {', '.join(PATHS)}, or none."
        )
    library = find_library()
    if library is not None:
        try:
            return Kernels(library, wanted)
        except (
            OSError,
            AttributeError,
        ) as error:  # the latter from a library that another version compiled
            reason = f"could not be loaded ({error})"
    else:
        reason = "were not compiled when optimum-fista was installed"
    warnings.warn(
        f"The CPU kernels of packed linear layers {reason}: every product unpacks its whole weight first, which is "
        "slower than a dense model. Install a C++17 compiler (g++ or clang++), then optimum-fista again "
        f"({install_command(options='--force-reinstall --no-deps --no-cache-dir')}), or load the model dense.",
        stacklevel=2,
    )
    return None


def _refuse(
    failed: int, columns: int, values: Tensor, mask: Tensor, starts: Tensor, bias: Tensor | None
) -> NoReturn:
    sizes = f"a mask of shape {tuple(mask.shape)}, {starts.numel()} row starts and {values.numel()} values"
    sizes += "" if bias is None else f" with a bias of shape {tuple(bias.shape)}"
    if failed == 1:
        raise ValueError(
            f"x has {columns} columns, which {sizes} do not fit: pass the tensors of one such matrix."
        )
    why = f"The mask keeps other numbers of weights than its row starts say ({sizes}, {columns} columns)"
    raise ValueError(f"{why}: pass the row starts of this mask; PackedLinear.prepare finds them.")
